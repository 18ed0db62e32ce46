"""The probes: logistic regression, and a small Conformer on frozen code vectors (P B.2).

The Conformer has one linear head per label. Blocks as in Gulati et al. (2020): half a feed-forward,
attention, convolution, half a feed-forward, all pre-norm. Positions come from the depthwise convolutions.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.research.probe_data import Label, ProbeSet, clip_starts, cut_clip, score_classes
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import HOP_SAMPLES, MEL_PER_FRAME, TRACKS
from duotok.tokenizer.spectra import LogMel, level_gain

MEL_BANDS = 128
STRENGTHS = (0.003, 0.03, 0.3)  # of the linear probe: the inverse of its regularization
Probabilities = dict[str, np.ndarray]  # by label [recordings, classes]


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Settings of the probe."""

    dim: int = 64
    heads: int = 4
    blocks: int = 2
    expansion: int = 4  # of the feed-forwards
    kernel: int = 15  # steps under the depthwise convolution
    stride: int = 4  # frames per step
    dropout: float = 0.2
    hidden_share: float = 0.1  # share of the frames that are hidden from the probe in training

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} must divide into {self.heads} heads")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel must be odd, got {self.kernel}")
        if not 0 <= self.hidden_share < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("hidden_share and dropout must be in [0, 1)")


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward of a block."""

    def __init__(self, config: ConformerConfig) -> None:
        hidden = config.expansion * config.dim
        super().__init__(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.dim),
            nn.Dropout(config.dropout),
        )


class SelfAttention(nn.Module):
    """Pre-norm attention over all steps."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        qkv = self.qkv(self.norm(features)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, steps, dim / heads]
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))


class Convolution(nn.Module):
    """Pre-norm gated depthwise convolution."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim)
        self.inner_norm = nn.LayerNorm(dim)  # of one clip, where the paper's batch norm is of all
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        hidden = functional.glu(self.gated(self.norm(features)), dim=-1)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.out(functional.silu(self.inner_norm(hidden))))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.before, self.after = FeedForward(config), FeedForward(config)
        self.attention, self.convolution = SelfAttention(config), Convolution(config)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        features = features + 0.5 * self.before(features)
        features = features + self.attention(features)
        features = features + self.convolution(features)
        return self.norm(features + 0.5 * self.after(features))


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
        parts = [
            functional.embedding(codes[track], self.get_buffer(f"vectors_{track}")) for track in self.tracks
        ]
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


def mean_precision(recordings: ProbeSet, found: Probabilities, labels: Sequence[Label]) -> float:
    """Mean over labels of the macro AP; a label that these recordings cannot test counts as 0."""
    return float(np.mean([_precision(recordings.truth[label.name], found[label.name]) for label in labels]))


def _precision(truth: np.ndarray, found: np.ndarray) -> float:
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
    length = MEL_PER_FRAME * clip_frames
    starts = clip_starts(len(mel) // MEL_PER_FRAME, clip_frames)
    clips = [mel[MEL_PER_FRAME * start :][:length] for start in starts]
    return torch.stack([torch.cat([clip.mean(dim=0), clip.std(dim=0)]) for clip in clips])


def join_mel(
    recordings: ProbeSet, statistics: Mapping[str, Mapping[str, Tensor]], tracks: Sequence[str]
) -> ClipFeatures:
    """Features of the recordings' clips, tracks side by side."""
    rows = [
        torch.cat([statistics[name][track] for track in tracks], dim=1).numpy() for name in recordings.ids
    ]
    owners = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    return ClipFeatures(rows=np.concatenate(rows), owners=owners)
