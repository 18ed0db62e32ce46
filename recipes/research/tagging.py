"""MagnaTagATune, the 50 most frequent tags: the paper's tagging protocol on that data set's folder (P B.2).

The folder holds annotations_final.csv (tab separated: clip_id, one column of 0 and 1 per tag, mp3_path) and
the clips at mp3_path, directly or under mp3/. Clips in the folders 0 to b are learned from, c chooses the
epoch, d to f are tested (12:1:3). All clips that can be read count, those without any of the tags as well.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from duotok.recipes.evaluation.diagnosis import Diagnosis, Recording
from duotok.recipes.research.probe_data import CLIP_SECONDS, INPUTS, Label, ProbeSet
from duotok.recipes.research.probe_training import (
    ProbeTraining,
    fit_linear,
    pool_codes,
    predict_conformer,
    train_conformer,
)
from duotok.recipes.research.tag_scores import TagScores, score_majority, score_tags
from duotok.tokenizer.common.audio import read_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import TRACKS

ANNOTATIONS = "annotations_final.csv"
TAGS = 50
SPLITS = {"train": "0123456789ab", "validation": "c", "test": "def"}
AUDIO_ROOTS = ("", "mp3", "mp3_all", "audio")
# P table 1: DuoTok.
PAPER_AP, PAPER_AUC = 0.35, 0.87


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One annotated clip whose file is there."""

    id: str
    path: Path
    split: str
    tags: np.ndarray  # [tags] float32 of 0 and 1


@dataclass(frozen=True, kw_only=True)
class Tagging:
    """Scores of the probes on the test clips."""

    tags: tuple[str, ...]
    scores: Mapping[str, TagScores]  # by method: majority, codes_linear, codes_conformer
    clips: Mapping[str, int]  # by split
    missing: int  # annotated clips without a readable file

    def figures(self) -> dict[str, float]:
        """Flat figures."""
        found: dict[str, float] = {f"{split}_clips": count for split, count in self.clips.items()}
        found["missing_clips"] = self.missing
        for method, scores in self.scores.items():
            found |= scores.figures(method)
        conformer = self.scores["codes_conformer"].by_class
        for index, (precision, area) in conformer.items():
            name = self.tags[index].replace(" ", "_")
            found |= {f"tag_{name}_ap": precision, f"tag_{name}_auc": area}
        return found


def read_annotations(folder: Path, count: int = TAGS) -> tuple[tuple[str, ...], list[Clip], int]:
    """The most frequent tags, the clips whose files are there, and how many files are missing.

    The tags are ranked over all annotated clips, whether their files are there or not.
    """
    path = folder / ANNOTATIONS
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; give a folder of MagnaTagATune") from error
    if not rows or rows[0][:1] != ["clip_id"] or rows[0][-1:] != ["mp3_path"] or len(rows[0]) < 3:
        raise DataError(f"{path} must be tab separated with the columns clip_id, tags, mp3_path")
    names, rows = rows[0][1:-1], [row for row in rows[1:] if row]
    for number, row in enumerate(rows, start=2):
        if len(row) != len(names) + 2 or not set(row[1:-1]) <= {"0", "1"}:
            raise DataError(f"{path}, row {number}: expected {len(names)} tags of 0 or 1 and a path")
    marks = np.array([row[1:-1] for row in rows], dtype=np.float32).reshape(len(rows), len(names))
    used = [index for index in np.argsort(-marks.sum(axis=0), kind="stable") if marks[:, index].any()]
    best = used[:count]
    clips = []
    for row, tags in zip(rows, marks[:, best], strict=True):
        found = find_clip(folder, row[-1])
        split = split_of(row[-1])
        if found is not None and split is not None:
            clips.append(Clip(id=row[0], path=found, split=split, tags=tags))
    return tuple(names[index] for index in best), clips, len(rows) - len(clips)


def split_of(mp3_path: str) -> str | None:
    """The split of a clip by its folder's name; None for another folder."""
    first = mp3_path.split("/")[0].lower()
    return next((split for split, folders in SPLITS.items() if len(first) == 1 and first in folders), None)


def find_clip(folder: Path, mp3_path: str) -> Path | None:
    """The file of a clip; None where it is missing."""
    paths = (folder / root / mp3_path for root in AUDIO_ROOTS)
    return next((path for path in paths if path.is_file()), None)


def measure_tagging(diagnosis: Diagnosis) -> Tagging:
    """Encode the clips through both codebooks, train the probes, test them."""
    settings, folder = diagnosis.settings, diagnosis.settings.magnatagatune
    if folder is None:
        raise DataError("tagging needs a folder of MagnaTagATune; give --magnatagatune")
    tags, clips, missing = read_annotations(folder)
    codes: dict[str, Mapping[str, Tensor]] = {}
    for split in SPLITS:
        recordings = [_recording(clip) for clip in clips if clip.split == split]
        if not recordings:
            raise DataError(f"{folder} has no clips in the folders {', '.join(SPLITS[split])} ({split})")
        codes |= diagnosis.encode(recordings, settings.out / "tokens" / f"magnatagatune_{split}")
    label = Label(name="tags", classes=tags, exclusive=False)
    sets = [_probe_set([c for c in clips if c.split == split and c.id in codes], codes) for split in SPLITS]
    train, held_out, test = sets
    clip_frames = round(CLIP_SECONDS * diagnosis.tokenizer.frame_rate_hz)
    training = ProbeTraining(
        clip_frames=clip_frames, epochs=settings.epochs, device=settings.device, seed=settings.seed
    )
    vectors = {track: diagnosis.vectors[track] for track in INPUTS["both"]}
    pooled = [pool_codes(part, vectors, clip_frames) for part in sets]
    truth = [part.truth["tags"] for part in sets]
    linear = fit_linear((pooled[0], truth[0]), (pooled[1], truth[1]), pooled[2], label)
    probe = train_conformer(train, held_out, vectors, [label], training)
    conformer = predict_conformer(probe, test, [label], training)["tags"]
    return Tagging(
        tags=tags,
        scores={
            "majority": score_majority(truth[0], truth[2], exclusive=False),
            "codes_linear": score_tags(truth[2], linear, exclusive=False),
            "codes_conformer": score_tags(truth[2], conformer, exclusive=False),
        },
        clips={split: len(part) for split, part in zip(SPLITS, sets, strict=True)},
        missing=missing + len(clips) - sum(len(part) for part in sets),
    )


def _recording(clip: Clip) -> Recording:
    def read() -> dict[str, Tensor]:
        wave = read_audio(clip.path, channels=1)
        # A mix has no stems: both codebooks hear all of it.
        return dict.fromkeys(TRACKS, wave)

    return Recording(id=clip.id, song=clip.id, split=clip.split, read=read)


def _probe_set(clips: Sequence[Clip], codes: Mapping[str, Mapping[str, Tensor]]) -> ProbeSet:
    return ProbeSet(
        ids=tuple(clip.id for clip in clips),
        songs=tuple(clip.id for clip in clips),
        codes=tuple(codes[clip.id] for clip in clips),
        truth={"tags": np.stack([clip.tags for clip in clips])},
    )
