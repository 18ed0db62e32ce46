"""Figures of whole songs: whether the band keeps key, time and chords from the first bar to the last.

Measured on a corpus of whole songs (`duotok.recipes.corpus.popband --whole`), against what their scores say.
The band is heard as sound or, without `settings.sound`, as what its codes stand for.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from duotok.lm.contract import Candidates
from duotok.recipes.accompany.pipeline import Accompanist, Sketches
from duotok.recipes.accompany.request import Request
from duotok.recipes.accompany.wishes import describe_sheet, find_beats
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.excerpts import Settings, read_items
from duotok.recipes.evaluation.tokenizer_part import compare_chords, compare_keys
from duotok.recipes.lm.sheets import agree, label_frames
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity, measure_chroma
from duotok.tokenizer.music.harmony import estimate_chords, read_key

SHORTEST_SECONDS = 120.0  # of a whole song
_WINDOW_SECONDS, _SHORTEST_WINDOW_SECONDS = 30.0, 15.0
_SUNG_SHARE = 0.5  # of a window that counts as sung
_PAUSE_SECONDS = 10.0  # without a sung note: an unsung window
_END_BEATS = 8
_STEADY_SECONDS = 0.02  # how far a beat may be off a constant tempo where that tempo is given
_SILENCE_SECONDS = 60.0
_TEMPO_TOLERANCE = 0.04
_PASSAGE_BEATS = 32
_STEPS = 4  # parts of a beat that melodies are compared at
_LEAST_ALIKE = 0.7  # share of equal parts that a passage goes on with
_REST = -1


def measure_whole(settings: Settings) -> dict[str, float]:
    """Shares and errors over all whole songs; settings.folder gets whole.json, with a row of each song.

    key_windows…: share of windows in the true key or its relative one, of the band and (_real) of the corpus'
    own. What no song has (pauses, say) has no figure. Raises DataError without whole songs.
    """
    whole = [item for item in read_items(settings) if item.seconds >= SHORTEST_SECONDS]
    if not whole:
        raise DataError(
            f"{settings.corpus} has no item of {SHORTEST_SECONDS:.0f} s in {settings.split}.jsonl; "
            "make whole songs by duotok.recipes.corpus.popband --whole"
        )
    accompanist = Accompanist.from_pretrained(settings.bundle)
    chosen = whole[: settings.items]
    songs = []
    for number, item in enumerate(tqdm(chosen, desc="whole: songs", disable=None)):
        songs.append(measure_song(accompanist, item, seed=settings.seed + number, sound=settings.sound))
        if settings.folder is not None:
            rows = [
                {name: value for name, value in vars(song).items() if value is not None} for song in songs
            ]
            write_text(settings.folder / "whole.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    if settings.folder is not None:
        print(f"{settings.folder}: whole.json", file=sys.stderr)
    return summarize(songs)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The key heard in a stretch of a song."""

    start: float  # seconds
    end: float
    sung: float  # share
    key: str | None  # true
    heard: str | None  # of the band
    heard_real: str | None  # of the corpus' own

    def is_right(self, *, real: bool = False) -> bool:
        """Whether it is the true key or the relative one."""
        return compare_keys(self.heard_real if real else self.heard, self.key)[1]


@dataclass(frozen=True, kw_only=True)
class Song:
    """What was measured of one song; None of what it does not have."""

    id: str
    song: str
    seconds: float
    key: str | None
    sung: float  # share
    windows: list[dict[str, Any]]  # of 30 s
    pauses: list[dict[str, Any]]  # of 10 to 30 s in which nobody sings
    chorus_beats: list[int] | None  # first beat of both singings of a passage, and how many beats it has
    chorus_chroma_correlation: float | None
    chorus_chroma_correlation_real: float | None
    tempo_bpm: float | None  # true
    tempo_read_bpm: float | None
    bars_right: float | None
    chords_majmin: float | None  # of the sheet that the band is shown
    band_chords_majmin: float | None  # of what the band is heard to play
    end_beat_error_ms: float | None
    end_beat_error_given_ms: float | None
    silence_intro_key: str | None
    silence_intro_key_right: float | None
    silence_intro_tempo_bpm: float | None
    silence_intro_tempo_right: float | None
    rtf: float | None  # seconds of computing per second of song


@torch.no_grad()
def measure_song(accompanist: Accompanist, item: Item, *, seed: int, sound: bool) -> Song:
    """All that is measured of a song: played once, planned with its tempo given, begun after silence."""
    vocal = item.read("vocal")
    sketches = accompanist.compose(vocal, seed=seed)
    band, rtf = sketches.ranked[0], None
    if sound:
        made = accompanist.perform(sketches, band)
        played = Hearing.of_wave(made.accompaniment)
        rtf = sum(made.report["computing_seconds"].values()) / item.seconds
    else:
        played = Hearing(
            chroma=band.told.chroma[0].double().numpy(),
            sounding=at_chroma_rate(estimate_activity(band.told.mel[0])),
        )
    own = Hearing.of_wave(item.read("accompaniment"))
    windows = [_listen(item, stretch, played, own) for stretch in cut_windows(item)]
    pauses = [_listen(item, stretch, played, own) for stretch in find_pauses(item)]
    plan = Plan.of_sketches(sketches)
    beats = np.asarray(item.beats_seconds)
    passage = find_repetition(melody_of_beats(item))
    correlations = [
        None if passage is None else hearing.compare(beats, *passage) for hearing in (played, own)
    ]
    begun = accompanist_of(accompanist, round(_SILENCE_SECONDS * accompanist.bundle.tokenizer.frame_rate_hz))
    silence = torch.zeros(2, round(_SILENCE_SECONDS * SAMPLE_RATE_HZ))
    intro = begun.compose(torch.cat([silence, vocal], dim=1), seed=seed)
    told = intro.ranked[0].told
    frames = round(_SILENCE_SECONDS * CHROMA_RATE_HZ)
    intro_key = Hearing(
        chroma=told.chroma[0, :frames].double().numpy(),
        sounding=at_chroma_rate(estimate_activity(told.mel[0]))[:frames],
    ).key(0.0, _SILENCE_SECONDS)
    intro_tempo = Plan.of_sketches(intro).tempo_between(0.0, _SILENCE_SECONDS)
    first_key = true_key(item, 0.0, _SILENCE_SECONDS)
    return Song(
        id=item.id,
        song=item.song,
        seconds=round(item.seconds, 3),
        key=item.key,
        sung=round(item.sung_between(0.0, item.seconds) / item.seconds, 3),
        windows=[vars(window) for window in windows],
        pauses=[vars(window) for window in pauses],
        chorus_beats=None if passage is None else list(passage),
        chorus_chroma_correlation=correlations[0],
        chorus_chroma_correlation_real=correlations[1],
        tempo_bpm=item.tempo_bpm,
        tempo_read_bpm=plan.tempo_between(0.0, item.seconds),
        bars_right=bars_right(sketches, item),
        chords_majmin=_majmin(plan.chords, item),
        band_chords_majmin=_majmin(played.chords(), item),
        end_beat_error_ms=end_beat_error_ms(plan.beats_seconds, beats),
        end_beat_error_given_ms=_measure_given(accompanist, item, vocal),
        silence_intro_key=intro_key,
        silence_intro_key_right=float(compare_keys(intro_key, first_key)[1]),
        silence_intro_tempo_bpm=intro_tempo,
        silence_intro_tempo_right=None if item.tempo_bpm is None else is_near(intro_tempo, item.tempo_bpm),
        rtf=rtf,
    )


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """Chroma of a band, and when it sounds."""

    chroma: np.ndarray  # [frames, 12] at CHROMA_RATE_HZ
    sounding: np.ndarray | None = None  # [frames]

    @classmethod
    def of_wave(cls, wave: Tensor) -> "Hearing":
        """What is heard in wave [channels, samples] at 48 kHz."""
        return cls(chroma=measure_chroma(wave))

    def key(self, start: float, end: float) -> str | None:
        """The key of a stretch in seconds; None where nothing sounds."""
        inside = slice(round(start * CHROMA_RATE_HZ), round(end * CHROMA_RATE_HZ))
        sounding = None if self.sounding is None else self.sounding[inside]
        key = read_key(self.chroma[inside], CHROMA_RATE_HZ, "accompaniment", sounding=sounding)
        return None if key is None else str(key)

    def chords(self) -> list[tuple[float, float, str]]:
        """The chords of the whole song."""
        return estimate_chords(self.chroma, CHROMA_RATE_HZ, sounding=self.sounding)

    def compare(self, beats: np.ndarray, first: int, second: int, count: int) -> float | None:
        """Mean correlation over beats of the chroma from beat `first` on with that from `second` on.

        beats: seconds [beats]; count: how many. None where either is silent.
        """
        edges = np.round(beats * CHROMA_RATE_HZ).astype(int)
        means = [
            np.array([self.chroma[edges[n] : edges[n + 1]].mean(axis=0) for n in range(place, place + count)])
            for place in (first, second)
        ]
        one, other = (chroma - chroma.mean(axis=1, keepdims=True) for chroma in means)
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        heard = norms > 1e-6
        return float(((one * other).sum(axis=1)[heard] / norms[heard]).mean()) if heard.any() else None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the band knows of the song before it plays; all in seconds."""

    bar_lines_seconds: np.ndarray
    beats_seconds: np.ndarray
    chords: list[tuple[float, float, str]] | None

    @classmethod
    def of_sketches(cls, sketches: Sketches) -> "Plan":
        """The plan as report.json tells it."""
        rate_hz = CHROMA_RATE_HZ / 2
        told = describe_sheet(sketches.sheet, rate_hz) or {"bar_lines_seconds": [], "chords": None}
        chords = told["chords"]
        return cls(
            bar_lines_seconds=np.asarray(told["bar_lines_seconds"], dtype=float),
            beats_seconds=find_beats(sketches.sheet) / rate_hz,
            # A chord that is not known is none.
            chords=chords and [(start, end, name.replace("?", "N")) for start, end, name in chords],
        )

    def tempo_between(self, start: float, end: float) -> float | None:
        """Beats per minute by the median of the beats in a stretch; None with fewer than two."""
        inside = self.beats_seconds[(self.beats_seconds >= start) & (self.beats_seconds < end)]
        return round(60 / float(np.median(np.diff(inside))), 2) if len(inside) > 1 else None


class Beginner(nn.Module):
    """A language model that composes the first frames of a song only: the rest is silence to nobody."""

    def __init__(self, lm: Any, frames: int) -> None:
        super().__init__()
        self.lm, self.frames = lm, frames

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("lm"), name)

    def compose(self, source_codes: Tensor, **options: Any) -> Candidates:
        """Return codes as long as the source, zeros from `frames` on; sheets are cut, and so are prefixes."""
        total = source_codes.shape[-1]
        if self.frames == 0:
            seeds = len(options["seeds"])
            codes = torch.zeros(seeds, *source_codes.shape, dtype=torch.int64)
            return Candidates(codes=codes, likelihood_nats=None, likelihood_alone_nats=None)
        for name in ("sheet", "prefix"):
            if options.get(name) is not None:
                options[name] = options[name][: self.frames]
        made = self.lm.compose(source_codes[..., : self.frames], **options)
        return replace(made, codes=nn.functional.pad(made.codes, (0, total - made.codes.shape[-1])))


def accompanist_of(accompanist: Accompanist, frames: int) -> Accompanist:
    """The same accompanist, who plans whole songs and composes so many frames of them."""
    lm: Any = Beginner(accompanist.bundle.lm, frames)
    return Accompanist(replace(accompanist.bundle, lm=lm), str(accompanist.device))


def _measure_given(accompanist: Accompanist, item: Item, vocal: Tensor) -> float | None:
    """Error of the last beats where tempo and first bar line are given; None if the song keeps no tempo."""
    beats = np.asarray(item.beats_seconds)
    tempo = steady_tempo(beats)
    if tempo is None or not item.downbeats_seconds or not 55 <= tempo <= 210:
        return None
    given: dict[str, Any] = {"tempo_bpm": tempo}
    if "downbeat_seconds" in {field.name for field in fields(Request)}:
        given["downbeat_seconds"] = item.downbeats_seconds[0]
    sketches = accompanist_of(accompanist, 0).compose(vocal, **given)
    return end_beat_error_ms(Plan.of_sketches(sketches).beats_seconds, beats)


def steady_tempo(beats: np.ndarray) -> float | None:
    """Beats per minute of beats in seconds [beats], all within 20 ms of a constant tempo, else None."""
    if len(beats) < 2:
        return None
    numbers = np.arange(len(beats))
    line = np.polyfit(numbers, beats, 1)
    return float(60 / line[0]) if np.abs(beats - np.polyval(line, numbers)).max() <= _STEADY_SECONDS else None


def end_beat_error_ms(found: np.ndarray, beats: np.ndarray) -> float | None:
    """Mean distance of the last 8 true beats to the nearest found one, both in seconds; None without any."""
    if len(found) == 0 or len(beats) == 0:
        return None
    return float(1000 * np.mean([np.abs(found - beat).min() for beat in beats[-_END_BEATS:]]))


def bars_right(sketches: Sketches, item: Item) -> float | None:
    """Share of frames whose place in the bar is within a sixteenth of the true one; unknown ones are not."""
    if sketches.sheet is None:
        return None
    written = label_frames(item, CHROMA_RATE_HZ / 2)
    frames = min(len(written), len(sketches.sheet))
    return agree([(sketches.sheet[:frames], written[:frames])]).get("bar_agreement")


def is_near(found: float | None, tempo: float) -> float:
    """1.0 for a tempo within 4 % of the true one, else 0.0."""
    return float(found is not None and abs(found / tempo - 1) <= _TEMPO_TOLERANCE)


def _majmin(found: list[tuple[float, float, str]] | None, item: Item) -> float | None:
    if not found or not item.chords:
        return None
    right, counted = compare_chords(found, item.chords, item.seconds)
    return right / counted if counted else None


def cut_windows(item: Item) -> list[tuple[float, float]]:
    """Windows of 30 s in seconds; a last one of less than 15 s is left out."""
    starts = np.arange(0.0, max(item.seconds - _SHORTEST_WINDOW_SECONDS, 0.1), _WINDOW_SECONDS)
    return [(float(start), min(float(start) + _WINDOW_SECONDS, item.seconds)) for start in starts]


def find_pauses(item: Item) -> list[tuple[float, float]]:
    """Stretches of 10 s or more with chords and without a sung note, cut into even parts of at most 30 s."""
    edges = [0.0, *(time for start, end, *_ in sorted(item.notes) for time in (start, end)), item.seconds]
    found = []
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        if end - start < _PAUSE_SECONDS:
            continue
        parts = np.linspace(start, end, 1 + int(np.ceil((end - start) / _WINDOW_SECONDS)))
        for first, last in zip(parts[:-1].tolist(), parts[1:].tolist(), strict=True):
            played = sum(
                max(0.0, min(b, last) - max(a, first)) for a, b, label in item.chords if label != "N"
            )
            if played >= (last - first) / 2:
                found.append((first, last))
    return found


def true_key(item: Item, start: float, end: float) -> str | None:
    """The key of most of a stretch."""
    overlaps = [(min(b, end) - max(a, start), label) for a, b, label in item.keys]
    longest, label = max(overlaps, default=(0.0, item.key))
    return label if longest > 0 else item.key


def _listen(item: Item, stretch: tuple[float, float], played: Hearing, own: Hearing) -> Window:
    start, end = stretch
    return Window(
        start=round(start, 3),
        end=round(end, 3),
        sung=round(item.sung_between(start, end) / (end - start), 3),
        key=true_key(item, start, end),
        heard=played.key(start, end),
        heard_real=own.key(start, end),
    )


def melody_of_beats(item: Item) -> np.ndarray:
    """The sung pitch in every quarter of every beat [beats - 1, 4]; -1 in rests. By the notes' middles."""
    beats = np.asarray(item.beats_seconds)
    fractions = (np.arange(_STEPS) + 0.5) / _STEPS
    times = beats[:-1, None] + np.diff(beats)[:, None] * fractions
    pitches = np.full(times.shape, _REST)
    for start, end, pitch, _ in item.notes:
        pitches[(times >= start) & (times < end)] = pitch
    return pitches


def find_repetition(melody: np.ndarray) -> tuple[int, int, int] | None:
    """The longest passage of 32 beats or more that is sung twice: (first beat, its beat again, beats).

    melody: [beats, 4] pitches, -1 in rests. Parts of a beat in which both rest say nothing; most of the
    others must be alike, throughout the passage. None if nothing is sung twice.
    """
    best: tuple[float, int, int, int] | None = None
    for lag in range(_PASSAGE_BEATS, len(melody) - _PASSAGE_BEATS + 1):
        first, again = melody[:-lag], melody[lag:]
        sung = (first != _REST) | (again != _REST)
        gains = np.where(sung, (first == again) - _LEAST_ALIKE, 0.0).sum(axis=1)
        # The stretch with the largest sum (J. Bentley, Algorithm Design Techniques, 1984).
        sums = np.concatenate([[0.0], gains.cumsum()])
        lowest = np.minimum.accumulate(sums)
        end = int((sums - lowest).argmax())
        start = int(sums[: end + 1].argmin())
        count = min(end - start, lag)  # the passage does not run into itself
        gain = float(sums[start + count] - sums[start])
        if count >= _PASSAGE_BEATS and (best is None or gain > best[0]):
            best = gain, start, start + lag, count
    return None if best is None else best[1:]


def summarize(songs: Sequence[Song]) -> dict[str, float]:
    """Means over songs, shares of all their windows, and how many of each there are."""
    figures: dict[str, float] = {"songs": len(songs), "song_seconds": sum(song.seconds for song in songs)}
    kinds = {
        "": [Window(**each) for song in songs for each in song.windows],
        "_sung": [
            w for song in songs for w in (Window(**each) for each in song.windows) if w.sung >= _SUNG_SHARE
        ],
        "_unsung": [Window(**each) for song in songs for each in song.pauses],
    }
    for kind, windows in kinds.items():
        if windows:
            figures[f"key_windows{kind}_count"] = len(windows)
            figures[f"key_windows{kind}"] = float(np.mean([window.is_right() for window in windows]))
            real = [window.is_right(real=True) for window in windows]
            figures[f"key_windows{kind}_real"] = float(np.mean(real))
    for name in (
        "chorus_chroma_correlation",
        "chorus_chroma_correlation_real",
        "bars_right",
        "chords_majmin",
        "band_chords_majmin",
        "end_beat_error_ms",
        "end_beat_error_given_ms",
        "silence_intro_key_right",
        "silence_intro_tempo_right",
        "rtf",
    ):
        values = [getattr(song, name) for song in songs if getattr(song, name) is not None]
        if values:
            figures[name] = float(np.mean(values))
    given = [song for song in songs if song.end_beat_error_given_ms is not None]
    tempi = [is_near(song.tempo_read_bpm, song.tempo_bpm) for song in songs if song.tempo_bpm is not None]
    choruses = [song for song in songs if song.chorus_beats is not None]
    figures |= {"end_beat_given_songs": len(given), "chorus_songs": len(choruses)}
    return figures | ({"tempo_right": float(np.mean(tempi))} if tempi else {})
