"""POP909 (Wang et al. 2020): pop melodies with piano arrangement, beats, chords and keys, by song number."""

import io
import re
from pathlib import Path

import mido
import numpy as np

from duotok.recipes.corpus.scores.song import Note, Song, Songs, Span, make_monophonic
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import name_note, parse_root

SPLIT_SONGS = {"train": range(1, 819), "validation": range(819, 864), "test": range(864, 910)}
SONG_FILES = ("beat_midi.txt", "chord_midi.txt", "key_audio.txt")
MEMBER = re.compile(r"(?:^|/)(\d{3})/(\d{3}\.mid|beat_midi\.txt|chord_midi\.txt|key_audio\.txt)$")
LONGEST_PEDAL_SECONDS = 2.0


class Pop909(Songs):
    """The songs among the files (path -> content) of a POP909 folder or tar.gz."""

    source = "pop909"

    def __init__(self, path: Path, files: dict[str, bytes]) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        for file, content in files.items():
            if match := MEMBER.search(file):
                self.files.setdefault((match[1], match[2]), content)
        songs = {song for song, _ in self.files}
        complete = [song for song in songs if all((song, name) in self.files for name in _files_of(song))]
        super().__init__(path, sorted(complete))

    def split_of(self, name: str) -> str:
        """By the song's number."""
        return next((split for split, songs in SPLIT_SONGS.items() if int(name) in songs), "train")

    def read(self, name: str) -> Song:
        """Parse one song; raises DataError naming the song when a file of it is broken."""
        try:
            return _parse_song(name, {file: self.files[name, file] for file in _files_of(name)})
        except (OSError, EOFError, ValueError, IndexError, KeyError) as error:
            raise DataError(f"song {name} of {self.path} is broken: {error}") from error


def _files_of(name: str) -> tuple[str, ...]:
    return (*SONG_FILES, f"{name}.mid")


def _parse_song(name: str, files: dict[str, bytes]) -> Song:
    beats, marks = [], []
    for line in files["beat_midi.txt"].decode().splitlines():
        if line.strip():
            time, simple, compound = (float(value) for value in line.split())
            beats.append(time)
            marks.append((simple > 0, compound > 0))
    if len(beats) < 16:
        raise ValueError(f"only {len(beats)} beats")
    if any(later <= earlier for earlier, later in zip(beats, beats[1:], strict=False)):
        raise ValueError("the beats are not in order")
    simple, compound = (np.flatnonzero([mark[column] for mark in marks]) for column in (0, 1))
    # The compound column has a downbeat every six beats where the simple one counts in three: bars of 3/4.
    in_three = len(simple) > 2 and np.median(np.diff(simple)) == 3
    downbeats = tuple((simple if in_three or len(compound) < 2 else compound).tolist())
    # In some songs the first beat is marked as a downbeat outside the metre.
    if len(downbeats) > 2 and downbeats[1] - downbeats[0] != downbeats[2] - downbeats[1]:
        downbeats = downbeats[1:]
    if not downbeats:
        raise ValueError("no downbeats")
    tracks = _read_tracks(files[f"{name}.mid"])
    if not tracks.get("MELODY"):
        raise ValueError("no MELODY track")
    piano = sorted(tracks.get("PIANO", []) + tracks.get("BRIDGE", []), key=lambda note: note.start)
    return Song(
        name=name,
        beats_per_bar=3 if in_three else 4,
        melody=tuple(make_monophonic(tracks["MELODY"])),
        piano=tuple(piano),
        beats=tuple(beats),
        downbeats=downbeats,
        chords=tuple(_read_spans(files["chord_midi.txt"])),
        keys=tuple(_read_spans(files["key_audio.txt"])),
    )


def _read_spans(content: bytes) -> list[Span]:
    spans = []
    for line in content.decode().splitlines():
        if line.strip():
            start, end, label = line.split()
            if label != "N":
                root, _, quality = label.partition(":")
                label = f"{name_note(parse_root(root))}:{quality or 'maj'}"
            spans.append(Span(start=float(start), end=float(end), label=label))
    return spans


def _read_tracks(content: bytes) -> dict[str, list[Note]]:
    """Notes by track name, in seconds, with the sustain pedal written out into the durations."""
    midi = mido.MidiFile(file=io.BytesIO(content), clip=True)
    tempos = [(0, 500_000)]
    for track in midi.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                tempos.append((tick, message.tempo))
    tempos.sort(key=lambda tempo: tempo[0])
    ticks = np.array([tempo[0] for tempo in tempos], dtype=float)
    rates = np.array([tempo[1] for tempo in tempos]) / 1e6 / midi.ticks_per_beat  # seconds per tick
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(ticks) * rates[:-1])])

    def to_seconds(tick: int) -> float:
        index = int(np.searchsorted(ticks, tick, side="right")) - 1
        return float(seconds[index] + (tick - ticks[index]) * rates[index])

    tracks: dict[str, list[Note]] = {}
    for track in midi.tracks:
        tick, held, down = 0, {}, None
        notes: list[list[float]] = []  # start, end, pitch, velocity
        pedals: list[tuple[float, float]] = []
        for message in track:
            tick += message.time
            if message.type == "note_on" and message.velocity > 0:
                held.setdefault(message.note, []).append((tick, message.velocity))
            elif message.type in ("note_off", "note_on") and held.get(message.note):
                start, velocity = held[message.note].pop(0)
                if tick > start:
                    notes.append([to_seconds(start), to_seconds(tick), message.note, velocity])
            elif message.type == "control_change" and message.control == 64:
                if message.value >= 64 and down is None:
                    down = to_seconds(tick)
                elif message.value < 64 and down is not None:
                    pedals.append((down, to_seconds(tick)))
                    down = None
        tracks[track.name] = _apply_pedal(notes, pedals)
    return tracks


def _apply_pedal(notes: list[list[float]], pedals: list[tuple[float, float]]) -> list[Note]:
    notes = sorted(notes)
    next_start: dict[int, float] = {}
    starts = np.array([pedal[0] for pedal in pedals])
    result = []
    for start, end, pitch, velocity in reversed(notes):
        index = int(np.searchsorted(starts, end, side="right")) - 1 if len(pedals) else -1
        if index >= 0 and end < pedals[index][1]:
            end = min(pedals[index][1], end + LONGEST_PEDAL_SECONDS)
        end = max(min(end, next_start.get(int(pitch), end)), start + 0.02)
        next_start[int(pitch)] = start
        result.append(Note(start=start, end=end, pitch=int(pitch), velocity=int(velocity)))
    return result[::-1]
