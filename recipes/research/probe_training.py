"""The probes: logistic regression, and a small Conformer on frozen code vectors; what they learn from and
how their answers are scored (P B.2).

The Conformer has one linear head per label. Blocks as in Gulati et al. (2020): half a feed-forward,
attention, convolution, half a feed-forward, all pre-norm. Positions come from the depthwise convolutions.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from duotok.tokenizer.common.errors import DataError

STRENGTHS = (0.003, 0.03, 0.3)  # of the linear probe: the inverse of its regularization
# What a probe sees: one track's code vectors, or both tracks' side by side.
INPUTS: dict[str, tuple[str, ...]] = {
    "vocal": ("vocal",),
    "accompaniment": ("accompaniment",),
    "both": ("vocal", "accompaniment"),
}
Probabilities = dict[str, np.ndarray]  # by label [recordings, classes]


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


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Settings of the probe."""

    dim: int = 64  # divides into the heads
    heads: int = 4
    blocks: int = 2
    expansion: int = 4  # of the feed-forwards
    kernel: int = 15  # steps under the depthwise convolution, odd
    stride: int = 4  # frames per step
    dropout: float = 0.2
    hidden_share: float = 0.1  # share of the frames that are hidden from the probe in training


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, gated depthwise convolution, half a feed-forward, a norm."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, wide = config.dim, config.expansion * config.dim
        self.before, self.after = (
            nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, wide),
                nn.SiLU(),
                nn.Dropout(config.dropout),
                nn.Linear(wide, dim),
                nn.Dropout(config.dropout),
            )
            for _ in range(2)
        )
        self.heads = config.heads
        self.attention_norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.gated = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GLU())
        self.depthwise = nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim)
        # The norm is of one clip, where the paper's batch norm is of all.
        self.convolved = nn.Sequential(
            nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim), nn.Dropout(config.dropout)
        )
        self.attended = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(config.dropout))
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        features = features + self.before(features) / 2
        qkv = self.qkv(self.attention_norm(features)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, steps, dim / heads]
        mixed = functional.scaled_dot_product_attention(query, key, value)
        features = features + self.attended(mixed.transpose(1, 2).flatten(-2))
        hidden = self.depthwise(self.gated(features).transpose(1, 2)).transpose(1, 2)
        features = features + self.convolved(hidden)
        return self.norm(features + self.after(features) / 2)


class ConformerProbe(nn.Module):
    """Logits of every label from the codes of one or more tracks; the code vectors stay as they are."""

    def __init__(
        self, vectors: Mapping[str, Tensor], classes: Mapping[str, int], config: ConformerConfig
    ) -> None:
        """vectors: by track [codes, code_dim]; classes: number of them by label."""
        super().__init__()
        self.config = config
        self.tracks = tuple(vectors)
        for track, table in vectors.items():
            self.register_buffer(f"vectors_{track}", table)
        width = sum(table.shape[1] for table in vectors.values())
        self.project = nn.Conv1d(width, config.dim, 2 * config.stride - 1, config.stride, config.stride - 1)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.blocks))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * config.dim, size) for name, size in classes.items()})

    def forward(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """codes: by track [batch, frames] -> {label: logits [batch, classes]}."""
        tables = {track: self.get_buffer(f"vectors_{track}") for track in self.tracks}
        parts = [functional.embedding(codes[track], table) for track, table in tables.items()]
        features = torch.cat(parts, dim=-1)  # [batch, frames, width]
        if self.training and self.config.hidden_share > 0:
            shown = torch.rand(features.shape[:2], device=features.device) >= self.config.hidden_share
            features = features * shown[..., None]
        hidden = self.project(features.transpose(1, 2)).transpose(1, 2)  # [batch, steps, dim]
        for block in self.blocks:
            hidden = block(hidden)
        pooled = torch.cat([hidden.mean(dim=1), hidden.amax(dim=1)], dim=-1)
        return {name: head(pooled) for name, head in self.heads.items()}


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
    rate = training.learning_rate
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=training.weight_decay)
    clips = sum(len(clip_starts(len(codes["vocal"]), training.clip_frames)) for codes in train.codes)
    steps = training.epochs * -(-clips // training.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
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
            told = predict_conformer(probe, held_out, labels, training)
            found = float(np.mean([_precision(held_out.truth[name], own) for name, own in told.items()]))
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
            parts[label.name].append(logits[label.name].float().softmax(dim=-1).cpu().numpy())
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
        predict = _fit_classes(rows, answers, strength)
        scored = _precision(held_out[1], mean_by_owner(predict(checked), held_out[0].owners))
        if scored > best:
            best, predictions = scored, mean_by_owner(predict(asked), test.owners)
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


def _precision(truth: np.ndarray, found: np.ndarray) -> float:
    """The macro AP; of a label that these recordings cannot test 0."""
    try:
        return score_classes(truth, found).average_precision
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
        rows = {name: torch.from_numpy(known[owners]) for name, known in recordings.truth.items()}
        truth = {name: known.to(training.device) for name, known in rows.items()}
        yield _stack(recordings, tracks, chosen, training), truth


def _stack(
    recordings: ProbeSet, tracks: Sequence[str], pairs: Sequence[tuple[int, int]], training: ProbeTraining
) -> dict[str, Tensor]:
    stacked = {}
    for track in tracks:
        clips = [cut_clip(recordings.codes[i][track], start, training.clip_frames) for i, start in pairs]
        stacked[track] = torch.stack(clips).to(training.device)
    return stacked


def _loss(logits: Mapping[str, Tensor], truth: Mapping[str, Tensor], labels: Sequence[Label]) -> Tensor:
    """Sum over labels of the cross-entropy in nats of what is known."""
    losses = []
    for label in labels:
        wanted = truth[label.name]
        known = ~wanted.isnan().any(dim=1)
        found, wanted = logits[label.name][known], wanted[known]
        if len(wanted):
            losses.append(functional.cross_entropy(found, wanted))
    return torch.stack(losses).sum() if losses else next(iter(logits.values())).sum() * 0.0


def _fit_classes(
    rows: np.ndarray, answers: np.ndarray, strength: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Fit on clips [clips, width] with answers [clips, classes]; return what gives clips' probabilities."""
    wanted = answers.argmax(axis=1)
    present = np.unique(wanted)
    model = None
    if len(present) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the held-out songs judge what it has found
            model = LogisticRegression(C=strength, max_iter=300).fit(rows, wanted)

    def predict(asked: np.ndarray) -> np.ndarray:
        found = np.zeros((len(asked), answers.shape[1]))
        found[:, present] = 1.0 if model is None else model.predict_proba(asked)
        return found

    return predict
