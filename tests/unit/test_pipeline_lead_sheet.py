"""Tempo and chords that are known beforehand, and the lead sheet in the report."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.sheet.columns import CHORD, CHORD_TRUST, METERS, PLACES, WRITTEN, unknown_sheet
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.accompany.wishes import (
    SheetWishes,
    describe_plan,
    find_beats,
    find_rests,
    keep_rests,
    make_plan,
    read_chart,
)
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.music.labels import NO_CHORD

RATE_HZ = 25.0


@pytest.fixture
def lm() -> DualTrackLM:
    torch.manual_seed(0)
    sizes = dict(vocal_codes=11, accompaniment_codes=13, code_dim=4, embedding_dim=8, hidden_dim=16)
    return DualTrackLM(
        DualTrackLMConfig(**sizes, layers=1, heads=2, key_value_heads=1, feed_forward_dim=16)
    ).eval()


def add_reader(lm: DualTrackLM) -> DualTrackLM:
    lm.add_sheet_reader(SheetReader(SheetReaderConfig(vocal_codes=11, code_dim=4, dim=8, dilations=(1, 2))))
    return lm


def write_chart(folder: Path, text: str) -> Path:
    path = folder / "song.lab"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "chart"),
    [
        ("0.0 2.4 C:maj\n\n2.4\t4.8\tA:min7\n4.8 6 N\n", ["C:maj", "A:min7", "N"]),
        ("\ufeff0 2 Am\r\n2 4 C7\r\n", ["Am", "C7"]),
        ("# song\n0 2 F#m7b5 # half diminished\n  # end\n2 4 D/F#", ["F#m7b5", "D/F#"]),
        ("4 6 N.C.\n0 2.0004 X\n2 4 Gsus4\n", ["X", "Gsus4", "N.C."]),  # in order of time
    ],
)
def test_a_chart_is_read(tmp_path: Path, text: str, chart: list[str]) -> None:
    found = read_chart(write_chart(tmp_path, text))
    assert [label for _, _, label in found] == chart
    assert [start for start, _, _ in found] == sorted(start for start, _, _ in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no chords"),
        ("# nothing\n", "has no chords"),
        ("0 2 C:maj\n2 4\n", "line 2: '2 4' is not 'start end chord'"),
        ("0 2 H:maj\n", "line 1: 'H:maj' is no chord"),
        ("\n0 2 C:blah\n", "line 2: 'C:blah' is no chord: 'blah' is no quality"),
        ("a 2 C:maj\n", "line 1"),
        ("3 2 C:maj\n", "line 1: a chord must begin at 0 or later and end after that"),
        ("0 nan C:maj\n", "line 1: a chord must"),
        ("0 inf C:maj\n", "line 1: a chord must"),
        ("2 4 Am\n0 3 C\n", "line 1: begins at 2 s, before .*line 2 ends at 3 s"),
    ],
)
def test_bad_charts_are_refused_by_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_chart(write_chart(tmp_path, text))


def test_a_chart_from_python_is_checked_as_well() -> None:
    assert SheetWishes(chart=[(2, 3, "C"), (0, 1, "N")]).chart == [(0, 1, "N"), (2, 3, "C")]
    with pytest.raises(DataError, match="chord 2 of the chart: begins at 1 s, before chord 1"):
        SheetWishes(chart=[(0, 2, "C"), (1, 3, "C")])
    with pytest.raises(DataError, match="chord 1 of the chart: 'C:blah'"):
        SheetWishes(chart=[(0, 2, "C:blah")])


def test_files_that_are_no_charts_are_refused(tmp_path: Path) -> None:
    for path, message in (("nothing.lab", "does not exist"), ("/dev/zero", "a device"), (".", "a folder")):
        with pytest.raises(DataError, match=message):
            read_chart(tmp_path / path)
    (tmp_path / "sound.wav").write_bytes(b"RIFF\xff\xfe\xfd")
    with pytest.raises(DataError, match="no text in UTF-8"):
        read_chart(tmp_path / "sound.wav")
    (tmp_path / "long.lab").write_bytes(b"0 1 C:maj\n" * 100_001)
    with pytest.raises(DataError, match="too large"):
        read_chart(tmp_path / "long.lab")


def test_wishes_take_the_place_of_what_is_read(lm: DualTrackLM) -> None:
    codes = torch.randint(0, 11, (300,))
    pitches = np.full(600, 60.0)
    plain = make_plan(add_reader(lm), codes, pitches, RATE_HZ, SheetWishes())
    assert plain is not None and not find_rests(plain.sheet).any()
    chart = [(1.0, 2.0, "Em"), (2.0, 3.0, "N"), (3.0, 4.0, "C:sus4"), (4.0, 5.0, "X"), (11.0, 90.0, "G7")]
    wishes = SheetWishes(tempo_bpm=100, downbeat_seconds=1.3, key="Eb minor", chart=chart)
    plan = make_plan(lm, codes, pitches, RATE_HZ, wishes)
    same = make_plan(lm, codes, pitches, RATE_HZ, SheetWishes(tempo_bpm=100, downbeat_seconds=1.3, key="Ebm"))
    assert plan is not None and same is not None
    wished, same_tempo = plan.sheet, same.sheet
    written = [
        (25, 50, 12 + 4, WRITTEN),
        (50, 75, NO_CHORD, WRITTEN),
        (75, 100, 0, 5),
        (275, 300, 7, WRITTEN),
    ]
    for first, last, chord, trust in written:
        assert wished[first:last, CHORD].tolist() == [chord] * (last - first)
        assert wished[first:last, CHORD_TRUST].tolist() == [trust] * (last - first)
        same_tempo[first:last] = wished[first:last]
    assert torch.equal(wished, same_tempo)  # what the chart leaves out, or calls "X", is as it was read
    assert np.flatnonzero(find_rests(wished)).tolist() == [*range(50, 75)]
    told = describe_plan(plan)
    assert told is not None and told["tempo_bpm"] == pytest.approx(100)
    assert told["bar_lines_seconds"] == pytest.approx([1.3, 3.7, 6.1, 8.5, 10.9])
    assert find_beats(plan)[:3].tolist() == pytest.approx([0.1, 0.7, 1.3])
    assert told["half_or_double"] is None
    assert told["keys"] is None  # one tone for ever: nobody sings
    assert told["trust"]["bars"] == 0 and 0 < told["trust"]["chords"] <= 1
    assert replace(plan, has_singer=True) and describe_plan(replace(plan, has_singer=True))["keys"] == [
        [0.0, 12.0, "Eb:min"]
    ]
    assert wishes.warnings == (
        "the band knows major and minor chords only and plays the nearest: C:sus4 as C:maj",
        "most of the chords are not in Eb:min; the chords are played, the key where they end",
    )
    assert SheetWishes(key="G", chart=chart[:1]).warnings == ()
    assert SheetWishes(chart=chart[:2]).warnings == ()


def test_a_meter_that_the_band_does_not_know_is_told(lm: DualTrackLM) -> None:
    class InThree(SheetReader):
        """Says always the same: waltz time, bars of 60 frames."""

        def forward(self, codes: torch.Tensor) -> dict[str, torch.Tensor]:
            told = super().forward(codes)
            place = torch.full_like(told["place"], -12.0)
            place[:, :, METERS.index(4)] = -6.0
            places = (torch.arange(codes.shape[1]) % 60 * PLACES // 60)[None].expand(len(codes), -1)
            place[:, :, METERS.index(3)] = torch.where(torch.arange(PLACES) == places[..., None], -0.1, -6.0)
            return {**told, "place": place}

    sizes = SheetReaderConfig(vocal_codes=11, code_dim=4, dim=8, dilations=(1,), meters=(3, 4))
    lm.add_sheet_reader(InThree(sizes))
    song = torch.arange(1_500) % 11, 60 + np.sin(np.arange(3_000)), RATE_HZ
    plan = make_plan(lm, *song, SheetWishes())
    assert plan is not None and (plan.sung_beats_per_bar, plan.time_line.beats_per_bar) == (3, 4)
    plan = replace(plan, has_singer=True)
    assert "bars of 3 beats; the band knows none of these and plays bars of 4" in plan.warnings[0]
    asked = make_plan(lm, *song, SheetWishes(beats_per_bar=3))
    assert asked is not None and asked.sung_beats_per_bar is None


def test_the_plan_goes_on_from_a_given_start(lm: DualTrackLM) -> None:
    codes, pitches = torch.arange(250) % 11, np.full(500, np.nan)
    times = torch.arange(4 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    triad = sum(torch.sin(2 * torch.pi * hz * times) for hz in (261.63, 329.63, 392.0))
    for late in (0.1, 0.35):  # beats at 90 BPM
        start = 0.1 * triad * torch.exp(-12 * ((times - late) % (60 / 90)))
        plan = make_plan(
            add_reader(lm), codes, pitches, RATE_HZ, SheetWishes(tempo_bpm=90), start.expand(2, -1)
        )
        assert plan is not None
        beats = (plan.time_line.beats / RATE_HZ - late) * 90 / 60
        assert np.abs(beats - beats.round()).max() < 0.1
        assert (plan.sheet[:80, CHORD] == 0).float().mean() > 0.9 and [key % 12 for *_, key in plan.keys] == [
            0
        ]


def test_the_band_rests_where_no_chord_is_written() -> None:
    sheet = unknown_sheet(100)
    sheet[:, CHORD] = NO_CHORD
    sheet[:, CHORD_TRUST] = WRITTEN - 1  # read, not written: it plays
    wave = torch.ones(2, 4 * SAMPLE_RATE_HZ)
    assert keep_rests(wave, sheet, RATE_HZ) is wave and keep_rests(wave, None, RATE_HZ) is wave
    for first, last in ((0, 10), (25, 50), (60, 61), (90, 100)):
        sheet[first:last, CHORD_TRUST] = WRITTEN
    rested = keep_rests(wave, sheet, RATE_HZ)
    at = {second: rested[:, round(second * SAMPLE_RATE_HZ)].tolist() for second in (0, 0.39, 0.41, 1.3, 1.9)}
    assert at[0] == at[1.3] == at[1.9] == [0, 0] and at[0.41] == [1, 1] and 0 < at[0.39][0] < 1
    assert (wave == 1).all() and (rested[:, -int(0.2 * SAMPLE_RATE_HZ) :] == 0).all()
    assert (rested[:, round(2.0 * SAMPLE_RATE_HZ) : round(2.4 * SAMPLE_RATE_HZ)] == 1).all()
    # Nothing clicks: no sample is far from the one before.
    assert rested.diff(dim=1).abs().max() < 2 / (0.02 * SAMPLE_RATE_HZ)


def test_a_model_without_sheets_takes_no_wishes(lm: DualTrackLM) -> None:
    song = torch.zeros(10).long(), np.full(20, 60.0), RATE_HZ
    assert make_plan(lm, *song, SheetWishes()) is None
    assert describe_plan(None) is None and len(find_beats(None)) == 0
    with pytest.raises(ConfigError, match="leave out --tempo, --key, --downbeat, --chords"):
        make_plan(lm, *song, SheetWishes(tempo_bpm=100))


@pytest.mark.parametrize("tempo", [0.0, 54.0, 300.0, float("nan")])
def test_impossible_tempi_are_refused(tempo: float) -> None:
    with pytest.raises(ConfigError, match="from 55 to 210"):
        SheetWishes(tempo_bpm=tempo)


def test_impossible_keys_and_downbeats_are_refused() -> None:
    with pytest.raises(DataError, match="'H:moll' is no key; write it as C, Am"):
        SheetWishes(key="H:moll")
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="downbeat must be at 0 s or later"):
            SheetWishes(downbeat_seconds=seconds)
