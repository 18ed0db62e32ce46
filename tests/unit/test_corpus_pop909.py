"""POP909 songs from made-up archives: what is parsed, split and refused."""

import io
import tarfile
from pathlib import Path

import mido
import pytest

from duotok.recipes.corpus.scores.song import Note, make_monophonic
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.tokenizer.common.errors import DataError


def make_midi(pedal: bool = False) -> bytes:
    """C4 and D4 as melody, one piano note; 480 ticks = 0.5 s, then the tempo halves after 960 ticks."""
    midi = mido.MidiFile(ticks_per_beat=480)
    tempo = mido.MidiTrack(
        [
            mido.MetaMessage("set_tempo", tempo=500_000),
            mido.MetaMessage("set_tempo", tempo=1_000_000, time=960),
        ]
    )
    melody = mido.MidiTrack([mido.MetaMessage("track_name", name="MELODY")])
    for pitch in (60, 62):
        melody.append(mido.Message("note_on", note=pitch, velocity=90, time=480))
        melody.append(mido.Message("note_off", note=pitch, time=480))
    piano = mido.MidiTrack([mido.MetaMessage("track_name", name="PIANO")])
    if pedal:
        piano.append(mido.Message("control_change", control=64, value=127))
    piano.append(mido.Message("note_on", note=48, velocity=70))
    piano.append(mido.Message("note_on", note=48, velocity=0, time=240))
    if pedal:
        piano.append(mido.Message("control_change", control=64, value=0, time=720))
    midi.tracks += [tempo, melody, piano]
    buffer = io.BytesIO()
    midi.save(file=buffer)
    return buffer.getvalue()


def make_song(name: str = "001", **changes: bytes) -> dict[str, bytes]:
    beats = "\n".join(f"{0.5 * beat} {float(beat % 2 == 0)} {float(beat % 4 == 0)}" for beat in range(32))
    files = {
        f"{name}.mid": make_midi(),
        "beat_midi.txt": beats.encode(),
        "chord_midi.txt": b"0.0 8.0 N\n8.0 16.0 Gb:min7/b3\n",
        "key_audio.txt": b"0.0 16.0 Gb:maj\n",
    }
    return {f"pop909/{name}/{file}": content for file, content in (files | changes).items()}


def make_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_song_is_parsed_from_an_archive(tmp_path: Path):
    songs = open_songs(make_archive(tmp_path / "songs.tar.gz", make_song()))
    song = songs.read("001")
    assert [(note.pitch, note.start, note.end) for note in song.melody] == [(60, 0.5, 1.0), (62, 2.0, 3.0)]
    assert [(note.pitch, note.end) for note in song.piano] == [(48, 0.25)]
    assert song.downbeats == tuple(range(0, 32, 4))
    assert [chord.label for chord in song.chords] == ["N", "F#:min7/b3"]
    assert song.keys[0].label == "F#:maj"


def test_a_folder_reads_like_the_archive(tmp_path: Path):
    for name, content in make_song().items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    archive = open_songs(make_archive(tmp_path / "songs.tar.gz", make_song()))
    assert open_songs(tmp_path / "pop909").read("001") == archive.read("001")


def test_the_pedal_holds_notes(tmp_path: Path):
    files = make_song(**{"001.mid": make_midi(pedal=True)})
    song = open_songs(make_archive(tmp_path / "songs.tar.gz", files)).read("001")
    assert song.piano[0].end == pytest.approx(1.0)


def test_paths_outside_the_archive_and_links_reach_nothing(tmp_path: Path):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = make_archive(
        inside / "songs.tar.gz", make_song() | {"../../evil.txt": b"evil", "/abs/x.txt": b"x"}
    )
    with tarfile.open(path.with_name("links.tar.gz"), "w:gz") as archive:
        link = tarfile.TarInfo("pop909/001/001.mid")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    open_songs(path).read("001")
    with pytest.raises(DataError, match="no POP909 song"):
        open_songs(path.with_name("links.tar.gz"))
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["inside", "links.tar.gz", "songs.tar.gz"]


@pytest.mark.parametrize(
    "changes",
    [
        {"001.mid": b"MThd"},
        {"001.mid": b""},
        {"beat_midi.txt": b"0.0 1 1"},
        {"beat_midi.txt": b"\xff\xfe\x00"},
        {"chord_midi.txt": b"0.0 8.0\n"},
        {"chord_midi.txt": b"0.0 8.0 H:maj\n"},
    ],
)
def test_a_broken_song_is_named(tmp_path: Path, changes: dict[str, bytes]):
    songs = open_songs(make_archive(tmp_path / "songs.tar.gz", make_song(**changes)))
    with pytest.raises(DataError):
        songs.read("001")


def test_splits_go_by_song_number(tmp_path: Path):
    files = {key: value for name in ("818", "819", "864") for key, value in make_song(name).items()}
    songs = open_songs(make_archive(tmp_path / "songs.tar.gz", files))
    assert [songs.of_split(split) for split in ("train", "validation", "test")] == [["818"], ["819"], ["864"]]


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x1f\x8b\x08\x00broken"])
def test_a_broken_archive_is_named(tmp_path: Path, content: bytes):
    path = tmp_path / "songs.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="songs.tar.gz"):
        open_songs(path)


def test_a_melody_becomes_one_voice():
    def note(start: float, end: float, pitch: int) -> Note:
        return Note(start=start, end=end, pitch=pitch, velocity=80)

    line = make_monophonic([note(0.0, 1.0, 60), note(0.0, 1.0, 67), note(0.5, 0.9, 62), note(0.52, 0.6, 70)])
    assert [(n.start, n.end, n.pitch) for n in line] == [(0.0, 0.5, 67), (0.5, 0.9, 62)]
