"""Tempo and chords that are known beforehand, and the lead sheet in the report."""

from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.sheet.bars import places_between
from duotok.lm.sheet.columns import CHORD, CHORD_TRUST, PLACE, UNKNOWN, WRITTEN, unknown_sheet
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.accompany.wishes import SheetWishes, describe_sheet, make_sheet, read_chart
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.music.chord_names import NO_CHORD

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


def test_a_chart_is_read(tmp_path: Path) -> None:
    path = tmp_path / "song.lab"
    path.write_text("0.0 2.4 C:maj\n\n2.4\t4.8\tA:min7\n4.8 6 N\n", encoding="utf-8")
    assert read_chart(path) == [(0.0, 2.4, "C:maj"), (2.4, 4.8, "A:min7"), (4.8, 6.0, "N")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no chords"),
        ("0 2 C:maj\n2 4\n", "line 2: '2 4' is not 'start end chord'"),
        ("0 2 H:maj\n", "line 1: '0 2 H:maj' is not"),
        ("a 2 C:maj\n", "line 1"),
        ("3 2 C:maj\n", "line 1: a chord must begin at 0 or later and end after that"),
        ("0 nan C:maj\n", "line 1: a chord must"),
        ("0 inf C:maj\n", "line 1: a chord must"),
    ],
)
def test_bad_charts_are_refused_by_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "song.lab"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_chart(path)


def test_files_that_are_no_charts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the chords"):
        read_chart(tmp_path / "nothing.lab")
    (tmp_path / "sound.wav").write_bytes(b"RIFF\xff\xfe\xfd")
    with pytest.raises(DataError, match="no text in UTF-8"):
        read_chart(tmp_path / "sound.wav")
    (tmp_path / "long.lab").write_bytes(b"0 1 C:maj\n" * 100_001)
    with pytest.raises(DataError, match="too long"):
        read_chart(tmp_path / "long.lab")


def test_wishes_take_the_place_of_what_is_read(lm: DualTrackLM) -> None:
    codes = torch.randint(0, 11, (300,))
    plain = make_sheet(add_reader(lm), codes, RATE_HZ, SheetWishes())
    assert plain is not None
    chart = [(1.0, 2.0, "E:min"), (2.0, 3.0, "N"), (3.0, 4.0, "C:sus4"), (11.0, 90.0, "G:maj")]
    wished = make_sheet(lm, codes, RATE_HZ, SheetWishes(tempo_bpm=100, chart=chart))
    assert wished is not None
    assert wished[25:50, CHORD].tolist() == [12 + 4] * 25
    assert wished[50:75, CHORD].tolist() == [NO_CHORD] * 25
    assert wished[75:100, CHORD].tolist() == [UNKNOWN] * 25  # neither major nor minor: the band may choose
    assert wished[275:, CHORD].tolist() == [7] * 25
    told = describe_sheet(wished, RATE_HZ)
    assert told is not None and told["tempo_bpm"] == pytest.approx(100, rel=0.03)
    assert wished[25:50, CHORD_TRUST].tolist() == [WRITTEN] * 25
    assert wished[75:100, CHORD_TRUST].tolist() == [UNKNOWN] * 25
    assert 0 <= told["trust"]["bars"] < 1 and 0 < told["trust"]["chords"] <= 1
    assert ["?"] == [name for start, _, name in told["chords"] if start == 3.0]


def test_a_model_without_sheets_takes_no_wishes(lm: DualTrackLM) -> None:
    assert make_sheet(lm, torch.zeros(10).long(), RATE_HZ, SheetWishes()) is None
    assert describe_sheet(None, RATE_HZ) is None
    with pytest.raises(ConfigError, match="leave out --tempo and --chords"):
        make_sheet(lm, torch.zeros(10).long(), RATE_HZ, SheetWishes(tempo_bpm=100))


@pytest.mark.parametrize("tempo", [0.0, 54.0, 300.0, float("nan")])
def test_impossible_tempi_are_refused(tempo: float) -> None:
    with pytest.raises(ConfigError, match="from 55 to 210"):
        SheetWishes(tempo_bpm=tempo)


def test_bar_lines_and_tempo_are_told() -> None:
    sheet = unknown_sheet(210)
    sheet[:, PLACE] = torch.from_numpy(places_between(np.arange(10, 211, 50.0), 210))
    told = describe_sheet(sheet, RATE_HZ)
    assert told is not None
    assert told["bar_lines_seconds"] == [2.4, 4.4, 6.4]
    assert told["tempo_bpm"] == 120
    assert told["chords"] == [[0.0, 8.4, "?"]]
    empty = describe_sheet(unknown_sheet(0), RATE_HZ)
    assert empty is not None and empty["tempo_bpm"] is None
