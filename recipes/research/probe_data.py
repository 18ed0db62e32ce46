"""What a probe learns from, codes cut into clips and labels, and how its answers are scored (P B.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from duotok.recipes.corpus.manifest import Item
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import PITCH_CLASSES, parse_root

CLIP_SECONDS = 10.0
TEMPO_CLASSES = 4
# What a probe sees: one track's code vectors, or both tracks' side by side.
INPUTS: dict[str, tuple[str, ...]] = {
    "vocal": ("vocal",),
    "accompaniment": ("accompaniment",),
    "both": ("vocal", "accompaniment"),
}


@dataclass(frozen=True, kw_only=True)
class Label:
    """Something to be read out of the codes."""

    name: str
    classes: tuple[str, ...]  # every recording has exactly one


@dataclass(frozen=True, kw_only=True)
class ProbeSet:
    """Recordings with their truth."""

    ids: tuple[str, ...]
    songs: tuple[str, ...]
    codes: tuple[Mapping[str, Tensor], ...]  # by track [frames] int64
    truth: Mapping[str, np.ndarray]  # by label [recordings, classes] of 0 and 1; a row of NaN = not known

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Sequence[int]) -> "ProbeSet":
        """The recordings with these indices."""
        return ProbeSet(
            ids=tuple(self.ids[index] for index in indices),
            songs=tuple(self.songs[index] for index in indices),
            codes=tuple(self.codes[index] for index in indices),
            truth={name: rows[list(indices)] for name, rows in self.truth.items()},
        )


def name_labels(items: Sequence[Item]) -> tuple[list[Label], np.ndarray]:
    """The labels that training items have, and the borders of the tempo classes in beats per minute.

    Tempo classes are equally large parts of the training items. A label of which there is one class only
    is left out.
    """
    shares = np.linspace(0, 1, TEMPO_CLASSES + 1)[1:-1]
    tempi = [item.tempo_bpm for item in items if item.tempo_bpm is not None]
    borders = np.unique(np.quantile(tempi, shares).round(1)) if tempi else np.zeros(0)
    edges = ["", *(f"{border:g}" for border in borders), ""]
    labels = [
        Label(name="style", classes=tuple(sorted({item.style for item in items}))),
        Label(
            name="key", classes=tuple(f"{tonic}:{mode}" for mode in ("maj", "min") for tonic in PITCH_CLASSES)
        ),
        Label(name="tempo", classes=tuple(f"{low}-{high} bpm" for low, high in pairwise(edges))),
        Label(name="voice", classes=tuple(sorted({item.voice for item in items}))),
    ]
    return [label for label in labels if len(label.classes) > 1], borders


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
        found = {
            "style": item.style,
            "key": None if item.key is None else normalize_key(item.key),
            "voice": item.voice,
        }
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


def clip_starts(frames: int, clip_frames: int) -> list[int]:
    """First frames of the fewest clips, evenly spread, that cover so many frames."""
    count = max(1, math.ceil(frames / clip_frames))
    return np.linspace(0, max(0, frames - clip_frames), count).round().astype(int).tolist()


def cut_clip(codes: Tensor, start: int, clip_frames: int) -> Tensor:
    """clip_frames codes of codes [frames] from `start` on; what is shorter is repeated."""
    return codes[torch.arange(start, start + clip_frames) % len(codes)]


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """Scores of one label over the recordings for which its truth is known."""

    accuracy: float  # share of recordings whose likeliest class is right
    average_precision: float  # mean over classes (P 4.3, macro)
    roc_auc: float  # mean over classes
    recordings: int

    def figures(self, name: str) -> dict[str, float]:
        """Flat figures, `name` leading."""
        return {
            f"{name}_accuracy": self.accuracy,
            f"{name}_macro_ap": self.average_precision,
            f"{name}_macro_auc": self.roc_auc,
        }


def score_classes(truth: np.ndarray, scores: np.ndarray) -> ProbeScores:
    """Compare scores [recordings, classes] with truth [recordings, classes] of 0 and 1.

    Rows of truth that are NaN are not known and do not count; neither do classes without both a positive and
    a negative recording.
    """
    known = ~np.isnan(truth).any(axis=1)
    truth, scores = truth[known], scores[known]
    both = (truth.sum(axis=0) > 0) & (truth.sum(axis=0) < len(truth))
    if not both.any():
        raise DataError("no class has both a positive and a negative test recording; use more test items")
    return ProbeScores(
        accuracy=float((truth.argmax(axis=1) == scores.argmax(axis=1)).mean()),
        average_precision=float(average_precision_score(truth[:, both], scores[:, both], average="macro")),
        roc_auc=float(roc_auc_score(truth[:, both], scores[:, both], average="macro")),
        recordings=len(truth),
    )


def score_majority(train: np.ndarray, test: np.ndarray) -> ProbeScores:
    """Scores of always answering the classes' shares of the training recordings: the anchor without input."""
    return score_classes(test, np.tile(np.nanmean(train, axis=0), (len(test), 1)))
