"""What frozen codes say about the music: probes on code vectors only, next to two anchors (P B.2).

For every label of the corpus (style, key, tempo class, voice): a linear probe on pooled code vectors and a
small Conformer on their sequence, learned from training songs, tested on test songs; the same linear probe on
statistics of the log-mel spectrogram; and the shares of the training songs, which need no input at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.research.diagnosis import Diagnosis
from duotok.recipes.research.probe_training import (
    INPUTS,
    ClipFeatures,
    Label,
    ProbeScores,
    ProbeSet,
    ProbeTraining,
    clip_starts,
    fit_linear,
    pool_codes,
    predict_conformer,
    score_classes,
    train_conformer,
)
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import HOP_SAMPLES, MEL_PER_FRAME, TRACKS
from duotok.tokenizer.music.labels import PITCH_CLASSES, parse_root
from duotok.tokenizer.spectra import LogMel, level_gain

MAJORITY = ("none", "majority")
CLIP_SECONDS = 10.0
TEMPO_CLASSES = 4
MEL_BANDS = 128
_HELD_OUT_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Scores by label, then by (input, method); ("none", "majority") is the anchor without input."""

    labels: tuple[Label, ...]
    scores: Mapping[str, Mapping[tuple[str, str], ProbeScores]]
    train_recordings: int
    test_recordings: int

    def figures(self) -> dict[str, float]:
        """Flat figures: label, input, method, measure."""
        found: dict[str, float] = {
            "train_recordings": self.train_recordings,
            "test_recordings": self.test_recordings,
        }
        for label, by_method in self.scores.items():
            for (seen, method), scores in by_method.items():
                found |= scores.figures(f"{label}_{method}" if seen == "none" else f"{label}_{seen}_{method}")
            found[f"{label}_test_recordings"] = by_method[MAJORITY].recordings
        return found


def measure_probe(diagnosis: Diagnosis) -> ProbeResult:
    """Train and test all probes on the corpus."""
    settings = diagnosis.settings
    clip_frames = round(CLIP_SECONDS * diagnosis.tokenizer.frame_rate_hz)
    labels, borders = name_labels(diagnosis.train_items)
    learning = label_items(diagnosis.train_items, diagnosis.train_codes(), labels, borders)
    test = label_items(diagnosis.test_items, diagnosis.test_codes(), labels, borders)
    kept, held_out = split_songs(learning.songs, _HELD_OUT_SHARE, settings.seed)
    sets = (learning.take(kept), learning.take(held_out), test)
    # A label counts where the test recordings can tell one class of it from another.
    labels = [label for label in labels if _is_testable(test.truth[label.name])]
    if not labels:
        raise DataError(f"the test items in {settings.corpus} differ in nothing that training items have")
    training = ProbeTraining(
        clip_frames=clip_frames, epochs=settings.epochs, device=settings.device, seed=settings.seed
    )
    scores: dict[str, dict[tuple[str, str], ProbeScores]] = {
        label.name: {MAJORITY: score_majority(learning.truth[label.name], test.truth[label.name])}
        for label in labels
    }
    mel = None
    if settings.mel:
        readable = {*learning.ids, *test.ids}
        items = [i for i in (*diagnosis.train_items, *diagnosis.test_items) if i.id in readable]
        mel = measure_mel(items, clip_frames)
    for seen, tracks in INPUTS.items():
        vectors = {track: diagnosis.vectors[track] for track in tracks}
        features = {"codes_linear": [pool_codes(part, vectors, clip_frames) for part in sets]}
        if mel is not None:
            features["mel_linear"] = [_join_mel(part, mel, tracks) for part in sets]
        for method, parts in features.items():
            for label in tqdm(labels, desc=f"{method}, {seen}", disable=None):
                train, checked = ((parts[i], sets[i].truth[label.name]) for i in (0, 1))
                found = fit_linear(train, checked, parts[2], label)
                scores[label.name][seen, method] = score_classes(test.truth[label.name], found)
        probe = train_conformer(sets[0], sets[1], vectors, labels, training)
        for name, found in predict_conformer(probe, test, labels, training).items():
            scores[name][seen, "codes_conformer"] = score_classes(test.truth[name], found)
    return ProbeResult(
        labels=tuple(labels), scores=scores, train_recordings=len(learning), test_recordings=len(test)
    )


def _is_testable(truth: np.ndarray) -> bool:
    known = truth[~np.isnan(truth).any(axis=1)]
    return len(known) > 0 and bool(((known.sum(axis=0) > 0) & (known.sum(axis=0) < len(known))).any())


def name_labels(items: Sequence[Item]) -> tuple[list[Label], np.ndarray]:
    """The labels that training items have, and the borders of the tempo classes in beats per minute.

    Tempo classes are equally large parts of the training items. A label of one class only is left out.
    """
    shares = np.linspace(0, 1, TEMPO_CLASSES + 1)[1:-1]
    tempi = [item.tempo_bpm for item in items if item.tempo_bpm is not None]
    borders = np.unique(np.quantile(tempi, shares).round(1)) if tempi else np.zeros(0)
    edges = ["", *(f"{border:g}" for border in borders), ""]
    classes = {
        "style": sorted({item.style for item in items}),
        "key": [f"{tonic}:{mode}" for mode in ("maj", "min") for tonic in PITCH_CLASSES],
        "tempo": [f"{low}-{high} bpm" for low, high in pairwise(edges)],
        "voice": sorted({item.voice for item in items}),
    }
    return [Label(name=name, classes=tuple(own)) for name, own in classes.items() if len(own) > 1], borders


def label_items(
    items: Sequence[Item],
    codes: Mapping[str, Mapping[str, Tensor]],
    labels: Sequence[Label],
    borders: np.ndarray,
) -> ProbeSet:
    """The probe's view of the items that have codes.

    What nobody knows of an item does not count, nor does a class that training did not have.
    """
    items = [item for item in items if item.id in codes]
    truth = {label.name: np.full((len(items), len(label.classes)), np.nan, np.float32) for label in labels}
    for row, item in enumerate(items):
        key = None if item.key is None else normalize_key(item.key)
        found = {"style": item.style, "key": key, "voice": item.voice}
        for label in labels:
            name = found.get(label.name)
            if label.name == "tempo" and item.tempo_bpm is not None:
                name = label.classes[int(np.searchsorted(borders, item.tempo_bpm, side="right"))]
            if name in label.classes:
                truth[label.name][row] = [name == one for one in label.classes]
    return ProbeSet(
        ids=tuple(item.id for item in items),
        songs=tuple(item.song for item in items),
        codes=tuple(codes[item.id] for item in items),
        truth=truth,
    )


def normalize_key(key: str) -> str:
    """The key with one name for each tonic: "D#:min" -> "Eb:min"."""
    tonic, _, mode = key.partition(":")
    return f"{PITCH_CLASSES[parse_root(tonic)]}:{mode}"


def split_songs(songs: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the recordings to learn from and of those held out; no song is on both sides."""
    names = sorted(set(songs))
    if len(names) < 2:
        raise DataError("the probe needs recordings of at least two songs to learn from")
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[index] for index in order[: min(len(names) - 1, max(1, round(share * len(names))))]}
    kept = [index for index, song in enumerate(songs) if song not in held_out]
    return kept, [index for index, song in enumerate(songs) if song in held_out]


def score_majority(train: np.ndarray, test: np.ndarray) -> ProbeScores:
    """Scores of always answering the classes' shares of the training recordings: the anchor without input."""
    return score_classes(test, np.tile(np.nanmean(train, axis=0), (len(test), 1)))


def measure_mel(items: Sequence[Item], clip_frames: int) -> dict[str, dict[str, Tensor]]:
    """Mean and deviation over time of each clip's log-mel: item id -> track -> [clips, 2 * MEL_BANDS]."""
    log_mel = LogMel(MEL_BANDS)
    found: dict[str, dict[str, Tensor]] = {}
    for item in tqdm(items, desc="mel", disable=None):
        waves = {track: item.read(track).mean(dim=0, keepdim=True) for track in TRACKS}
        found[item.id] = {track: pool_mel(wave, log_mel, clip_frames) for track, wave in waves.items()}
    return found


def pool_mel(wave: Tensor, log_mel: LogMel, clip_frames: int) -> Tensor:
    """Mean and deviation of the bands in each clip of wave [1, samples]: [clips, 2 * bands]."""
    wave = functional.pad(wave, (0, -wave.shape[-1] % HOP_SAMPLES))
    mel = log_mel(wave * level_gain(wave))[0]  # [MEL_PER_FRAME * frames, bands]
    starts = clip_starts(len(mel) // MEL_PER_FRAME, clip_frames)
    clips = [mel[MEL_PER_FRAME * start :][: MEL_PER_FRAME * clip_frames] for start in starts]
    return torch.stack([torch.cat([clip.mean(dim=0), clip.std(dim=0)]) for clip in clips])


def _join_mel(
    recordings: ProbeSet, statistics: Mapping[str, Mapping[str, Tensor]], tracks: Sequence[str]
) -> ClipFeatures:
    """Features of the recordings' clips, tracks side by side."""
    rows = [
        torch.cat([statistics[name][track] for track in tracks], dim=1).numpy() for name in recordings.ids
    ]
    owners = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return ClipFeatures(rows=np.concatenate(rows), owners=owners)
