"""The whole corpus maker on a made-up song and voice: files, labels, resuming, refusals."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.corpus.popband import __main__ as popband
from duotok.recipes.corpus.popband.rendering import ItemMaker, Order
from duotok.recipes.corpus.popband.voicebank import (
    BANDS,
    NOISE_BANDS,
    Syllable,
    VoiceBank,
    bank_path,
    save_bank,
)
from duotok.recipes.corpus.popband.voices import VOICES
from duotok.recipes.corpus.scores import song as scores
from duotok.recipes.lm.tokenize import encode_items, read_waves
from duotok.recipes.lm.tokens import TokenShards
from duotok.renderer.sound_font import find_sound_font
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import DuoTokenizer

PHRASES = 1


@pytest.fixture(scope="module")
def sound_font() -> Path:
    pytest.importorskip("tinysoundfont", reason="tinysoundfont is not installed")
    try:
        return find_sound_font()
    except DataError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with one song of 80 s in every split; each beat lasts 0.5 s."""
    midi = mido.MidiFile(ticks_per_beat=480)
    for name, pitches, length in (("MELODY", (60, 62, 64, 67), 440), ("PIANO", (48, 52, 55, 60), 460)):
        track = mido.MidiTrack([mido.MetaMessage("track_name", name=name)])
        for beat in range(160):
            pitch = pitches[beat // 3 % 4]
            track.append(mido.Message("note_on", note=pitch, velocity=80, time=480 - length if beat else 0))
            track.append(mido.Message("note_off", note=pitch, time=length))
        midi.tracks.append(track)
    buffer = io.BytesIO()
    midi.save(file=buffer)
    beats = "\n".join(f"{0.5 * beat} {float(beat % 2 == 0)} {float(beat % 4 == 0)}" for beat in range(160))
    chords = "\n".join(f"{4.0 * n} {4.0 * n + 4} {('C:maj', 'A:min')[n % 2]}" for n in range(20))
    files = {"beat_midi.txt": beats, "chord_midi.txt": chords, "key_audio.txt": "0.0 80.0 C:maj"}
    path = tmp_path_factory.mktemp("songs") / "songs.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for song in ("001", "819", "864"):
            content = {name: text.encode() for name, text in files.items()} | {
                f"{song}.mid": buffer.getvalue()
            }
            for name, data in content.items():
                member = tarfile.TarInfo(f"pop909/{song}/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which every voice has the same made-up bank of one vowel."""
    folder = tmp_path_factory.mktemp("voices")
    bank = VoiceBank(
        rate_hz=24_000,
        envelope=np.tile(-8 - np.linspace(0, 6, BANDS), (200, 1)).astype(np.float16),
        noise=np.tile(np.linspace(0, 0.4, NOISE_BANDS), (200, 1)).astype(np.float16),
        voiced=np.ones(200, bool),
        syllables=(Syllable(phrase=0, onset=0.1, vowel_start=0.15, vowel_end=0.6, coda=0.65, text="la"),),
    )
    for voice in VOICES:
        save_bank(bank_path(folder, voice, PHRASES), bank)
    return folder


def make_maker(songs: Path, voices: Path, sound_font: Path, out: Path, **order) -> ItemMaker:
    settings = Order(
        songs=songs,
        out=out,
        split="train",
        seed=1,
        sound_font=sound_font,
        voice_cache=voices,
        phrases=PHRASES,
        **order,
    )
    return ItemMaker(settings)


def test_an_item_depends_on_nothing_but_seed_split_and_index(
    songs: Path, voices: Path, sound_font: Path, tmp_path: Path
):
    maker = make_maker(songs, voices, sound_font, tmp_path / "a")
    first, second = maker.make(0), maker.make(1)
    # Rendered after another item or in a fresh place: the same labels and samples.
    maker.out = tmp_path / "b"
    again = maker.make(0)
    assert replace(again, root=first.root) == first and second.notes != first.notes
    for part in ("vocal", "drums", "bass", "other", "mix"):
        assert first.path(part).read_bytes() == again.path(part).read_bytes(), part
    stems = {part: soundfile.read(first.path(part), dtype="int16", always_2d=True)[0] for part in first.stems}
    mix, rate = soundfile.read(first.path("mix"), dtype="int16")
    assert rate == 48_000 and len(mix) == round(first.seconds * rate) and 30 <= first.seconds <= 60
    total = sum(np.broadcast_to(wave.astype(int), mix.shape) for wave in stems.values())
    assert np.array_equal(total, mix)
    assert all(np.abs(wave).max() > 300 for name, wave in stems.items() if name != "drums")
    tempo = 120 / 1.15, 120 * 1.15
    assert tempo[0] <= first.tempo_bpm <= tempo[1]
    assert np.diff(first.beats_seconds) == pytest.approx(60 / first.tempo_bpm, abs=2e-3)


def test_a_whole_song_is_one_item(
    songs: Path, voices: Path, sound_font: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scores, "SHORTEST_SONG_SECONDS", 70.0)
    maker = make_maker(songs, voices, sound_font, tmp_path, whole=True)
    assert maker.order.count_items() == 1
    item = maker.make(0)
    assert item.id == "train-whole-00000" and len(item.beats_seconds) == 160
    assert item.seconds == pytest.approx(83.0 * 120 / item.tempo_bpm, abs=0.2)
    tail = item.read("accompaniment", start_seconds=item.seconds - 1.5)
    assert tail[:, :4_800].abs().max() > 10 * tail[:, -480:].abs().max() > 0  # rings out, down to the room
    drums = item.read("drums", start_seconds=item.downbeats_seconds[-1] + 1.5, seconds=0.4)
    assert drums.abs().max() < item.read("drums").abs().max() / 4


def test_the_command_resumes_and_writes_whole_items(
    songs: Path, voices: Path, sound_font: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out = tmp_path / "corpus"
    command = ["--songs", str(songs), "--out", str(out), "--split", "test", "--workers", "1"]
    command += ["--voice-cache", str(voices), "--phrases", str(PHRASES), "--sound-font", str(sound_font)]
    leftover = out / "audio" / "test" / "test-00007.part"
    leftover.mkdir(parents=True)
    assert popband.main([*command, "--hours", "0.005"]) == 0
    (item,) = read_manifest(out / "test.jsonl")
    assert item.id == "test-00000" and item.song == "864"
    assert [path.name for path in (out / "audio" / "test").iterdir()] == ["test-00000"]
    assert popband.main([*command, "--hours", "0.005"]) == 0
    assert "0 new items" in capsys.readouterr().out
    assert popband.main([*command, "--hours", "0.1", "--whole"]) == 0  # the song has only 80 s
    told = capsys.readouterr()
    assert "0 new items" in told.out and "song 864 lasts 83 s; whole songs last 120 to 300 s" in told.err
    assert [path.name for path in (out / "audio" / "test").iterdir()] == ["test-00000"]


def test_tokens_are_those_of_the_audio_that_is_not_kept(
    songs: Path, voices: Path, sound_font: Path, tmp_path: Path, small_tokenizer_folder: Path, capsys
):
    maker = make_maker(songs, voices, sound_font, tmp_path, tokenizer=small_tokenizer_folder, name="a")
    assert maker.order.item_id(0) == "train-a-00000"
    audio, mix = maker.render(0)
    maker._write(audio.id, mix)
    waves = {track: wave[0] for track, wave in read_waves([audio]).items()}
    (expected,) = encode_items([waves], DuoTokenizer.from_pretrained(small_tokenizer_folder))
    item, codes = maker.encode(audio, mix)
    manifest, tokens = tmp_path / "train.jsonl", tmp_path / "tokens"
    kept = tmp_path / "kept"
    for _ in range(2):
        store = popband.Store(maker.order, tokens)
        store.add(item, codes)
        assert not manifest.exists()  # it waits for others
        store.write()
        assert read_manifest(manifest) == [item] == [replace(audio, mix="")] and item.band["bass"][0][2]
        shards = TokenShards(tokens)
        (song,) = shards.index.songs
        for track, rows in shards.codes(song).items():
            assert np.array_equal(rows, expected[track])
        manifest.rename(kept)  # as where a run ends between the shard and the manifest
    kept.rename(manifest)
    command = ["--songs", str(songs), "--out", str(tmp_path), "--hours", "0.005", "--phrases", str(PHRASES)]
    command += ["--voice-cache", str(voices), "--sound-font", str(sound_font)]
    encode = ["--name", "a", "--tokens", str(tokens), "--tokenizer", str(small_tokenizer_folder)]
    assert popband.main([*command, *encode]) == 0 and "0 new items" in capsys.readouterr().out
    assert popband.main(command) == 1 and "items without audio" in capsys.readouterr().err
    encode[3] += "2"
    assert popband.main([*command, *encode]) == 1 and "not all tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, status, message",
    [
        (["--songs", "missing.tar.gz"], 1, "missing.tar.gz"),
        (["--sound-font", "missing.sf2"], 1, "missing.sf2"),
        (["--hours", "0"], 2, "positive"),
        (["--tokens", "tokens"], 2, "belong together"),
        (["--name", "../a"], 2, "--name must be letters"),
        (["--split", "dev"], 2, "invalid choice"),
    ],
)
def test_bad_input_is_one_clear_line(
    songs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, change: list[str], status: int, message: str
):
    font = tmp_path / "font.sf2"
    font.write_bytes(b"")
    command = ["--songs", str(songs), "--out", str(tmp_path), "--hours", "1", "--sound-font", str(font)]
    try:
        result = popband.main([*command, *change])
    except SystemExit as exit_:
        result = exit_.code
    assert result == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_songs_of_a_meter_are_found_among_others(voices: Path, sound_font: Path, tmp_path: Path):
    note = "<note><pitch><step>C</step><octave>5</octave></pitch><duration>1</duration></note>"
    score = (
        '<score-partwise version="4.0"><part-list><score-part id="P1"><part-name>x</part-name></score-part>'
        '</part-list><part id="P1"><measure number="0"><attributes><divisions>1</divisions><time>'
        "<beats>{}</beats><beat-type>4</beat-type></time></attributes><harmony><root><root-step>C</root-step>"
        "</root><kind>major</kind></harmony>{}</measure>{}</part></score-partwise>"
    )
    folder = tmp_path / "scores"
    folder.mkdir()
    for title in range(100):  # of which 20 are to be trained on
        beats = (4, 3, 0)[title % 3]
        more = "".join(f'<measure number="{bar}">{note * beats}</measure>' for bar in range(1, 9))
        text = score.format(beats, note * beats, more) if beats else "broken"
        (folder / f"Song {title}.musicxml").write_text(text)
    maker = make_maker(folder, voices, sound_font, tmp_path / "out", meters=(3, 6))
    found = [maker.song(index) for index in range(8)]
    assert {song.beats_per_bar for song in found} == {3} and len({song.name for song in found}) > 2
    none = make_maker(folder, voices, sound_font, tmp_path / "out", meters=(2,))
    with pytest.raises(DataError, match="holds no train song of 2 beats"):
        none.song(0)
