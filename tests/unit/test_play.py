"""Scores as sound: fonts, edited scores under the singer, and what cannot be played."""

from pathlib import Path

import mido
import numpy as np
import pytest
import soundfile

from duotok.recipes.accompany import play
from duotok.recipes.accompany.export import LEAD, Outline, write_midi
from duotok.renderer import sound_font
from duotok.renderer.sound_font import Part, Players
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.score_reader import Note

pytest.importorskip("tinysoundfont", reason="tinysoundfont is not installed")
SECONDS = 4.0


def strongest_hz(wave: np.ndarray) -> float:
    mono = wave.sum(axis=0) * np.hanning(wave.shape[-1])
    return float(np.abs(np.fft.rfft(mono)).argmax() * SAMPLE_RATE_HZ / wave.shape[-1])


@pytest.mark.parametrize("ending", ["sf2", "sfz"])
def test_parts_are_played_in_time_and_tune(font, tmp_path, monkeypatch, ending):
    if ending == "sfz":
        pytest.importorskip("pysfizz")
        monkeypatch.setattr(sound_font, "SOUND_FONT_FOLDERS", (str(font.parent),))
        time = np.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
        soundfile.write(tmp_path / "a.wav", 0.3 * np.sin(2 * np.pi * 440 * time), SAMPLE_RATE_HZ)
        font = tmp_path / "a.sfz"
        font.write_text("<region> sample=a.wav lokey=0 hikey=127 pitch_keycenter=69")
    notes = [(0.5, 1.0, 57, 100), (2.0, 2.5, 81, 100), (9.0, 9.5, 60, 100)]
    parts = {"keys": Part(program=4, notes=notes), "drums": Part(program=40, is_drums=True, notes=notes)}
    waves = Players(font).play({**parts, "bass": Part(program=33)}, SECONDS)
    assert set(waves) == {"keys", "drums"}
    for wave in waves.values():
        assert wave.shape == (2, round(SECONDS * SAMPLE_RATE_HZ)) and wave.dtype == np.float32
        assert not np.abs(wave[:, :23_900]).any() and np.abs(wave[:, 24_000:25_000]).max() > 0.01
        for start, pitch_hz in ((0.55, 220), (2.05, 880)):
            first = round(start * SAMPLE_RATE_HZ)
            assert strongest_hz(wave[:, first : first + 16_000]) == pytest.approx(pitch_hz, abs=4)


def test_an_installed_font_is_found(font, monkeypatch, tmp_path):
    monkeypatch.setattr(sound_font, "SOUND_FONT_FOLDERS", (str(tmp_path), str(font.parent)))
    assert sound_font.find_sound_font() == font
    monkeypatch.setattr(sound_font, "SOUND_FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match="no sound font in"):
        sound_font.find_sound_font()


@pytest.fixture
def song(tmp_path) -> dict[str, Path]:
    """A singer of four seconds, and a score whose tempo changes on the way."""
    time = np.arange(round(SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    paths = {"vocal": tmp_path / "song.wav", "score": tmp_path / "song.mid"}
    soundfile.write(paths["vocal"], 0.2 * np.sin(2 * np.pi * 300 * time), SAMPLE_RATE_HZ)
    beats = np.concatenate([np.arange(0, 2, 0.5), np.arange(2, 5.3, 0.8)])
    outline = Outline(
        beats=beats, bars=[(0, 4), (4, 4)], has_pickup=False, beat_ticks=480, chords=[], keys=[],
        seconds=SECONDS, trust=1.0, style="soul",
    )  # fmt: skip
    score = {
        "drums": [Note(beat, beat + 0.1, 36, 100) for beat in beats[:6].tolist()],
        "bass": [Note(0.0, 1.9, 45, 90)],
        "other": [Note(2.4, 3.6, 69, 90)],
    }
    write_midi(paths["score"], outline, score, [Note(0.0, 4.0, 72, 90)])
    return paths


def run(song: dict[str, Path], out: Path, *more: object) -> int:
    options = [part for name, path in song.items() for part in (f"--{name}", str(path))]
    return play.main([*options, "--out", str(out), *map(str, more)])


def test_an_edited_score_comes_back_as_sound(song, font, tmp_path, capsys):
    parts = play.read_score(song["score"])
    assert list(parts) == ["drums", "bass", "keys"] and parts["drums"].is_drums
    assert [start for start, *_ in parts["drums"].notes] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.8], abs=2e-3)
    assert parts["keys"].program == 4 and parts["keys"].notes[0][:2] == pytest.approx((2.4, 3.6), abs=2e-3)
    file = mido.MidiFile(song["score"])
    for track in file.tracks:
        for place, message in enumerate(track):
            if message.type in ("note_on", "note_off") and track.name == "keys":
                track[place] = message.copy(note=message.note + 12)
    file.save(song["score"])
    assert run(song, tmp_path / "out", "--font", font) == 0
    sounds = {
        path.stem: soundfile.read(path, always_2d=True)[0].T for path in (tmp_path / "out").glob("*.wav")
    }
    assert {wave.shape for wave in sounds.values()} == {(2, round(SECONDS * SAMPLE_RATE_HZ))}
    assert strongest_hz(sounds["played-keys"][:, 120_000:160_000]) == pytest.approx(880, abs=4)
    assert not sounds["played-keys"][:, :100_000].any()
    together = sum(sounds[f"played-{name}"] for name in parts)
    assert np.abs(together - sounds["accompaniment"]).max() < 0.01
    assert LEAD not in "".join(sounds) and np.abs(sounds["mix"] - sounds["accompaniment"]).max() > 0.1
    assert run(song, tmp_path / "out", "--font", font, "--format", "flac") == 0  # it may replace its own
    assert not (tmp_path / "out" / "mix.wav").exists() and "1 of keys" in capsys.readouterr().out


def test_the_model_plays_what_the_font_played(song, font, tiny_bundle, tmp_path):
    assert run(song, tmp_path / "font", "--font", font) == 0
    assert run(song, tmp_path / "model", "--font", font, "--neural", "--model", tiny_bundle) == 0
    sounds = [soundfile.read(tmp_path / name / "accompaniment.wav")[0] for name in ("font", "model")]
    assert sounds[0].shape == sounds[1].shape and np.abs(sounds[0] - sounds[1]).max() > 0.01
    assert (tmp_path / "model" / "played-bass.wav").exists()


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"score": b"no midi"}, "no MIDI file"),
        ({"score": b"MThd\0\0\0\6\0\1\0\1\0\0MTrk\0\0\0\4\0\xff\x2f\0"}, "no MIDI file"),
        ({"score": None}, "does not exist"),
        ({"notes": False}, "has no notes"),
        ({"vocal": b"RIFF"}, "song.wav"),
        ({"options": ("--font", "missing.sf3")}, "missing.sf3 does not exist"),
        ({"options": ("--level", "99")}, "--level"),
    ],
)
def test_what_cannot_be_played_is_one_line(song, font, tmp_path, capsys, broken, message):
    for name in {"score", "vocal"} & set(broken):
        song[name].unlink()
        if broken[name] is not None:
            song[name].write_bytes(broken[name])
    if "notes" in broken:
        file = mido.MidiFile(song["score"])
        file.tracks[:] = [track for track in file.tracks if track.name in ("song", LEAD)]
        file.save(song["score"])
    options = broken.get("options", ("--font", font))
    assert run(song, tmp_path / "out", *options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_that_is_no_font_is_told(song, tmp_path, capsys):
    (tmp_path / "x.sf2").write_bytes(b"RIFF")
    assert run(song, tmp_path / "out", "--font", tmp_path / "x.sf2") == 1
    assert "not a sound font" in capsys.readouterr().err
