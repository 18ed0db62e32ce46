"""The result as paper and machines take it: song.mid, lead-sheet.musicxml, chords.lab, click.wav.

All of it stands on the bars of the lead sheet (`lead_sheet` of report.json). Seconds are those of mix.wav;
what sounds before the first bar line is in a pick-up bar, so that files and waves begin together.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from duotok.recipes.accompany.output import EXPORTED, exported_name
from duotok.renderer.sound_font import Part
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio
from duotok.tokenizer.common.files import whole_file, write_text
from duotok.tokenizer.music.labels import NO_CHORD, count_fifths, key_of, name_chord, name_note, nearest_triad
from duotok.tokenizer.music.pitch import PITCH_RATE_HZ
from duotok.tokenizer.music.score_reader import Note, Score
from duotok.tokenizer.music.tuning import PitchClock

TICKS = 480  # of a quarter note
_LEAST_TRUST = 0.4  # in the bars, from which on the band's notes go to the grid
_OFF_GRID = 0.35  # sixteenths beside its usual place from which on a note stays as it was played
_LATE_SECONDS = 0.002  # by which a beat may be off before the tempo is corrected: the grid of report.json
_SAME_SECONDS = 0.02  # by which beats and bar lines may be rounded apart
_CHORD_SLACK_SECONDS = 0.05  # chords change in frames of 40 ms, but on beats
# General MIDI programs of kit, bass, keys in each style.
_PROGRAMS = {
    "ballad": (0, 32, 0), "rock": (16, 33, 29), "funk": (0, 36, 4), "bossa": (40, 32, 24),
    "reggae": (0, 33, 16), "electronic": (25, 38, 81), "folk": (40, 32, 25), "soul": (0, 33, 4),
    "disco": (0, 33, 0), "shuffle": (32, 32, 16),
}  # fmt: skip
_USUAL_PROGRAMS, _SINGER_PROGRAM = (0, 33, 0), 53
LEAD = "lead"  # the track of what is sung
_DRUM_CHANNEL = 9
_SHAKER, _TAMBOURINE = (
    70,
    54,
)  # all percussion is the first; MuseScore 3 has no place for it and takes the other
_SUNG_FRAMES = 4  # of the shortest note that is sung
_SUNG_SEMITONES = 0.7  # from the last note, from which on it is another: vibrato is none
_SUNG_VELOCITY = 90
_MIDDLE_C = 60
_WRITTEN_SIXTEENTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # lengths of one note, with a dot or without


@dataclass(frozen=True, kw_only=True)
class Outline:
    """The bars, chords and keys of a song on one time line, read from report.json."""

    beats: np.ndarray  # [beats] in seconds; the first at 0, the last at the end or behind it
    bars: list[tuple[int, int]]  # first beat and number of beats; the first may be a pick-up
    has_pickup: bool
    beat_ticks: int
    chords: list[tuple[float, float, int]]  # start, end, number of the chord
    keys: list[tuple[float, int]]  # start, key
    seconds: float
    trust: float  # in the bars, 0 to 1
    style: str | None

    @classmethod
    def of_report(cls, report: Mapping[str, Any]) -> "Outline":
        """Read what report.json says; it has a lead sheet."""
        sheet, seconds = report["lead_sheet"], float(report["seconds"])
        band = report.get("band") or {}
        beats, bars, has_pickup = _lay_out(sheet["bar_lines_seconds"], report["beats_seconds"], seconds)
        chords: list[tuple[float, float, int]] = []
        for start, end, label in sheet["chords"]:
            start, end = (min(_onto(beats, time, _CHORD_SLACK_SECONDS), seconds) for time in (start, end))
            end = seconds if end > seconds - _CHORD_SLACK_SECONDS else end
            number = nearest_triad(label if label != "?" else "X")[0]
            if chords and chords[-1][2] == number:
                start = chords.pop()[0]
            if end > start:
                chords.append((start, end, number))
        labels = sheet["keys"] or ([[0.0, seconds, key]] if (key := report.get("accompaniment_key")) else [])
        return cls(
            beats=beats,
            bars=bars,
            has_pickup=has_pickup,
            beat_ticks=TICKS // 2 if _usual_count(bars) == 6 else TICKS,
            chords=chords,
            keys=[(_onto(beats, start, _CHORD_SLACK_SECONDS), key_of(label)) for start, _, label in labels],
            seconds=seconds,
            trust=sheet["trust"]["bars"] or 0.0,
            style=band.get("style"),
        )

    @property
    def denominator(self) -> int:
        """Which part of a whole note a beat is."""
        return 4 * TICKS // self.beat_ticks

    def ticks(self, seconds: float) -> float:
        """The tick of a moment."""
        return float(np.interp(seconds, self.beats, np.arange(len(self.beats)))) * self.beat_ticks

    def fifths(self, seconds: float) -> int:
        """Sharps of the key at a moment, flats below 0."""
        key = next((key for start, key in reversed(self.keys) if start <= seconds), None)
        return 0 if key is None else count_fifths(key % 12, ("maj", "min")[key // 12])


def _lay_out(
    lines: Sequence[float], beats: Sequence[float], seconds: float
) -> tuple[np.ndarray, list[tuple[int, int]], bool]:
    """Beats of the whole song from 0 on, its bars (first beat, beats), and whether the first is a pick-up."""
    lines = lines or [0.0]
    bars: list[tuple[int, int]] = []
    times: list[float] = []
    for first, last in itertools.pairwise(lines):
        inside = [beat for beat in beats if first + _SAME_SECONDS < beat < last - _SAME_SECONDS]
        bars.append((len(times), 1 + len(inside)))
        times += [first, *inside]
    usual = _usual_count(bars)
    tail = [lines[-1], *(beat for beat in beats if beat > lines[-1] + _SAME_SECONDS)]
    before = [*times, *tail][-2:]
    pulse = before[1] - before[0] if len(before) > 1 else max(seconds, 0.1)
    while tail[-1] < seconds or len(tail) == 1 or (len(tail) - 1) % usual:
        tail.append(tail[-1] + pulse)
    bars += [(len(times) + beat, usual) for beat in range(0, len(tail) - 1, usual)]
    times += tail
    has_pickup = lines[0] > _SAME_SECONDS
    if has_pickup:  # whose first beat is longer or shorter
        least = 0.5 * (times[1] - times[0])
        before = [0.0, *(beat for beat in beats if least < beat < lines[0] - _SAME_SECONDS)]
        bars = [(0, len(before)), *((len(before) + first, count) for first, count in bars)]
        times = before + times
    return np.array(times), bars, has_pickup


def _usual_count(bars: Sequence[tuple[int, int]]) -> int:
    counts = [count for _, count in bars] or [4]
    return max(counts, key=counts.count)


def _onto(beats: np.ndarray, seconds: float, slack: float) -> float:
    """The beat beside a moment, if there is one so near; else the moment."""
    nearest = float(beats[np.abs(beats - seconds).argmin()])
    return nearest if abs(nearest - seconds) <= slack else float(seconds)


def find_sung_notes(pitches: np.ndarray) -> list[Note]:
    """The notes of sung MIDI pitches at PITCH_RATE_HZ [frames], NaN where nothing is sung."""
    from scipy.ndimage import median_filter  # as few runs need it

    edges = np.flatnonzero(np.diff(np.isfinite(pitches), prepend=False, append=False)).reshape(-1, 2)
    found: list[tuple[int, int, float]] = []
    for low, high in edges.tolist():
        smooth = median_filter(pitches[low:high], 7, mode="nearest")
        first = away = 0
        for frame, pitch in enumerate(smooth):
            middle = np.median(smooth[first : max(frame - away, first + 1)])
            away = away + 1 if abs(pitch - middle) > _SUNG_SEMITONES else 0
            if away == _SUNG_FRAMES:
                found.append((low + first, low + frame - away + 1, float(middle)))
                first, away = frame - away + 1, 0
        found.append((low + first, high, float(np.median(smooth[first:]))))
    return [
        Note(first / PITCH_RATE_HZ, last / PITCH_RATE_HZ, round(pitch), _SUNG_VELOCITY)
        for first, last, pitch in found
        if last - first >= _SUNG_FRAMES
    ]


def bring_notes_back(notes: Sequence[Note], clock: PitchClock) -> list[Note]:
    """Notes of a song at pitch, with their times as they are in the song."""
    return [
        note._replace(start=float(clock.to_song(note.start)), end=float(clock.to_song(note.end)))
        for note in notes
    ]


def place_on_grid(score: Score, outline: Outline) -> dict[str, list[Note]]:
    """The score with its onsets on the sixteenths of the bars, as far as the bars are trusted.

    Each stem keeps the usual lateness of each sixteenth of its beats: that is its swing, and how it pushes.
    What lies elsewhere, as triplets do, and the first beat of a pick-up stay as they were played.
    """
    if outline.trust < _LEAST_TRUST:
        return {stem: list(notes) for stem, notes in score.items()}
    parts = max(1, 4 * outline.beat_ticks // TICKS)  # sixteenths of a beat
    places = np.arange(len(outline.beats), dtype=float)
    placed = {}
    for stem, notes in score.items():
        turns = np.interp([note.start for note in notes], outline.beats, places) * parts
        nearest = np.round(turns)
        kept = nearest.copy()
        for part in range(parts):
            here = nearest % parts == part
            kept[here] += np.median(turns[here] - nearest[here]) if here.any() else 0.0
        is_there = (np.abs(turns - kept) < _OFF_GRID) & (turns >= parts * outline.has_pickup)
        kept = np.where(is_there, kept, turns)
        starts = np.interp(kept / parts, places, outline.beats)
        moved: dict[tuple[float, int], Note] = {}
        for note, start in zip(notes, starts.tolist(), strict=True):
            moved.setdefault((start, note.pitch), note._replace(start=start, end=max(note.end, start + 0.03)))
        placed[stem] = sorted(moved.values())
    return placed


def write_exports(
    wanted: Sequence[str],
    folder: Path,
    suffix: str,
    report: Mapping[str, Any],
    score: Score,
    melody: Sequence[Note],
) -> None:
    """Write the files that are wanted into a folder; the sheet's own only beside the first accompaniment.

    score: what the band plays; melody: what is sung; both in seconds of mix.wav.
    """
    outline = Outline.of_report(report)
    write = {
        "midi": functools.partial(write_midi, score=place_on_grid(score, outline), melody=melody),
        "musicxml": functools.partial(write_lead_sheet, melody=melody),
        "lab": write_chords,
        "click": write_click,
    }
    for kind in wanted:
        if EXPORTED[kind].is_of_each or suffix in ("", "-1"):
            write[kind](folder / exported_name(kind, suffix), outline)


def write_chords(path: Path, outline: Outline) -> None:
    """Write the chords as a chart that `--chords` reads."""
    rows = [
        f"{start:.3f} {end:.3f} {name_chord(number, outline.fifths(start))}"
        for start, end, number in outline.chords
    ]
    write_text(path, "".join(f"{row.replace('?', 'X')}\n" for row in rows))


def write_click(path: Path, outline: Outline) -> None:
    """Write a click on every beat, a higher one on the first of each bar."""
    wave = torch.zeros(1, round(outline.seconds * SAMPLE_RATE_HZ))
    time = torch.arange(round(0.05 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    firsts = {first for first, _ in outline.bars[outline.has_pickup :]}
    for number, beat in enumerate(outline.beats):
        if number == 0 and outline.has_pickup:
            continue
        start = round(float(beat) * SAMPLE_RATE_HZ)
        frequency_hz, level = (1_600, 0.6) if number in firsts else (1_000, 0.4)
        click = level * torch.exp(-time / 0.01) * torch.sin(2 * math.pi * frequency_hz * time)
        room = wave[0, start : start + len(click)]
        room += click[: len(room)]
    write_audio(path, wave)


def write_midi(path: Path, outline: Outline, score: Score, melody: Sequence[Note]) -> None:
    """Write a format 1 file: tempo and meter along the bars, key, chords as markers, the band, the singer."""
    from mido import MetaMessage, MidiFile, MidiTrack

    file = MidiFile(type=1, ticks_per_beat=TICKS, charset="utf-8")
    events: list[tuple[int, Any]] = [(0, MetaMessage("track_name", name="song"))]
    beats, number, now = outline.beats[: np.searchsorted(outline.beats, outline.seconds) + 1], 0, 0.0
    while number < len(beats) - 1:
        # One tempo for as long as it does: beats are rounded, and a tempo for each of them would shake.
        for count in (256, 64, 32, 16, 8, 4, 2, 1):
            ahead = beats[number + 1 : number + 1 + count]
            length = max((ahead[-1] - now) / len(ahead), 1e-3)
            if np.abs(now + length * np.arange(1, len(ahead) + 1) - ahead).max() <= _LATE_SECONDS:
                break
        quarter = min(round(length * 1e6 * TICKS / outline.beat_ticks), 0xFFFFFF)
        events.append((number * outline.beat_ticks, MetaMessage("set_tempo", tempo=quarter)))
        now += len(ahead) * quarter * 1e-6 * outline.beat_ticks / TICKS
        number += len(ahead)
    before = 0
    for first, count in outline.bars:
        if count != before:
            meter = MetaMessage("time_signature", numerator=count, denominator=outline.denominator)
            events.append((first * outline.beat_ticks, meter))
        before = count
    for start, key in outline.keys:
        name = name_note(key % 12, outline.fifths(start)) + "m" * (key >= 12)
        events.append((round(outline.ticks(start)), MetaMessage("key_signature", key=name)))
    for start, _, number in outline.chords:
        text = _lead_sheet_name(number, outline.fifths(start))
        if text:
            events.append((round(outline.ticks(start)), MetaMessage("marker", text=text)))
    file.tracks.append(MidiTrack(_in_order(events, round(outline.ticks(outline.seconds)))))
    channels = itertools.count()
    for name, part in {**cast_parts(score, outline.style), LEAD: _as_part(_SINGER_PROGRAM, melody)}.items():
        channel = _DRUM_CHANNEL if part.is_drums else next(channels)
        file.tracks.append(MidiTrack(_play(name, part, channel, outline)))
    with whole_file(path) as temporary:
        file.save(temporary)


def cast_parts(score: Score, style: str | None) -> dict[str, Part]:
    """Who plays what of a score: drums, bass and keys, by the General MIDI programs of a style."""
    kit, bass, keys = _PROGRAMS.get(style or "", _USUAL_PROGRAMS)
    return {
        "drums": _as_part(kit, score.get("drums", ()), is_drums=True),
        "bass": _as_part(bass, score.get("bass", ())),
        "keys": _as_part(keys, score.get("other", ())),
    }


def _as_part(program: int, notes: Sequence[Note], *, is_drums: bool = False) -> Part:
    return Part(program=program, is_drums=is_drums, notes=list[tuple[float, float, int, int]](notes))


def _play(name: str, part: Part, channel: int, outline: Outline) -> list[Any]:
    """The messages of a track."""
    from mido import Message, MetaMessage

    events: list[tuple[int, Any]] = [
        (0, MetaMessage("track_name", name=name)),
        (0, Message("program_change", channel=channel, program=part.program)),
    ]
    by_pitch: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for start_seconds, end_seconds, pitch, velocity in sorted(part.notes):
        pitch = _TAMBOURINE if part.is_drums and pitch == _SHAKER else pitch
        start = round(outline.ticks(max(0.0, start_seconds)))
        end = max(start + 1, round(outline.ticks(min(end_seconds, outline.seconds))))
        earlier = by_pitch[pitch]
        if earlier and earlier[-1][0] == start:
            continue
        if earlier and earlier[-1][1] > start:
            earlier[-1] = (earlier[-1][0], start, earlier[-1][2])
        earlier.append((start, end, velocity))
    for pitch, spans in by_pitch.items():
        for start, end, velocity in spans:
            on = Message("note_on", channel=channel, note=pitch, velocity=velocity)
            events += [(start, on), (end, Message("note_off", channel=channel, note=pitch, velocity=0))]
    return _in_order(events, round(outline.ticks(outline.seconds)))


def _in_order(events: Sequence[tuple[int, Any]], end: int) -> list[Any]:
    """Messages with their times as steps, what ends before what begins, and the end of the track."""
    from mido import MetaMessage

    rank = {"note_off": 1, "note_on": 2}
    ordered = sorted(events, key=lambda event: (event[0], rank.get(event[1].type, 0)))
    ordered.append((max(end, ordered[-1][0]), MetaMessage("end_of_track")))
    steps = [tick for tick, _ in ordered]
    return [m.copy(time=tick - last) for (tick, m), last in zip(ordered, [0, *steps], strict=False)]


def _lead_sheet_name(number: int, fifths: int) -> str:
    """A chord as lead sheets have it: "Bb", "Gm", "N.C."; empty where nothing is known."""
    if number == NO_CHORD:
        return "N.C."
    return name_note(number % 12, fifths) + "m" * (number >= 12) if number >= 0 else ""


def write_lead_sheet(path: Path, outline: Outline, melody: Sequence[Note]) -> None:
    """Write the sung melody, in sixteenths, with chords, key, meter and tempo as MusicXML.

    A breath of a sixteenth belongs to the note before it; what is mostly below middle C is written an octave
    higher.
    """
    from music21 import bar as bar_lines
    from music21 import clef, harmony, instrument, key, metadata, meter, note, stream, tempo, tie

    part = stream.Part(id="singer")
    part.partName = "Voice"
    part.insert(0, instrument.Vocalist())
    parts = max(1, 4 * outline.beat_ticks // TICKS)
    step = 0.25  # quarter notes of a sixteenth
    # From first to last sixteenth, none over the next: one voice sings.
    sung: list[list[int]] = []
    for each in sorted(melody):
        first, last = (round(outline.ticks(time) * 4 / TICKS) for time in (each.start, each.end))
        if sung and sung[-1][0] == first:
            sung.pop()
        if sung:
            sung[-1][1] = first if first <= sung[-1][1] + 1 else sung[-1][1]
        sung.append([first, max(last, first + 1), each.pitch])
    edges = [(first * parts, (first + count) * parts) for first, count in outline.bars]
    before, pulse, usual = 0, float(np.median(np.diff(outline.beats))), _usual_count(outline.bars)
    group = 6 if (usual, outline.denominator) == (6, 8) else 4
    is_low = sung and np.median([pitch for *_, pitch in sung]) < _MIDDLE_C
    changes = [(round(outline.ticks(start) * 4 / TICKS), start, key) for start, key in outline.keys]
    chords = [(round(outline.ticks(start) * 4 / TICKS), start, number) for start, _, number in outline.chords]
    for number, ((first, last), (_, count)) in enumerate(zip(edges, outline.bars, strict=True)):
        bar = stream.Measure(number=number + 1 - outline.has_pickup)
        if number == 0:
            bar.clef = clef.Treble8vbClef() if is_low else clef.TrebleClef()
        if number == 0 and outline.has_pickup and count < usual:  # a bar that is not whole, and of no number
            bar.paddingLeft, bar.showNumber = (usual - count) * parts * step, stream.enums.ShowNumber.NEVER
            count = usual
        if count != before:
            bar.timeSignature = meter.TimeSignature(f"{count}/{outline.denominator}")
        before = count
        for at, start, tonality in changes:
            if first <= at < last or (number == 0 and at < first):
                signature = key.KeySignature(outline.fifths(start))
                bar.insert((at - first) * step, signature.asKey("minor" if tonality >= 12 else "major"))
        if number == 0:
            unit = note.Note(quarterLength=outline.beat_ticks / TICKS).duration
            mark = tempo.MetronomeMark(number=round(60 / pulse), referent=unit)
            setattr(mark, "placement", "above")  # noqa: B010 - which music21 declares to be None
            bar.insert(0, mark)
        for at, start, chord in chords:
            if first <= at < last and chord >= 0:
                name = name_note(chord % 12, outline.fifths(start)).replace("b", "-")
                kind = "minor" if chord >= 12 else "major"
                symbol = harmony.NoChord() if chord == NO_CHORD else harmony.ChordSymbol(root=name, kind=kind)
                bar.insert((at - first) * step, symbol)
        place = first
        for low, high, pitch in [*sung, [last, last, None]]:
            start, end = max(low, first), min(high, last)
            if high < first or low > last:
                continue
            for begin, until in split_at_beats(place - first, start - first, group):
                bar.insert(begin * step, note.Rest(quarterLength=(until - begin) * step))
            fifths = outline.fifths(float(outline.beats[min(start // parts, len(outline.beats) - 1)]))
            for begin, until in split_at_beats(start - first, end - first, group):
                name = name_note(pitch % 12, fifths).replace("b", "-")
                written = note.Note(f"{name}{pitch // 12 - 1}", quarterLength=(until - begin) * step)
                goes_on, went_on = until + first < high, begin + first > low
                if goes_on or went_on:
                    written.tie = tie.Tie(
                        "continue" if goes_on and went_on else "start" if goes_on else "stop"
                    )
                bar.insert(begin * step, written)
            place = max(place, end)
        part.append(bar)
    part[-1].rightBarline = bar_lines.Barline("final")
    song = stream.Score([part])
    song.metadata = metadata.Metadata(title="Lead sheet", composer="")
    with whole_file(path) as temporary:
        song.write("musicxml", fp=str(temporary))


def split_at_beats(first: int, last: int, group: int) -> list[tuple[int, int]]:
    """Sixteenths first..last of a bar as spans that one note can be written for and that show the beats.

    group: sixteenths that are written together. What begins beside a beat ends on the next one, unless it is
    a plain syncopation of that length.
    """
    spans: list[tuple[int, int]] = []
    while first < last:
        length, beside = last - first, first % group
        if beside and not (2 * beside == group == length):
            length = min(length, group - beside)
        elif length not in _WRITTEN_SIXTEENTHS and length > group:
            length -= length % group
        length = max(each for each in _WRITTEN_SIXTEENTHS if each <= length)
        spans.append((first, first + length))
        first += length
    return spans
