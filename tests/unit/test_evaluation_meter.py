"""Whether a meter is heard in onsets."""

import json

import numpy as np
import pytest

from duotok.recipes.evaluation import score
from duotok.recipes.evaluation.meter_part import fold_onsets, pulse_shares
from duotok.tokenizer.music.score_reader import STEM_COLUMNS

RATE_HZ, BAR_SECONDS = 50.0, 1.8


def play(strokes: dict[float, float], bars: int = 20) -> np.ndarray:
    """Onset strengths of bars with strokes at parts of a bar."""
    onsets = np.zeros(round(bars * BAR_SECONDS * RATE_HZ))
    for bar in range(bars):
        for place, strength in strokes.items():
            onsets[int((bar + place) * BAR_SECONDS * RATE_HZ)] = strength
    return onsets


@pytest.mark.parametrize(
    ("beats", "strokes"),
    [
        (3, {0: 1.0, 1 / 3: 0.6, 2 / 3: 0.6}),
        (4, {0: 1.0, 1 / 4: 0.5, 1 / 2: 0.9, 3 / 4: 0.5}),
        (2, {0: 1.0, 1 / 2: 0.8}),
    ],
)
def test_the_beats_of_the_bar_are_told_from_others(beats: int, strokes: dict[float, float]) -> None:
    lines = np.arange(21) * BAR_SECONDS
    shares = pulse_shares(fold_onsets(play(strokes), RATE_HZ, lines))
    others = [share for other, share in shares.items() if other % beats and beats % other]
    assert shares[beats] > 0.7 and max(others) < 0.5 * shares[beats]


def test_bars_are_folded_by_their_own_lines() -> None:
    onsets = np.zeros(300)
    onsets[[0, 50, 150]] = 1.0  # bars of 1, 2 and 3 s
    folded = fold_onsets(onsets, RATE_HZ, [0.0, 1.0, 3.0, 6.0])
    assert folded.argmax() == 0 and folded[1:].max() == 0.0


def test_silence_has_no_pulse() -> None:
    silent = pulse_shares(fold_onsets(np.zeros(300), RATE_HZ, [0.0, 1.0, 2.0]))
    assert set(silent.values()) == {0.0}


def test_a_band_and_the_true_one_are_heard_alike(tiny_corpus, tiny_bundle, tmp_path) -> None:
    out = tmp_path / "results.json"
    options = ["--bundle", str(tiny_bundle), "--corpus", str(tiny_corpus), "--out", str(out)]
    assert score.main(["meter", *options, "--items", "2", "--seconds", "6"]) == 0
    figures = {name.removeprefix("meter."): value for name, value in json.loads(out.read_text()).items()}
    assert figures.pop("excerpts") == 2
    assert all(0 <= value <= 1 for value in figures.values())
    shares = {f"in_4_{stem}_at_{beats}" for stem in STEM_COLUMNS for beats in (2, 3, 4, 6)}
    assert {"in_4_kept", *shares} <= set(figures)
    assert {name.removeprefix("true_") for name in figures} == {n for n in figures if "true" not in n}
