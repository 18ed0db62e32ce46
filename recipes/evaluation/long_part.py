"""Figures of a song of 180 s: whether it stays in the singer's key, and in time where windows are joined."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.lm.contract import SamplingConfig
from duotok.recipes.accompany.pipeline import Accompanist, Sketches
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.audio_metrics import find_joints, find_middles, mel_flux, phase_errors
from duotok.recipes.evaluation.excerpts import Settings, read_items, spread_over_songs
from duotok.recipes.evaluation.results import standard_error
from duotok.recipes.evaluation.tokenizer_part import compare_keys, read_out_key
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import CHROMA_PER_FRAME, MEL_PER_FRAME, DuoTokenizer, ReadOut
from duotok.tokenizer.music.tempo import onset_envelope

_LEAST_BEATS = 4
_ITEMS, _SECONDS = 6, 180.0
_KEY_SECONDS = 30.0
_SHORTEST_WINDOW = 0.5  # of a window for its key to be read: what is left at the song's end may be shorter


@dataclass(frozen=True, kw_only=True)
class LongSong:
    """Bars of an item, repeated in time."""

    item: Item
    vocal: Tensor  # [2, samples]
    accompaniment: Tensor  # [2, samples], the corpus' own band
    beats_seconds: np.ndarray  # [beats]


def choose_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """At most `count` items with at least two bars, one of each song before a second one of any, by seed."""
    usable = [item for item in items if len(item.downbeats_seconds) > 1 and len(_whole_bars(item)[2]) > 0]
    if not usable:
        raise DataError("no test item has two bars with beats to repeat")
    return spread_over_songs(usable, np.random.default_rng(seed))[:count]


def repeat_bars(item: Item, seconds: float) -> LongSong:
    """Return a song of `seconds` from an item's first bar line to its last one, again and again."""
    start, length, beats = _whole_bars(item)
    samples, bars = round(seconds * SAMPLE_RATE_HZ), round(length * SAMPLE_RATE_HZ)
    times = -(-samples // bars)
    tracks = {
        track: item.read(track, start_seconds=start, seconds=length)[:, :bars].repeat(1, times)[:, :samples]
        for track in ("vocal", "accompaniment")
    }
    placed = np.concatenate([beats + number * bars / SAMPLE_RATE_HZ for number in range(times)])
    return LongSong(item=item, beats_seconds=placed[placed < seconds], **tracks)


def _whole_bars(item: Item) -> tuple[float, float, np.ndarray]:
    """Start and length in seconds of an item's whole bars, and the beats in them from their start on."""
    start, end = item.downbeats_seconds[0], min(item.downbeats_seconds[-1], item.seconds)
    beats = np.asarray(item.beats_seconds, dtype=float) - start
    slack = 1e-3  # times in a manifest are rounded
    beats = beats[(beats >= -slack) & (beats < end - start - slack)].clip(min=0)
    return start, end - start, beats if len(beats) >= _LEAST_BEATS else beats[:0]


@dataclass(frozen=True, kw_only=True)
class Hearing:
    """What is heard in one accompaniment of a long song."""

    keys_agree: list[bool]  # by window of 30 s
    joint_errors: list[float]  # beats, 0 to 0.5, by joint
    inside_errors: list[float]  # the same in the middle of windows


def measure_long(settings: Settings) -> dict[str, float]:
    """Share of 30 s windows in the singer's key; how far the beat moves at joints and inside windows.

    Without an ending read from the generated codes, …_sound from what is rendered of them (settings.sound),
    …_real from the codes of the corpus' own bands.
    """
    accompanist = Accompanist.from_pretrained(settings.bundle)
    tokenizer = accompanist.bundle.tokenizer
    seconds = settings.seconds or _SECONDS
    items = choose_items(read_items(settings), settings.items or _ITEMS, settings.seed)
    hearings: dict[str, list[Hearing]] = {}
    for number, item in enumerate(tqdm(items, desc="long: songs", disable=None)):
        song = repeat_bars(item, seconds)
        sketches = accompanist.compose(song.vocal, seed=settings.seed + number)
        assert isinstance(sketches, Sketches)
        key = item.key or read_out_key(sketches.told, "vocal")
        own = tokenizer.encode(song.accompaniment[None].to(accompanist.device), "accompaniment")
        told = {"": sketches.ranked[0].told, "_real": tokenizer.read_out(own, "accompaniment")}
        for ending, read_out in told.items():
            windows = cut_windows(read_out, tokenizer.frame_rate_hz)
            found = hear(song, key, windows, mel_flux(read_out.mel[0]), tokenizer.frame_rate_hz)
            hearings.setdefault(ending, []).append(found)
        if settings.sound:
            wave = accompanist.perform(sketches, sketches.ranked[0]).accompaniment
            windows = list(measure_windows(tokenizer, wave))
            found = hear(song, key, windows, onset_envelope(wave), tokenizer.frame_rate_hz)
            hearings.setdefault("_sound", []).append(found)
    figures: dict[str, float] = {"songs": len(items), "song_seconds": seconds}
    for ending, found in hearings.items():
        figures |= {f"{name}{ending}": value for name, value in describe(found).items()}
    return figures


def hear(
    song: LongSong, key: str | None, windows: Sequence[ReadOut], envelope: np.ndarray, rate_hz: float
) -> Hearing:
    """Compare windows with the singer's key, and the onsets around joints with the song's beats."""
    frames = round(song.vocal.shape[-1] / SAMPLE_RATE_HZ * rate_hz)
    joints = find_joints(frames, SamplingConfig())
    errors = [
        phase_errors(envelope, song.beats_seconds, [point / rate_hz for point in points])
        for points in (joints, find_middles(frames, joints))
    ]
    agree = [compare_keys(read_out_key(window, "accompaniment"), key)[1] for window in windows]
    return Hearing(keys_agree=agree, joint_errors=errors[0], inside_errors=errors[1])


def describe(hearings: Sequence[Hearing]) -> dict[str, float]:
    """Share of windows in the singer's key or its relative one; mean errors of the beat, in beats.

    Each error has its standard error beside it. Songs of one window have no joints, and no figures of them.
    """
    agree = [value for hearing in hearings for value in hearing.keys_agree]
    figures: dict[str, float] = {"key_windows": len(agree), "key_agreement": float(np.mean(agree))}
    for place in ("joint", "inside"):
        errors = [error for hearing in hearings for error in getattr(hearing, f"{place}_errors")]
        if errors:
            figures[f"{place}_beat_error"] = float(np.mean(errors))
            figures[f"{place}_beat_error_standard_error"] = standard_error(errors)
    return figures


def cut_windows(told: ReadOut, rate_hz: float) -> list[ReadOut]:
    """Cut what codes say into windows of 30 s; a last one of less than half of that goes with none."""
    size = round(_KEY_SECONDS * rate_hz)
    frames = told.chroma.shape[1] // CHROMA_PER_FRAME
    starts = [s for s in range(0, frames, size) if s == 0 or frames - s >= _SHORTEST_WINDOW * size]
    return [
        ReadOut(
            mel=told.mel[:, start * MEL_PER_FRAME : (start + size) * MEL_PER_FRAME],
            chroma=told.chroma[:, start * CHROMA_PER_FRAME : (start + size) * CHROMA_PER_FRAME],
        )
        for start in starts
    ]


def measure_windows(tokenizer: DuoTokenizer, wave: Tensor) -> list[ReadOut]:
    """What can be heard in each window of 30 s of wave [2, samples], in the form of a read-out."""
    size = round(_KEY_SECONDS * SAMPLE_RATE_HZ)
    pieces = [wave[:, start : start + size] for start in range(0, wave.shape[-1], size)]
    kept = [piece for n, piece in enumerate(pieces) if n == 0 or piece.shape[-1] >= _SHORTEST_WINDOW * size]
    return [tokenizer.targets(piece[None]) for piece in kept]
