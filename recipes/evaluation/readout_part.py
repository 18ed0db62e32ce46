"""Figures of what codes alone tell about music: chords, key and activity of each track, the lead sheet.

Three sources are judged by the same readers: the codes, the audio's own chroma and mel (how much the codes
lose), and a constant guess (what is right without listening).
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mir_eval
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.sheet.columns import CHORD, UNKNOWN, write_sheet
from duotok.lm.sheet.reader import SheetReader
from duotok.lm.sheet.tracking import places_between
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, read_items
from duotok.recipes.lm.sheets import agree, label_frames, measure_agreement
from duotok.recipes.tokenizer.train_harmony_reader import is_labelled
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import HOP_SAMPLES, TRACKS, DuoTokenizer, ReadOut
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity
from duotok.tokenizer.music.harmony import estimate_chords, read_key
from duotok.tokenizer.music.labels import key_of, triad_of
from duotok.tokenizer.spectra import level_gain

_GUESSED_BAR_SECONDS = 2.4  # four beats at 100 per minute
_LONGEST_SECONDS = 60.0
_SOUNDING_DB = -45.0  # RMS of 40 ms; 25 dB below the level that the active parts are brought to
Chord = tuple[float, float, str]  # start, end in seconds, label


def measure_sheets(
    reader: SheetReader, tokenizer: DuoTokenizer, excerpts: Sequence[Excerpt]
) -> dict[str, float]:
    """Agreement of the read sheets, and (_constant) of steady bars and these songs' commonest chord."""
    songs = []
    for excerpt in tqdm(excerpts, desc="readouts, lead sheet", disable=None):
        codes = tokenizer.encode(excerpt.read("vocal")[None], "vocal")[0]
        written = label_frames(excerpt.item, tokenizer.frame_rate_hz)[: len(codes)]
        songs.append((codes[: len(written)], written))
    figures = {f"sheet_{name}": value for name, value in measure_agreement(reader, songs).items()}
    guessed = agree((_guess(songs, tokenizer.frame_rate_hz, len(codes)), written) for codes, written in songs)
    return figures | {f"sheet_{name}_constant": value for name, value in guessed.items()}


def _guess(songs: Sequence[tuple[Tensor, Tensor]], rate_hz: float, frames: int) -> Tensor:
    known = (chord for _, written in songs for chord in written[:, CHORD].tolist() if chord != UNKNOWN)
    bar = _GUESSED_BAR_SECONDS * rate_hz
    places = places_between(np.arange(0, frames + 2 * bar, bar), frames)
    return write_sheet(places, np.full(frames, Counter(known).most_common(1)[0][0]))


class Share(NamedTuple):
    """Part of a whole, in seconds or frames."""

    right: float
    counted: float


def measure_readouts(settings: Settings) -> dict[str, float]:
    """Accuracy of chords (mir_eval majmin, weighted by duration) and keys, and F1 of activity, per track.

    Names without an ending are read from codes, those that end in _audio from the audio's chroma and mel.
    sheet_: what the language model's reader of lead sheets makes of the vocal.
    """
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    excerpts = choose_labelled(read_items(settings), settings)
    figures: dict[str, float] = {"excerpts": len(excerpts)}
    for track in TRACKS:
        for ending, readings in (("", _read_codes), ("_audio", _read_audio)):
            name = f"readouts, {track}{ending}"
            found = list(
                tqdm(readings(tokenizer, excerpts, track), total=len(excerpts), desc=name, disable=None)
            )
            figures |= {
                f"{key}_{track}{ending}": value for key, value in judge(found, excerpts, track).items()
            }
    lm = DualTrackLM.from_pretrained(settings.bundle / "lm")
    if lm.sheet_reader is not None:
        figures |= measure_sheets(lm.sheet_reader, tokenizer, excerpts)
    return figures | guess(excerpts)


def choose_labelled(items: Sequence[Item], settings: Settings) -> list[Excerpt]:
    """The first minute of every test item with chords and key; of `settings.items` of them chosen by seed."""
    labelled = [item for item in items if is_labelled(item)]
    if not labelled:
        raise DataError("no test item has chords and a key to compare with")
    order = np.random.default_rng(settings.seed).permutation(len(labelled))[: settings.items]
    longest = settings.seconds or _LONGEST_SECONDS
    return [
        Excerpt(item=labelled[index], start_seconds=0.0, seconds=min(labelled[index].seconds, longest))
        for index in sorted(order)
    ]


class Reading(NamedTuple):
    """One track of an excerpt."""

    told: ReadOut  # batch of one
    sounding: np.ndarray  # [frames] what the wave says


def _read_codes(tokenizer: DuoTokenizer, excerpts: Sequence[Excerpt], track: str) -> Iterator[Reading]:
    for excerpt in excerpts:
        wave = excerpt.read(track)[None]
        yield Reading(tokenizer.read_out(tokenizer.encode(wave, track), track), find_sound(wave))


def _read_audio(tokenizer: DuoTokenizer, excerpts: Sequence[Excerpt], track: str) -> Iterator[Reading]:
    for excerpt in excerpts:
        wave = excerpt.read(track)[None]
        yield Reading(tokenizer.targets(wave), find_sound(wave))


def judge(readings: Sequence[Reading], excerpts: Sequence[Excerpt], track: str) -> dict[str, float]:
    """The figures of one track from one source, named without both."""
    chords, keys, hits, said, sounded = [], [], 0, 0, 0
    for reading, excerpt in zip(readings, excerpts, strict=True):
        chroma = reading.told.chroma[0].double().numpy()
        active = estimate_activity(reading.told.mel[0])
        sounding = at_chroma_rate(active)
        found = estimate_chords(chroma, CHROMA_RATE_HZ, sounding=sounding)
        chords.append(compare_chords(found, excerpt.item.chords, excerpt.seconds))
        key = read_key(chroma, CHROMA_RATE_HZ, track, sounding=sounding)
        keys.append(compare_keys(None if key is None else str(key), excerpt.item.key))
        hits += int((active & reading.sounding).sum())
        said += int(active.sum())
        sounded += int(reading.sounding.sum())
    exact, near = np.mean(keys, axis=0)
    return {
        "chord_accuracy": _overall(chords),
        "key_accuracy": float(exact),
        "key_accuracy_or_relative": float(near),
        "activity_f1": 2 * hits / max(said + sounded, 1),
    }


def guess(excerpts: Sequence[Excerpt]) -> dict[str, float]:
    """What the commonest chord and key of these excerpts, always sounding, would have reached."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for excerpt in excerpts:
        for start, end, label in excerpt.item.chords:
            if triad_of(label) >= 0:
                seconds[label.split(":")[0] + (":min" if triad_of(label) >= 12 else ":maj")] += end - start
    chord = max(seconds, key=lambda name: seconds[name])
    key = Counter(excerpt.item.key for excerpt in excerpts).most_common(1)[0][0]
    chords = [compare_chords([(0.0, e.seconds, chord)], e.item.chords, e.seconds) for e in excerpts]
    exact, near = np.mean([compare_keys(key, excerpt.item.key) for excerpt in excerpts], axis=0)
    figures = {
        "chord_accuracy_constant": _overall(chords),
        "key_accuracy_constant": float(exact),
        "key_accuracy_or_relative_constant": float(near),
    }
    for track in TRACKS:
        share = float(np.concatenate([find_sound(e.read(track)[None]) for e in excerpts]).mean())
        figures[f"activity_f1_{track}_constant"] = 2 * share / (1 + share)
    return figures


def compare_chords(found: Sequence[Chord], wanted: Sequence[Chord], seconds: float) -> Share:
    """Seconds with the right chord of those that count (mir_eval majmin), in the first `seconds`."""
    reference = [(start, min(end, seconds), label) for start, end, label in wanted if start < seconds]
    intervals, labels = _split(reference)
    none = mir_eval.chord.NO_CHORD
    found_intervals, found_labels = mir_eval.util.adjust_intervals(
        *_split(found), t_min=intervals.min(), t_max=intervals.max(), start_label=none, end_label=none
    )
    merged, reference_labels, found_labels = mir_eval.util.merge_labeled_intervals(
        intervals, labels, found_intervals, found_labels
    )
    durations = mir_eval.util.intervals_to_durations(merged)
    scores = mir_eval.chord.majmin(reference_labels, found_labels)
    counts = scores >= 0  # -1: neither major nor minor
    return Share(float((scores * durations)[counts].sum()), float(durations[counts].sum()))


def compare_keys(found: str | None, wanted: str | None) -> tuple[bool, bool]:
    """Whether a key is right, and whether it is right or the relative one."""
    if found is None or wanted is None:
        return False, False
    key = key_of(wanted)
    relative = 12 + (key + 9) % 12 if key < 12 else (key + 3) % 12
    return key_of(found) == key, key_of(found) in (key, relative)


def find_sound(wave: Tensor) -> np.ndarray:
    """Whether each 40 ms of wave [1, channels, samples] is within 25 dB of the active level: [frames]."""
    mono = wave.mean(dim=1)
    mono = torch.nn.functional.pad(mono, (0, -mono.shape[-1] % HOP_SAMPLES))
    power = (mono * level_gain(mono)).unflatten(-1, (-1, HOP_SAMPLES)).square().mean(dim=-1)[0]
    return (10 * power.clamp_min(1e-12).log10() > _SOUNDING_DB).numpy()


def _split(chords: Sequence[Chord]) -> tuple[np.ndarray, list[str]]:
    return np.array([chord[:2] for chord in chords], dtype=float), [chord[2] for chord in chords]


def _overall(shares: Sequence[Share]) -> float:
    """All seconds alike, whichever excerpt they are in."""
    return sum(share.right for share in shares) / max(sum(share.counted for share in shares), 1e-9)
