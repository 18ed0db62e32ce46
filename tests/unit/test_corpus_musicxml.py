"""Songs from made-up MusicXML: what is played, sung and left out."""

import io
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest

from duotok.recipes.corpus.scores.musicxml import count_beats, parse_song, tempo_of
from duotok.recipes.corpus.scores.song import Song
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.tokenizer.common.errors import DataError

C = "<harmony><root><root-step>C</root-step></root><kind>major</kind></harmony>"
TEMPO = '<direction><direction-type><words>x</words></direction-type><sound tempo="120"/></direction>'


def note(step: str = "C", eighths: int = 2, text: str = "", voice: int = 1, more: str = "") -> str:
    lyric = f"<lyric><syllabic>{more or 'single'}</syllabic><text>{text}</text></lyric>" if text else ""
    return (
        f"<note><pitch><step>{step}</step><octave>5</octave></pitch><duration>{eighths}</duration>"
        f"<voice>{voice}</voice>{lyric}</note>"
    )


def write(bars: list[str], meter: str = "4/4", piano: list[str] | None = None) -> bytes:
    """A score of these bars, divisions in eighths; 120 quarters a minute unless the first bar has words."""
    beats, _, unit = meter.partition("/")
    head = f"<attributes><divisions>2</divisions><key><fifths>0</fifths></key><time><beats>{beats}</beats>"
    head += f"<beat-type>{unit}</beat-type></time>"
    parts = {"P1": [head + "</attributes>" + bars[0], *bars[1:]]}
    if piano:
        parts["P2"] = [head + "<staves>2</staves></attributes>" + piano[0], *piano[1:]]
    names = "".join(f'<score-part id="{name}"><part-name>x</part-name></score-part>' for name in parts)
    body = "".join(
        f'<part id="{name}">'
        + "".join(f'<measure number="{index}">{bar}</measure>' for index, bar in enumerate(each))
        + "</part>"
        for name, each in parts.items()
    )
    return f'<score-partwise version="4.0"><part-list>{names}</part-list>{body}</score-partwise>'.encode()


def read(bars: list[str], meter: str = "4/4", piano: list[str] | None = None) -> Song:
    return parse_song("song", "openewld", write(bars, meter, piano))


FOUR = C + note() * 4


def test_a_pick_up_ends_where_the_first_bar_begins():
    song = read([TEMPO + note("G", 3), *[FOUR] * 4])
    assert song.beats[:4] == (0.0, 0.5, 1.0, 1.5) and song.downbeats[:2] == (2, 6)
    assert [(n.start, n.pitch) for n in song.melody[:2]] == [(0.25, 79), (1.0, 72)]
    assert [chord.label for chord in song.chords] == ["N", "C:maj"] and song.chords[1].start == 1.0


def test_repeats_endings_and_verses_are_sung_out():
    verses = "".join(f'<lyric number="{n}"><text>{text}</text></lyric>' for n, text in ((1, "a"), (2, "b")))
    opens = '<barline location="left"><repeat direction="forward"/></barline>'

    def ending(number: int, side: str, kind: str, repeat: str = "") -> str:
        return f'<barline location="{side}"><ending number="{number}" type="{kind}"/>{repeat}</barline>'

    def bar(step: str) -> str:
        return note(step) * 4

    bars = [
        TEMPO + C + bar("C"),
        opens + bar("D").replace("</note>", verses + "</note>"),
        ending(1, "left", "start") + bar("E") + ending(1, "right", "stop", '<repeat direction="backward"/>'),
        ending(2, "left", "start") + bar("F") + ending(2, "right", "stop"),
        C + bar("G"),
    ]
    song = read(bars)
    assert [n.pitch for n in song.melody[::4]] == [72, 74, 76, 74, 77, 79]
    assert [n.text for n in song.melody[::4]] == ["", "a", "-", "b", "-", "-"]
    assert song.downbeats == tuple(range(0, 24, 4))


@pytest.mark.parametrize(
    ("meter", "eighths", "beats", "seconds"),
    [("6/8", 6, 6, 0.25), ("12/8", 12, 4, 0.75), ("3/4", 6, 3, 0.5), ("2/4", 4, 2, 0.5), ("3/8", 3, 3, 0.25)],
)
def test_beats_are_those_of_the_meter(meter: str, eighths: int, beats: int, seconds: float):
    song = read([TEMPO + C + note("E", 1) * eighths, *[C + note("C", 1) * eighths] * 5], meter)
    assert song.beats_per_bar == beats and song.beats[1] == pytest.approx(seconds)
    assert set(pairwise(song.downbeats)) == {(n * beats, (n + 1) * beats) for n in range(5)}


def test_beats_are_counted_as_they_are_felt():
    assert [count_beats((4, 4), bpm) for bpm in (50, 120, 200)] == [(4, 1), (4, 1), (2, 2)]
    assert [count_beats((2, 2), bpm) for bpm in (100, 140)] == [(4, 1), (2, 2)]


def test_of_two_voices_the_upper_one_is_sung_with_its_words():
    lower = "<backup><duration>8</duration></backup>" + note("D", 8, voice=2)
    bar = C + note("G", 2, "ro", more="begin") + note("A", 2) + note("F", 4, "ses", more="end") + lower
    song = read([TEMPO + bar, *[bar] * 5])
    assert [(n.pitch, n.text) for n in song.melody[:3]] == [(79, "ro-"), (81, "-"), (77, "ses")]
    assert len(song.melody) == 18


def test_chords_are_estimated_from_the_piano_and_the_key_from_them():
    def chord(*steps: str) -> str:
        return "".join(
            note(s, 8).replace("<note>", "<note>" + "<chord/>" * (i > 0)) for i, s in enumerate(steps)
        )

    piano = [chord("C", "E", "G"), chord("F", "A", "C"), chord("G", "B", "D", "F"), chord("C", "E", "G")]
    song = read([TEMPO + note(text="la") * 4, *(note(step) * 4 for step in "AGC")], piano=piano)
    assert [span.label for span in song.chords] == ["C:maj", "F:maj", "G:7", "C:maj"]
    assert [span.label for span in song.keys] == ["C:maj"] and len(song.piano) == 13


@pytest.mark.parametrize(
    ("words", "lowest", "highest"),
    [("Andante", 70, 80), ("Sehr langsam", 40, 58), ("Nicht zu schnell", 95, 125), ("Très vite", 129, 150)],
)
def test_a_tempo_in_words_becomes_beats(words: str, lowest: float, highest: float):
    assert lowest <= (tempo_of(words) or 0) <= highest
    song = read([TEMPO.replace("x<", words + "<").replace('<sound tempo="120"/>', "") + FOUR, *[FOUR] * 4])
    assert 60 / song.beats[1] == pytest.approx(tempo_of(words), rel=1e-3)


def test_a_tempo_that_nobody_says_is_drawn_by_name():
    tempos = {60 / parse_song(name, "openewld", write([FOUR] * 5)).beats[1] for name in "abcdef"}
    assert len(tempos) > 2 and all(79.9 <= tempo <= 126.1 for tempo in tempos)
    assert tempo_of("Chorus") is None


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no xml", "broken MusicXML"),
        (b"PK\x03\x04broken", "broken MusicXML"),
        (b"<html/>", "html"),
        (b'<!DOCTYPE a [<!ENTITY b "c">]><score-partwise/>', "entities"),
        (b"<score-partwise><part-list/></score-partwise>", "no bars"),
        (write([FOUR] * 5, "5/4"), "5/4"),
        (write([FOUR]), "only 4 notes"),
        (write([note() * 4] * 5), "neither chord symbols nor a piano"),
        (write([FOUR] * 5).replace(b"<time>", b"<staves>2</staves><time>"), "a keyboard"),
        (write(["<note><rest/><duration>8</duration></note>"] * 5), "no melody"),
    ],
)
def test_what_cannot_be_sung_is_one_line_with_its_name(tmp_path: Path, content: bytes, reason: str):
    (tmp_path / "bad.musicxml").write_bytes(content)
    (tmp_path / "good.musicxml").write_bytes(write([FOUR] * 5))
    songs = open_songs(tmp_path, tmp_path / "cache")
    for _ in range(2):  # read, and from the cache
        with pytest.raises(DataError, match=f"song bad .*{reason}"):
            songs.read("bad")
    assert songs.read("good") == songs.read("good") == open_songs(tmp_path).read("good")


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../score.xml", b" " * 21_000_000)
    (tmp_path / "bomb.mxl").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="larger than"):
        open_songs(tmp_path).read("bomb")


def test_splits_keep_titles_together_and_their_sizes(tmp_path: Path):
    for index in range(100):
        for composer in "ab":
            folder = tmp_path / composer
            folder.mkdir(exist_ok=True)
            (folder / f"Song_{index}.mxl").write_bytes(b"x")
    songs = open_songs(tmp_path)
    held_out = {split: songs.of_split(split) for split in ("train", "validation", "test")}
    assert [len(names) for names in held_out.values()] == [40, 80, 80] and songs.source == "openewld"
    assert all((name + "+" in names) for names in held_out.values() for name in names if "+" not in name)
