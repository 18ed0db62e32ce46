"""Ranking by codes: each part of the score tells what it should, and the best come first."""

import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.rank import (
    WEIGHTS,
    Fit,
    TrackReading,
    measure_fit,
    measure_pulse,
    rank,
    read_track,
    sung_over_chords,
)
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.labels import CHORDS, NO_CHORD

BLOCKS = 60
C_MAJOR, F_MAJOR, G_MAJOR = 0, 5, 7


def make_singer(pitches: list[int], sounding: list[int] | None = None) -> TrackReading:
    """A vocal that sings pitch classes in turn, 1 s each, in the scale of C major."""
    classes = np.resize(np.repeat(pitches, 10), BLOCKS)
    return TrackReading(
        chroma=torch.eye(12)[classes] * flags(sounding or [1])[:, None],
        power=torch.ones(BLOCKS),
        chords=torch.full((BLOCKS, CHORDS), 1 / CHORDS),
        scales=torch.eye(12)[0],
    )


def make_band(
    chords: list[int], *, scale: int = 0, sounding: list[int] | None = None, power: list[float] | None = None
) -> TrackReading:
    """A band that plays chords in turn, 1 s each."""
    active = flags(sounding or [1])
    classes = np.resize(np.repeat(chords, 10), BLOCKS)
    judged = torch.from_numpy(np.where(active, classes, NO_CHORD))
    return TrackReading(
        chroma=torch.stack([spell(chord) for chord in classes]) * active[:, None],
        power=torch.from_numpy(np.resize(np.repeat(power or [1.0], 10), BLOCKS)).float() * active,
        chords=torch.eye(CHORDS)[judged],
        scales=torch.eye(12)[scale],
    )


def spell(chord: int) -> torch.Tensor:
    """Chroma of a major triad, or of noise."""
    chroma = torch.full((12,), 1.0 if chord == NO_CHORD else 0.1)
    if chord != NO_CHORD:
        chroma[[chord % 12, (chord + 4) % 12, (chord + 7) % 12]] = 1.0
    return chroma


def flags(seconds: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.resize(np.repeat(seconds, 10), BLOCKS) > 0)


def test_a_pulse_is_what_begins_on_the_beats() -> None:
    beats = np.arange(1.0, 7.0, 0.5)
    mel = torch.full((800, 8), -4.0)
    strokes = (100 * beats).astype(int)
    for after in range(10):
        mel[strokes + after] = -1.0 - 0.3 * after
    on, near, off = (measure_pulse(mel, beats + shift) for shift in (0.0, 0.025, 0.25))
    assert on is not None and near == pytest.approx(on) and on > 3
    assert off is not None and off < 0
    noise = measure_pulse(torch.randn(800, 8, generator=torch.Generator().manual_seed(0)), beats)
    assert noise is not None and abs(noise) < 1
    assert measure_pulse(torch.zeros(800, 8), beats) is None and measure_pulse(mel, beats[:3]) is None


def test_chord_tones_are_likelier_than_others() -> None:
    sung = make_singer([0, 4, 7])
    fitting = measure_fit(sung, make_band([C_MAJOR]))
    assert fitting.chord_bits == pytest.approx(1.35, abs=0.1)  # the three tones of the chord
    assert fitting.harmony_bits == pytest.approx(np.log2(12 / 3.09), abs=1e-4)
    wrong, noise = (measure_fit(sung, make_band([chord])) for chord in (C_MAJOR + 6, NO_CHORD))
    assert wrong.chord_bits is not None and wrong.chord_bits < -1.5
    assert wrong.harmony_bits is not None and wrong.harmony_bits < -3
    assert noise.chord_bits == pytest.approx(0.0, abs=1e-5)
    assert noise.harmony_bits == pytest.approx(0.0, abs=1e-5)
    assert fitting.score > noise.score > wrong.score
    # Frame by frame: the same chords at the wrong time fit worse.
    in_time = measure_fit(make_singer([0, 5, 7]), make_band([C_MAJOR, F_MAJOR, G_MAJOR]))
    late = measure_fit(make_singer([0, 5, 7]), make_band([G_MAJOR, C_MAJOR, F_MAJOR]))
    for name in ("chord_bits", "harmony_bits"):
        assert getattr(in_time, name) > getattr(late, name) + 0.5


def test_tables_are_probabilities_in_every_key() -> None:
    table = sung_over_chords()
    assert table.shape == (CHORDS, 12)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(CHORDS))
    torch.testing.assert_close(table[14], table[12].roll(2))
    assert int(table[7].argmax()) == (7 + 7) % 12  # over G major mostly its fifth is sung


def test_keys_agree_when_same_or_near() -> None:
    sung = make_singer([0, 2, 4, 5, 7, 9])
    cadence = [C_MAJOR, F_MAJOR, G_MAJOR]
    same = measure_fit(sung, make_band(cadence))
    fifth = measure_fit(sung, make_band([chord + 7 for chord in cadence], scale=7))
    far = measure_fit(sung, make_band([chord + 6 for chord in cadence], scale=6))
    assert (same.key_agreement, fifth.key_agreement, far.key_agreement) == (1.0, 0.0, 0.0)
    assert same.in_key == 1.0 and fifth.in_key == pytest.approx(5 / 6) and far.in_key == pytest.approx(1 / 6)
    assert same.score > fifth.score > far.score


def test_a_band_that_leaves_the_singer_alone() -> None:
    sung = make_singer([0], sounding=[1, 1, 1, 0, 0, 0])
    assert measure_fit(sung, make_band([C_MAJOR])).support == 1.0
    # Two of three sung seconds are silent; a gap below 1 s is no silence.
    alone = measure_fit(sung, make_band([C_MAJOR], sounding=[1, 0, 0, 1, 1, 1]))
    assert alone.support == pytest.approx(1 / 3)
    short = make_band([C_MAJOR])
    short.chroma[5:12] = 0.0
    assert measure_fit(sung, short).support == 1.0
    # Silence where nobody sings costs nothing.
    assert measure_fit(sung, make_band([C_MAJOR], sounding=[1, 1, 1, 0, 0, 0])).support == 1.0


def test_a_wall_of_noise_in_pauses() -> None:
    sung = make_singer([0], sounding=[1, 1, 1, 0, 0, 0])
    chords = [C_MAJOR] * 3
    wall = measure_fit(sung, make_band([*chords, *[NO_CHORD] * 3], power=[1, 1, 1, 4, 4, 4]))
    assert wall.noise == 1.0
    quiet = measure_fit(sung, make_band([*chords, *[NO_CHORD] * 3], power=[1, 1, 1, 0.5, 0.5, 0.5]))
    music = measure_fit(sung, make_band(chords * 2, power=[1, 1, 1, 4, 4, 4]))
    assert quiet.noise == music.noise == 0.0
    assert wall.score < quiet.score


def test_nothing_to_compare_with() -> None:
    silent = make_band([NO_CHORD], sounding=[0])
    silent = TrackReading(**{**vars(silent), "scales": None})
    alone = measure_fit(make_singer([0]), silent)
    assert alone.key_agreement is alone.in_key is None and alone.support == 0.0
    assert alone.score < measure_fit(make_singer([0]), make_band([C_MAJOR])).score
    unsung = measure_fit(make_singer([0], sounding=[0]), make_band([C_MAJOR]))
    assert unsung.harmony_bits is unsung.chord_bits is unsung.in_key is None and unsung.support == 1.0
    json.dumps(unsung.describe(), allow_nan=False)


def test_likelihoods_are_in_bits() -> None:
    sung, band = make_singer([0]), make_band([C_MAJOR])
    fit = measure_fit(sung, band, likelihood_nats=-2.0, information_nats=float(np.log(2)))
    assert fit.information_bits == pytest.approx(1.0)
    assert fit.likelihood_bits == pytest.approx(-2.885, abs=1e-3)
    assert fit.score == pytest.approx(measure_fit(sung, band).score + WEIGHTS["information_bits"])
    assert set(WEIGHTS) <= {field.name for field in fields(Fit)}


def test_best_first_and_ties_in_order() -> None:
    sung = make_singer([0, 4, 7])
    fits = [measure_fit(sung, make_band([chord])) for chord in (6, 0, 6, 7)]
    assert rank(fits) == [1, 3, 0, 2]
    styles = ["waltz", "rock", "folk", "rock"]
    assert [rank(fits, styles, kept) for kept in (1, 2, 3)] == [[1, 3, 0, 2], [1, 0, 3, 2], [1, 0, 2, 3]]
    assert rank(fits, ["rock"] * 4, 3) == rank(fits)


def test_reading_a_read_out() -> None:
    frames = 100  # 4 s of C major, then 4 s of nothing
    chroma = torch.full((1, 4 * frames, 12), 0.1)
    chroma[:, : 2 * frames, [0, 4, 7]] = 0.9
    mel = torch.full((1, 8 * frames, 32), -1.0)
    mel[:, 4 * frames :] = -5.0
    reading = read_track(ReadOut(mel=mel, chroma=chroma), "accompaniment")
    assert reading.sounding.tolist() == [True] * 40 + [False] * 40
    assert reading.chords[:38].argmax(dim=1).unique().tolist() == [C_MAJOR]
    assert reading.chords[40:].argmax(dim=1).unique().tolist() == [NO_CHORD]
    assert reading.scales is not None and float(reading.scales.sum()) == pytest.approx(1.0, abs=1e-5)
    assert reading.chroma[0].topk(3).indices.sort().values.tolist() == [0, 4, 7]
    silence = read_track(ReadOut(mel=torch.full_like(mel, -5.0), chroma=chroma), "accompaniment")
    assert silence.scales is None


def test_compositions_are_ranked_before_they_sound(tiny_bundle, make_singing) -> None:
    accompanist = Accompanist.from_pretrained(tiny_bundle)
    vocal = torch.from_numpy(make_singing(2.0).T)
    seen: list[str] = []
    sketches = accompanist.compose(
        vocal, guidance=2.0, candidates=9, progress=lambda stage, _: seen.append(stage)
    )
    assert set(seen) == {"listen", "compose"}
    scores = [composition.fit.score for composition in sketches.ranked]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert sorted(composition.seed for composition in sketches.ranked) == list(range(9))
    assert all(composition.fit.information_bits is not None for composition in sketches.ranked)
    # A candidate is the same alone, in its style.
    best = sketches.ranked[0]
    (alone,) = accompanist.compose(vocal, seed=best.seed, style=best.style, guidance=2.0).ranked
    assert torch.equal(alone.codes, sketches.ranked[0].codes)
