"""Training the probes: the Conformer by gradient steps, the linear one by logistic regression."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.research.probe_data import Label, ProbeSet, clip_starts, cut_clip
from duotok.recipes.research.probe_model import ConformerConfig, ConformerProbe
from duotok.recipes.research.tag_scores import score_tags
from duotok.tokenizer.common.errors import DataError

STRENGTHS = (0.003, 0.03, 0.3)  # of the linear probe: the inverse of its regularization
Probabilities = dict[str, np.ndarray]  # by label [recordings, classes]


@dataclass(frozen=True, kw_only=True)
class ProbeTraining:
    """How a Conformer probe is trained."""

    clip_frames: int
    epochs: int = 10
    batch: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ClipFeatures:
    """Numbers describing the clips of recordings, for the linear probe."""

    rows: np.ndarray  # [clips, width]
    owners: np.ndarray  # [clips] index of the clip's recording


def train_conformer(
    train: ProbeSet,
    held_out: ProbeSet,
    vectors: Mapping[str, Tensor],
    labels: Sequence[Label],
    training: ProbeTraining,
    config: ConformerConfig | None = None,
) -> ConformerProbe:
    """Train one probe for all labels on random clips; return its state of the best held-out epoch.

    vectors: the frozen code vectors of the tracks it sees. Best: mean of the labels' macro AP.
    """
    generator = np.random.default_rng(training.seed)
    torch.manual_seed(training.seed)
    classes = {label.name: len(label.classes) for label in labels}
    probe = ConformerProbe(vectors, classes, config or ConformerConfig()).to(training.device)
    optimizer = torch.optim.AdamW(
        probe.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    clips = sum(len(clip_starts(len(codes["vocal"]), training.clip_frames)) for codes in train.codes)
    steps = training.epochs * -(-clips // training.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    best, best_state = -1.0, {name: value.clone() for name, value in probe.state_dict().items()}
    with tqdm(total=steps, desc=f"probe, {'+'.join(vectors)}", disable=None) as progress:
        for _ in range(training.epochs):
            probe.train()
            for batch, truth in _random_clips(train, tuple(vectors), training, generator):
                loss = _loss(probe(batch), truth, labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
            found = mean_precision(held_out, predict_conformer(probe, held_out, labels, training), labels)
            if found >= best:  # of equally good ones the longest trained
                best, best_state = found, {name: value.clone() for name, value in probe.state_dict().items()}
            progress.set_postfix(held_out_ap=f"{found:.3f}")
    probe.load_state_dict(best_state)
    return probe.eval()


@torch.inference_mode()
def predict_conformer(
    probe: ConformerProbe, recordings: ProbeSet, labels: Sequence[Label], training: ProbeTraining
) -> Probabilities:
    """Probabilities by label, the mean over each recording's clips."""
    probe.eval()
    pairs = [
        (index, start)
        for index, codes in enumerate(recordings.codes)
        for start in clip_starts(len(codes[probe.tracks[0]]), training.clip_frames)
    ]
    parts: dict[str, list[np.ndarray]] = {label.name: [] for label in labels}
    for first in range(0, len(pairs), 4 * training.batch):
        logits = probe(_stack(recordings, probe.tracks, pairs[first : first + 4 * training.batch], training))
        for label in labels:
            found = logits[label.name].float()
            found = found.softmax(dim=-1) if label.exclusive else found.sigmoid()
            parts[label.name].append(found.cpu().numpy())
    owners = np.array([index for index, _ in pairs])
    return {name: mean_by_owner(np.concatenate(rows), owners) for name, rows in parts.items()}


def fit_linear(
    train: tuple[ClipFeatures, np.ndarray],
    held_out: tuple[ClipFeatures, np.ndarray],
    test: ClipFeatures,
    label: Label,
) -> np.ndarray:
    """Probabilities [test recordings, classes] by logistic regression on clip features.

    train, held_out: features and truth [recordings, classes]. The regularization is the one that is best on
    the held-out recordings; the test ones are only looked at with it.
    """
    features, truth = train
    unknown = np.flatnonzero(np.isnan(truth).any(axis=1))
    used = ~np.isin(features.owners, unknown)
    rows, answers = features.rows[used], truth[features.owners[used]]
    if len(rows) == 0:
        raise DataError(f"no recording to learn from has a known {label.name}")
    middle, spread = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    rows, checked, asked = ((part - middle) / spread for part in (rows, held_out[0].rows, test.rows))
    best, predictions = -1.0, np.zeros((int(test.owners.max()) + 1, len(label.classes)))
    for strength in STRENGTHS:
        models = _fit_models(rows, answers, strength, label.exclusive)
        found = mean_by_owner(_apply_models(models, checked, len(label.classes)), held_out[0].owners)
        scored = _precision(held_out[1], found, label)
        if scored > best:
            best = scored
            predictions = mean_by_owner(_apply_models(models, asked, len(label.classes)), test.owners)
    return predictions


def pool_codes(recordings: ProbeSet, vectors: Mapping[str, Tensor], clip_frames: int) -> ClipFeatures:
    """Mean and deviation over time of each clip's code vectors, tracks side by side."""
    rows, owners = [], []
    for index, codes in enumerate(recordings.codes):
        for start in clip_starts(len(next(iter(codes.values()))), clip_frames):
            parts = [table[cut_clip(codes[track], start, clip_frames)] for track, table in vectors.items()]
            clip = torch.cat(parts, dim=-1)  # [clip_frames, width]
            rows.append(torch.cat([clip.mean(dim=0), clip.std(dim=0)]).numpy())
            owners.append(index)
    return ClipFeatures(rows=np.stack(rows), owners=np.array(owners))


def mean_by_owner(rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Mean of the rows [clips, classes] of each owner: [recordings, classes]."""
    sums = np.zeros((int(owners.max()) + 1, rows.shape[1]))
    np.add.at(sums, owners, rows)
    return sums / np.bincount(owners)[:, None]


def mean_precision(recordings: ProbeSet, found: Probabilities, labels: Sequence[Label]) -> float:
    """Mean over labels of the macro AP; a label that these recordings cannot test counts as 0."""
    return float(
        np.mean([_precision(recordings.truth[label.name], found[label.name], label) for label in labels])
    )


def _precision(truth: np.ndarray, found: np.ndarray, label: Label) -> float:
    try:
        return score_tags(truth, found, exclusive=label.exclusive).average_precision
    except DataError:
        return 0.0


def _random_clips(
    recordings: ProbeSet, tracks: Sequence[str], training: ProbeTraining, generator: np.random.Generator
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """One epoch: as many clips of each recording as cover it, each from a random place."""
    pairs = []
    for index, codes in enumerate(recordings.codes):
        frames = len(codes[tracks[0]])
        for _ in clip_starts(frames, training.clip_frames):
            pairs.append((index, int(generator.integers(0, max(1, frames - training.clip_frames + 1)))))
    order = generator.permutation(len(pairs))
    for first in range(0, len(order), training.batch):
        chosen = [pairs[place] for place in order[first : first + training.batch]]
        owners = [index for index, _ in chosen]
        truth = {
            name: torch.from_numpy(rows[owners]).to(training.device)
            for name, rows in recordings.truth.items()
        }
        yield _stack(recordings, tracks, chosen, training), truth


def _stack(
    recordings: ProbeSet, tracks: Sequence[str], pairs: Sequence[tuple[int, int]], training: ProbeTraining
) -> dict[str, Tensor]:
    return {
        track: torch.stack(
            [cut_clip(recordings.codes[index][track], start, training.clip_frames) for index, start in pairs]
        ).to(training.device)
        for track in tracks
    }


def _loss(logits: Mapping[str, Tensor], truth: Mapping[str, Tensor], labels: Sequence[Label]) -> Tensor:
    """Sum over labels of the cross-entropy in nats of what is known."""
    losses = []
    for label in labels:
        wanted = truth[label.name]
        known = ~wanted.isnan().any(dim=1)
        found, wanted = logits[label.name][known], wanted[known]
        if len(wanted) == 0:
            continue
        if label.exclusive:
            losses.append(functional.cross_entropy(found, wanted))
        else:
            losses.append(functional.binary_cross_entropy_with_logits(found, wanted))
    return torch.stack(losses).sum() if losses else next(iter(logits.values())).sum() * 0.0


def _fit_models(
    rows: np.ndarray, answers: np.ndarray, strength: float, exclusive: bool
) -> list[tuple[list[int], LogisticRegression | float]]:
    """Models with the classes they tell: one for all classes or one per tag; a share where all are alike."""
    if exclusive:
        return [_fit_one(rows, answers.argmax(axis=1), strength, None)]
    return [_fit_one(rows, answers[:, tag].astype(int), strength, tag) for tag in range(answers.shape[1])]


def _fit_one(
    rows: np.ndarray, wanted: np.ndarray, strength: float, tag: int | None
) -> tuple[list[int], LogisticRegression | float]:
    present = sorted(set(wanted.tolist()))
    if len(present) == 1:
        return ([present[0]], 1.0) if tag is None else ([tag], float(present[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out songs judge what it has found
        model = LogisticRegression(C=strength, max_iter=300).fit(rows, wanted)
    return (present, model) if tag is None else ([tag], model)


def _apply_models(
    models: list[tuple[list[int], LogisticRegression | float]], rows: np.ndarray, classes: int
) -> np.ndarray:
    """Probabilities [clips, classes]."""
    found = np.zeros((len(rows), classes))
    for told, model in models:
        if not isinstance(model, LogisticRegression):
            found[:, told] = model
        else:
            answered = np.asarray(model.predict_proba(rows))
            found[:, told] = answered if len(told) == answered.shape[1] else answered[:, 1:]
    return found
