"""Figures of whole songs: whether the band keeps key, time and chords from the first bar to the last.

Measured on a corpus of whole songs (`duotok.recipes.corpus.popband --whole`), against what their scores say.
The band is heard as sound or, without `settings.sound`, as what its codes stand for; without
`settings.composed` nothing is played, and what the band plans is measured alone.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from duotok.lm.contract import Candidates
from duotok.lm.sheet.columns import PLACE, PLACES, UNKNOWN
from duotok.recipes.accompany.pipeline import Accompanist, Sketches
from duotok.recipes.accompany.wishes import describe_plan, find_beats
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.excerpts import Settings, read_items
from duotok.recipes.evaluation.quality_report import save_figure
from duotok.recipes.evaluation.tokenizer_part import Chord, compare_chords, compare_keys
from duotok.recipes.lm.sheets import agree, label_frames
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_json
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity, measure_chroma
from duotok.tokenizer.music.harmony import estimate_chords, read_key
from duotok.tokenizer.music.labels import CHORDS, NO_CHORD, chords_of_blocks, key_of, triad_of

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
_MEANS = (  # over songs, of what a song is given
    "chorus_chroma_correlation",
    "chorus_chroma_correlation_real",
    "plan_chorus_chroma_correlation",
    "bars_right",
    "chords_majmin",
    "band_chords_majmin",
    "end_beat_error_ms",
    "end_beat_error_given_ms",
    "silence_intro_key_right",
    "silence_intro_tempo_right",
    "rtf",
)


def measure_whole(settings: Settings) -> dict[str, float]:
    """Shares and errors over all whole songs; settings.folder gets whole.json, settings.plots pictures.

    key_windows…: share of windows in the true key or its relative one; …_real of the corpus' own band, plan_…
    of the chords that ours plans to play. What no song has (pauses, say) has no figure. Raises DataError
    without whole songs.
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
        band = Band(accompanist, seed=settings.seed + number, plays=settings.composed, sounds=settings.sound)
        songs.append(measure_song(band, item, settings.plots))
        if settings.folder is not None:
            write_json(settings.folder / "whole.json", [asdict(song) for song in songs])
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
    heard: dict[str, str | None]  # of the band: "", the corpus' own: "_real", the chords planned: "plan"


@dataclass(frozen=True, kw_only=True)
class Song:
    """What was measured of one song; None of what it does not have."""

    id: str
    song: str
    seconds: float
    key: str | None
    sung: float  # share
    windows: list[Window]  # of 30 s
    pauses: list[Window]  # of 10 to 30 s in which nobody sings
    chorus_beats: (
        tuple[int, int, int] | None
    )  # first beat of both singings of a passage, and how many beats it has
    chorus_chroma_correlation: float | None
    chorus_chroma_correlation_real: float | None
    plan_chorus_chroma_correlation: float | None
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


@dataclass(frozen=True)
class Band:
    """Who plays, and how much of it."""

    accompanist: Accompanist
    seed: int = 0
    plays: bool = True
    sounds: bool = True

    def begin(self, vocal: Tensor, seconds: float, **given: Any) -> Sketches:
        """Plan the whole song and compose its first seconds."""
        frames = round(seconds * self.accompanist.bundle.tokenizer.frame_rate_hz) if self.plays else 0
        lm: Any = Beginner(self.accompanist.bundle.lm, frames)
        beginner = Accompanist(replace(self.accompanist.bundle, lm=lm), str(self.accompanist.device))
        if not frames:
            given = {"candidates": 1, **given}  # of nothing composed one is as good as another
        sketches = beginner.compose(vocal, seed=self.seed, **given)
        assert isinstance(sketches, Sketches)
        return sketches


@torch.no_grad()
def measure_song(band: Band, item: Item, plots: Path | None = None) -> Song:
    """All that is measured of a song: played once, planned with its tempo given, begun after silence.

    The folder plots gets a picture of it.
    """
    vocal = item.read("vocal")
    sketches = band.begin(vocal, item.seconds + 1)
    plan, rtf = Plan.of_sketches(sketches), None
    heard = {"_real": Hearing(chroma=measure_chroma(item.read("accompaniment"))), "plan": plan.hearing}
    if band.plays and band.sounds:
        made = band.accompanist.perform(sketches, sketches.ranked[0])
        heard[""] = Hearing(chroma=measure_chroma(made.accompaniment))
        rtf = sum(made.report["computing_seconds"].values()) / item.seconds
    elif band.plays:
        heard[""] = Hearing.of_codes(sketches)
    beats = np.asarray(item.beats_seconds)
    passage = find_repetition(melody_of_beats(item))
    alike = {name: passage and hearing.compare(beats, *passage) for name, hearing in heard.items()}
    silence = torch.zeros(2, round(_SILENCE_SECONDS * SAMPLE_RATE_HZ))
    late = band.begin(torch.cat([silence, vocal], dim=1), _SILENCE_SECONDS)
    late_plan = Plan.of_sketches(late)
    late_heard = Hearing.of_codes(late) if band.plays else late_plan.hearing
    late_key = late_heard.key(0.0, _SILENCE_SECONDS)
    late_tempo = late_plan.tempo_between(0.0, _SILENCE_SECONDS)
    first_key = true_key(item, 0.0, _SILENCE_SECONDS)
    song = Song(
        id=item.id,
        song=item.song,
        seconds=round(item.seconds, 3),
        key=item.key,
        sung=round(item.sung_between(0.0, item.seconds) / item.seconds, 3),
        windows=[_listen(item, stretch, heard) for stretch in cut_windows(item)],
        pauses=[_listen(item, stretch, heard) for stretch in find_pauses(item)],
        chorus_beats=passage,
        chorus_chroma_correlation=alike.get(""),
        chorus_chroma_correlation_real=alike["_real"],
        plan_chorus_chroma_correlation=alike["plan"],
        tempo_bpm=item.tempo_bpm,
        tempo_read_bpm=plan.tempo_between(0.0, item.seconds),
        bars_right=bars_right(sketches, item),
        chords_majmin=_majmin(plan.chords, item),
        band_chords_majmin=_majmin(heard[""].chords(), item) if "" in heard else None,
        end_beat_error_ms=end_beat_error_ms(plan.beats_seconds, beats),
        end_beat_error_given_ms=_measure_given(band, item, vocal),
        silence_intro_key=late_key,
        silence_intro_key_right=float(compare_keys(late_key, first_key)[1]),
        silence_intro_tempo_bpm=late_tempo,
        silence_intro_tempo_right=None if item.tempo_bpm is None else is_near(late_tempo, item.tempo_bpm),
        rtf=rtf,
    )
    if plots is not None:
        chords = {"true": item.chords, "planned": plan.chords}
        if "" in heard:
            chords["heard"] = heard[""].chords()
        draw_song(song, item, sketches, chords, plots / f"whole-{item.id}.png")
    return song


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """Chroma of a band, and when it sounds."""

    chroma: np.ndarray  # [frames, 12] at CHROMA_RATE_HZ
    sounding: np.ndarray | None = None  # [frames]

    @classmethod
    def of_codes(cls, sketches: Sketches) -> "Hearing":
        """What the codes ranked first stand for."""
        told = sketches.ranked[0].told
        sounding = at_chroma_rate(estimate_activity(told.mel[0]))
        return cls(chroma=told.chroma[0].double().numpy(), sounding=sounding)

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
    chords: list[tuple[float, float, str]]
    hearing: Hearing  # of the triads of its chords

    @classmethod
    def of_sketches(cls, sketches: Sketches) -> "Plan":
        """The plan as report.json tells it."""
        told = describe_plan(sketches.plan) or {"bar_lines_seconds": [], "chords": []}
        # A chord that is not known is none.
        chords = [(start, end, name.replace("?", "N")) for start, end, name in told["chords"]]
        frames = round(max((end for _, end, _ in chords), default=0.0) * CHROMA_RATE_HZ)
        triads = np.zeros((CHORDS + 1, 12))  # the last is of what is unknown
        for number in range(NO_CHORD):
            triads[number, [(number + step) % 12 for step in (0, 3 if number >= 12 else 4, 7)]] = 1.0
        return cls(
            bar_lines_seconds=np.asarray(told["bar_lines_seconds"], dtype=float),
            beats_seconds=find_beats(sketches.plan),
            chords=chords,
            hearing=Hearing(chroma=triads[chords_of_blocks(chords, frames, CHROMA_RATE_HZ)]),
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
        for name in ("prefix", "again"):
            if options.get(name) is not None:
                options[name] = options[name][: self.frames]
        if options.get("sheet") is not None:
            options["sheet"] = options["sheet"][..., : self.frames, :]
        made = self.lm.compose(source_codes[..., : self.frames], **options)
        return replace(made, codes=nn.functional.pad(made.codes, (0, total - made.codes.shape[-1])))


def draw_song(
    song: Song, item: Item, sketches: Sketches, chords: Mapping[str, Sequence[Chord]], path: Path
) -> None:
    """Draw over time what is sung, how far the bars are off, chords and keys; a color is a root."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=(2, 2, len(chords), 4))
    for start, end, pitch, _ in item.notes:
        axes[0].plot([start, end], [pitch, pitch], color="black", linewidth=2)
    axes[0].set_ylabel("sung pitch")
    written = label_frames(item, CHROMA_RATE_HZ / 2)[:, PLACE]
    if sketches.plan is not None:
        sheet = sketches.plan.sheet
        frames = min(len(written), len(sheet))
        off = (sheet[:frames, PLACE] - written[:frames] + PLACES // 2) % PLACES - PLACES // 2
        known = (written[:frames] != UNKNOWN) & (sheet[:frames, PLACE] != UNKNOWN)
        times = np.flatnonzero(known.numpy()) * 2 / CHROMA_RATE_HZ
        axes[1].plot(times, off[known], ".", markersize=1, color="black")
    axes[1].axhspan(-1.5, 1.5, color="tab:green", alpha=0.2)
    axes[1].set(ylim=(-PLACES / 2 - 1, PLACES / 2), ylabel="bars off, sixteenths")
    for row, found in enumerate(chords.values()):
        _draw_labels(axes[2], row, [(start, end, triad_of(label), label) for start, end, label in found])
    axes[2].set_yticks(range(len(chords)), [f"chords, {name}" for name in chords])
    windows = sorted([*song.windows, *song.pauses], key=lambda window: window.start)
    rows = {"true": [window.key for window in windows]}
    for name in windows[0].heard if windows else ():
        label = {"": "band", "_real": "real band", "plan": "planned"}[name]
        rows[label] = [window.heard[name] for window in windows]
    for row, keys in enumerate(rows.values()):
        # A pause lies below the window that it is in.
        for window, key in zip(windows, keys, strict=True):
            if key is not None:
                place = row + (0.2 if window in song.pauses else -0.2)
                _draw_labels(axes[3], place, [(window.start, window.end, key_of(key), key)], height=0.38)
    axes[3].set_yticks(range(len(rows)), [f"key, {name}" for name in rows])
    axes[3].set(xlabel="seconds", xlim=(0, item.seconds))
    for each in axes[2:]:
        each.invert_yaxis()
    bars = "" if song.bars_right is None else f", bars right {song.bars_right:.2f}"
    majmin = "" if song.chords_majmin is None else f", chords {song.chords_majmin:.2f}"
    figure.suptitle(f"{item.id} (song {item.song}, {item.key}){bars}{majmin}")
    save_figure(figure, path)


def _draw_labels(
    axes: Axes, row: float, spans: Sequence[tuple[float, float, int, str]], *, height: float = 0.9
) -> None:
    """Bars of (start, end, chord or key class, label), minor ones paler."""
    for start, end, number, label in spans:
        if not 0 <= number < NO_CHORD:
            continue
        color = colormaps["hsv"](number % 12 / 12)
        axes.barh(row, end - start, height, left=start, color=color, alpha=0.45 if number >= 12 else 0.9)
        if end - start >= 5:
            axes.text((start + end) / 2, row, label, fontsize=6, ha="center", va="center")


def _measure_given(band: Band, item: Item, vocal: Tensor) -> float | None:
    """Error of the last beats where tempo and first bar line are given; None if the song keeps no tempo."""
    beats = np.asarray(item.beats_seconds)
    tempo = steady_tempo(beats)
    if tempo is None or not item.downbeats_seconds or not 55 <= tempo <= 210:
        return None
    sketches = band.begin(vocal, 0.0, tempo_bpm=tempo, downbeat_seconds=item.downbeats_seconds[0])
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
    if sketches.plan is None:
        return None
    written, sheet = label_frames(item, CHROMA_RATE_HZ / 2), sketches.plan.sheet
    frames = min(len(written), len(sheet))
    return agree([(sheet[:frames], written[:frames])]).get("bar_agreement")


def is_near(found: float | None, tempo: float) -> float:
    """1.0 for a tempo within 4 % of the true one, else 0.0."""
    return float(found is not None and abs(found / tempo - 1) <= _TEMPO_TOLERANCE)


def _majmin(found: list[tuple[float, float, str]], item: Item) -> float | None:
    if not found or not item.chords:
        return None
    right, counted = compare_chords(found, item.chords, item.seconds)
    return right / counted if counted else None


def cut_windows(item: Item) -> list[tuple[float, float]]:
    """Windows of 30 s in seconds; a last one of less than 15 s is left out."""
    starts = np.arange(0.0, item.seconds, _WINDOW_SECONDS).tolist()
    windows = [(start, min(start + _WINDOW_SECONDS, item.seconds)) for start in starts]
    return [(start, end) for start, end in windows if start == 0 or end - start >= _SHORTEST_WINDOW_SECONDS]


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


def _listen(item: Item, stretch: tuple[float, float], heard: Mapping[str, Hearing]) -> Window:
    start, end = stretch
    return Window(
        start=round(start, 3),
        end=round(end, 3),
        sung=round(item.sung_between(start, end) / (end - start), 3),
        key=true_key(item, start, end),
        heard={name: hearing.key(start, end) for name, hearing in heard.items()},
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
        start = end - int(sums[end::-1].argmin())  # the last of equals: it begins with singing
        count = min(end - start, lag)  # the passage does not run into itself
        gain = float(sums[start + count] - sums[start])
        if count >= _PASSAGE_BEATS and (best is None or gain > best[0]):
            best = gain, start, start + lag, count
    return None if best is None else best[1:]


def summarize(songs: Sequence[Song]) -> dict[str, float]:
    """Means over songs, shares of all their windows, and how many of each there are."""
    figures: dict[str, float] = {"songs": len(songs), "song_seconds": sum(song.seconds for song in songs)}
    windows = [window for song in songs for window in song.windows]
    kinds = {
        "": windows,
        "_sung": [window for window in windows if window.sung >= _SUNG_SHARE],
        "_unsung": [window for song in songs for window in song.pauses],
    }
    for kind, found in kinds.items():
        if found:
            figures[f"key_windows{kind}_count"] = len(found)
        for name in found[0].heard if found else ():
            label = f"plan_key_windows{kind}" if name == "plan" else f"key_windows{kind}{name}"
            right = [compare_keys(window.heard[name], window.key)[1] for window in found]
            figures[label] = float(np.mean(right))
    for name in _MEANS:
        values = [getattr(song, name) for song in songs if getattr(song, name) is not None]
        if values:
            figures[name] = float(np.mean(values))
    given = [song for song in songs if song.end_beat_error_given_ms is not None]
    tempi = [is_near(song.tempo_read_bpm, song.tempo_bpm) for song in songs if song.tempo_bpm is not None]
    choruses = [song for song in songs if song.chorus_beats is not None]
    figures |= {"end_beat_given_songs": len(given), "chorus_songs": len(choruses)}
    return figures | ({"tempo_right": float(np.mean(tempi))} if tempi else {})
