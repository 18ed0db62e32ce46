"""What frozen codes say about the music: probes on code vectors only, next to two anchors (P B.2).

For every label of the corpus (style, key, tempo class, voice): a linear probe on mean and deviation of a
recording's code vectors and a small Conformer on their sequence, learned from training songs, tested on test
songs; the same linear probe on the log-mel; and the shares of the training songs, which need no input.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.research.diagnosis import Diagnosis
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import HOP_SAMPLES, TRACKS
from duotok.tokenizer.music.labels import PITCH_CLASSES, key_of
from duotok.tokenizer.spectra import LogMel, level_gain

# What a probe sees: one track's code vectors, or both tracks' side by side.
INPUTS: dict[str, tuple[str, ...]] = {**{track: (track,) for track in TRACKS}, "both": TRACKS}
CLIP_SECONDS = 10.0  # what the Conformer sees at a time
MEL_BANDS = 128
UNKNOWN = -1
_KEYS = [f"{tonic}:{mode}" for mode in ("maj", "min") for tonic in PITCH_CLASSES]
_STRENGTHS = (0.003, 0.03, 0.3)  # of the linear probe: the inverse of its regularization
Labels = Mapping[str, Sequence[str]]  # name -> classes, of which every recording has exactly one


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Recordings with their truth."""

    ids: Sequence[str]
    songs: Sequence[str]
    codes: Sequence[Mapping[str, Tensor]]  # by track [frames]
    truth: Mapping[str, np.ndarray]  # by label [recordings], the number of the class or UNKNOWN

    def take(self, indices: Sequence[int]) -> "Recordings":
        """The recordings with these indices."""
        ids, songs = ([names[i] for i in indices] for names in (self.ids, self.songs))
        truth = {name: classes[list(indices)] for name, classes in self.truth.items()}
        return Recordings(ids=ids, songs=songs, codes=[self.codes[i] for i in indices], truth=truth)


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """The Conformer probe and its training."""

    clip_frames: int
    dim: int = 64  # divides into the heads
    heads: int = 4
    blocks: int = 2
    kernel: int = 15  # steps under the depthwise convolution, odd
    stride: int = 4  # frames per step
    dropout: float = 0.2
    hidden_share: float = 0.1  # of the frames that are hidden in training
    epochs: int = 10
    batch: int = 32
    learning_rate: float = 3e-3
    device: str = "cpu"
    seed: int = 0


def measure_probe(diagnosis: Diagnosis) -> dict[str, float]:
    """Train and test all probes: figures LABEL_INPUT_METHOD_{accuracy,macro_ap,macro_auc}, and their sizes.

    The anchor without input has no INPUT in its name, LABEL_majority_....
    """
    settings = diagnosis.settings
    labels, borders = name_labels(diagnosis.train_items)
    learning, test = (
        label_items(items, diagnosis.codes_of(items, name), labels, borders)
        for name, items in (("train", diagnosis.train_items), ("test", diagnosis.test_items))
    )
    # A label counts where the test recordings can tell one class of it from another.
    labels = {name: own for name, own in labels.items() if len({*test.truth[name]} - {UNKNOWN}) > 1}
    if not labels:
        raise DataError(f"the test items in {settings.corpus} differ in nothing that training items have")
    kept, held_out = split_songs(learning.songs, 0.1, settings.seed)
    sets = (learning.take(kept), learning.take(held_out), test)
    mel = {}
    if settings.mel:
        log_mel, readable = LogMel(MEL_BANDS), {*learning.ids, *test.ids}
        items = [item for item in (*diagnosis.train_items, *diagnosis.test_items) if item.id in readable]
        for item in tqdm(items, desc="mel", disable=None):
            mel[item.id] = {track: pool(mel_frames(item.read(track), log_mel)) for track in TRACKS}
    figures: dict[str, float] = {"train_recordings": len(learning.ids), "test_recordings": len(test.ids)}

    def tell(label: str, method: str, found: np.ndarray) -> None:
        scores = score_classes(test.truth[label], found)
        figures.update({f"{label}_{method}_{name}": value for name, value in scores.items()})

    for label, classes in labels.items():
        figures[f"{label}_classes"] = len(classes)
        figures[f"{label}_test_recordings"] = int((test.truth[label] != UNKNOWN).sum())
        tell(label, "majority", class_shares(learning.truth[label], len(classes), len(test.ids)))
    clip_frames = round(CLIP_SECONDS * diagnosis.tokenizer.frame_rate_hz)
    config = ConformerConfig(
        clip_frames=clip_frames, epochs=settings.epochs, device=settings.device, seed=settings.seed
    )
    for seen, tracks in INPUTS.items():
        vectors = {track: diagnosis.vectors[track] for track in tracks}
        rows = {"codes": [[pool_codes(codes, vectors) for codes in part.codes] for part in sets]}
        if mel:
            rows["mel"] = [[np.concatenate([mel[i][t] for t in tracks]) for i in part.ids] for part in sets]
        for kind, features in rows.items():
            for label, classes in tqdm(labels.items(), desc=f"{kind}, linear, {seen}", disable=None):
                found = fit_linear(features, [part.truth[label] for part in sets[:2]], label, len(classes))
                tell(label, f"{seen}_{kind}_linear", found)
        probe = train_conformer(sets[0], sets[1], vectors, labels, config)
        for label, found in predict_conformer(probe, test).items():
            tell(label, f"{seen}_codes_conformer", found)
    return figures


def name_labels(items: Sequence[Item]) -> tuple[dict[str, list[str]], np.ndarray]:
    """The labels that training items have, and the borders of the tempo classes in beats per minute.

    Tempo classes are equally large parts of the training items. A label of one class only is left out.
    """
    tempi = [item.tempo_bpm for item in items if item.tempo_bpm is not None]
    borders = np.unique(np.quantile(tempi, (0.25, 0.5, 0.75)).round(1)) if tempi else np.zeros(0)
    edges = ["", *(f"{border:g}" for border in borders), ""]
    labels = {
        "style": sorted({item.style for item in items}),
        "key": _KEYS,
        "tempo": [f"{low}-{high} bpm" for low, high in pairwise(edges)],
        "voice": sorted({item.voice for item in items}),
    }
    return {name: classes for name, classes in labels.items() if len(classes) > 1}, borders


def label_items(
    items: Sequence[Item], codes: Mapping[str, Mapping[str, Tensor]], labels: Labels, borders: np.ndarray
) -> Recordings:
    """The items that have codes; what nobody knows of one, or training did not have, is UNKNOWN."""
    items = [item for item in items if item.id in codes]
    truth = {label: np.full(len(items), UNKNOWN) for label in labels}
    for row, item in enumerate(items):
        found = {"style": item.style, "voice": item.voice}
        if item.key is not None:
            found["key"] = _KEYS[key_of(item.key)]  # one name for each tonic
        if item.tempo_bpm is not None and "tempo" in labels:
            found["tempo"] = labels["tempo"][int(np.searchsorted(borders, item.tempo_bpm, side="right"))]
        for label, classes in labels.items():
            if found.get(label) in classes:
                truth[label][row] = classes.index(found[label])
    ids, songs = [item.id for item in items], [item.song for item in items]
    return Recordings(ids=ids, songs=songs, codes=[codes[name] for name in ids], truth=truth)


def split_songs(songs: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the recordings to learn from and of those held out; no song is on both sides."""
    names = sorted(set(songs))
    if len(names) < 2:
        raise DataError("the probe needs recordings of at least two songs to learn from")
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[index] for index in order[: min(len(names) - 1, max(1, round(share * len(names))))]}
    kept = [index for index, song in enumerate(songs) if song not in held_out]
    return kept, [index for index, song in enumerate(songs) if song in held_out]


def score_classes(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Accuracy, and macro AP and ROC-AUC (P 4.3) of found [recordings, classes].

    truth: [recordings]; the UNKNOWN do not count, nor do classes without both a positive and a negative.
    """
    truth, found = truth[truth != UNKNOWN], found[truth != UNKNOWN]
    wanted = truth[:, None] == np.arange(found.shape[1])
    both = wanted.any(axis=0) & ~wanted.all(axis=0)
    if not both.any():
        raise DataError("no class has both a positive and a negative test recording; use more test items")
    return {
        "accuracy": float((found.argmax(axis=1) == truth).mean()),
        "macro_ap": float(average_precision_score(wanted[:, both], found[:, both], average="macro")),
        "macro_auc": float(roc_auc_score(wanted[:, both], found[:, both], average="macro")),
    }


def class_shares(truth: np.ndarray, classes: int, count: int) -> np.ndarray:
    """The classes' shares of the known recordings, as the answer about `count` others [count, classes]."""
    known = truth[truth != UNKNOWN]
    return np.tile(np.bincount(known, minlength=classes) / max(len(known), 1), (count, 1))


def mel_frames(wave: Tensor, log_mel: LogMel) -> Tensor:
    """Log-mel at an even level of wave [channels, samples]: [frames, bands]."""
    mono = wave.mean(dim=0, keepdim=True)
    mono = functional.pad(mono, (0, -mono.shape[-1] % HOP_SAMPLES))
    return log_mel(mono * level_gain(mono))[0]


def pool(frames: Tensor) -> np.ndarray:
    """Mean and deviation over time of frames [frames, width]: [2 * width]."""
    return torch.cat([frames.mean(dim=0), frames.std(dim=0, correction=0)]).numpy()


def pool_codes(codes: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> np.ndarray:
    """The same of the code vectors of the tracks that have vectors, side by side."""
    return np.concatenate([pool(table[codes[track].long()]) for track, table in vectors.items()])


def fit_linear(
    features: Sequence[Sequence[np.ndarray]], truth: Sequence[np.ndarray], label: str, classes: int
) -> np.ndarray:
    """Probabilities [test recordings, classes] by logistic regression.

    features: of the recordings to learn from, those held out and those of the test; truth: of the first two.
    The regularization is the one that is best on the held-out recordings.
    """
    known = truth[0] != UNKNOWN
    if not known.any():
        raise DataError(f"no recording to learn from has a known {label}")
    rows, answers = np.stack(features[0])[known], truth[0][known]
    best, predictions = -1.0, np.zeros((len(features[2]), classes))
    for strength in _STRENGTHS:
        linear = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        model = (linear if len(set(answers)) > 1 else DummyClassifier()).fit(rows, answers)
        checked, asked = (np.zeros((len(each), classes)) for each in features[1:])
        for told, each in zip((checked, asked), features[1:], strict=True):
            told[:, model.classes_] = model.predict_proba(np.stack(each))
        found = _precision(truth[1], checked)
        if found >= best:  # of equally good ones the surest
            best, predictions = found, asked
    return predictions


def _precision(truth: np.ndarray, found: np.ndarray) -> float:
    """The macro AP; of a label that these recordings cannot test 0."""
    try:
        return score_classes(truth, found)["macro_ap"]
    except DataError:
        return 0.0


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, gated depthwise convolution, half a feed-forward (Gulati et al., 2020).

    Positions come from the convolution. Its norm is of one clip, where the paper's batch norm is of all.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, dropout = config.dim, nn.Dropout(config.dropout)
        self.before, self.after = (
            nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, 4 * dim),
                nn.SiLU(),
                dropout,
                nn.Linear(4 * dim, dim),
                dropout,
            )
            for _ in range(2)
        )
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, config.heads, config.dropout, batch_first=True)
        self.gated = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GLU())
        self.depthwise = nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim)
        self.convolved = nn.Sequential(nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, dim), dropout)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        features = features + self.before(features) / 2
        heard = self.attention_norm(features)
        features = features + self.attention(heard, heard, heard, need_weights=False)[0]
        hidden = self.depthwise(self.gated(features).transpose(1, 2)).transpose(1, 2)
        features = features + self.convolved(hidden)
        return self.norm(features + self.after(features) / 2)


class ConformerProbe(nn.Module):
    """Logits of every label from the codes of one or more tracks; the code vectors stay as they are."""

    def __init__(self, vectors: Mapping[str, Tensor], labels: Labels, config: ConformerConfig) -> None:
        """vectors: by track [codes, code_dim]."""
        super().__init__()
        self.config, self.tracks = config, tuple(vectors)
        for track, table in vectors.items():
            self.register_buffer(f"vectors_{track}", table)
        width, stride = sum(table.shape[1] for table in vectors.values()), config.stride
        self.project = nn.Conv1d(width, config.dim, 2 * stride - 1, stride, stride - 1)
        self.blocks = nn.Sequential(*(ConformerBlock(config) for _ in range(config.blocks)))
        self.heads = nn.ModuleDict(
            {name: nn.Linear(2 * config.dim, len(own)) for name, own in labels.items()}
        )

    def forward(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """codes: by track [batch, frames] -> {label: logits [batch, classes]}."""
        tables = {track: self.get_buffer(f"vectors_{track}") for track in self.tracks}
        parts = [functional.embedding(codes[track], table) for track, table in tables.items()]
        features = torch.cat(parts, dim=-1)  # [batch, frames, width]
        if self.training:
            shown = torch.rand(features.shape[:2], device=features.device) >= self.config.hidden_share
            features = features * shown[..., None]
        hidden = self.blocks(self.project(features.transpose(1, 2)).transpose(1, 2))  # [batch, steps, dim]
        pooled = torch.cat([hidden.mean(dim=1), hidden.amax(dim=1)], dim=-1)
        return {name: head(pooled) for name, head in self.heads.items()}


def train_conformer(
    train: Recordings,
    held_out: Recordings,
    vectors: Mapping[str, Tensor],
    labels: Labels,
    config: ConformerConfig,
) -> ConformerProbe:
    """Train one probe for all labels on random clips; return its state of the best held-out epoch.

    vectors: the frozen code vectors of the tracks it sees. Best: mean of the labels' macro AP.
    """
    rng = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    probe, rate = ConformerProbe(vectors, labels, config).to(config.device), config.learning_rate
    optimizer = torch.optim.AdamW(probe.parameters(), lr=rate, weight_decay=0.05)
    clips = sum(len(clip_starts(len(codes["vocal"]), config.clip_frames)) for codes in train.codes)
    steps = config.epochs * -(-clips // config.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps + 1, pct_start=0.1)
    best, best_state = -1.0, {}
    for _ in tqdm(range(config.epochs), desc=f"probe, {'+'.join(vectors)}", disable=None):
        probe.train()
        for batch, truth in random_clips(train, probe.tracks, config, rng):
            losses = [
                functional.cross_entropy(logits, truth[label], ignore_index=UNKNOWN)
                for label, logits in probe(batch).items()
                if (truth[label] != UNKNOWN).any()
            ]
            optimizer.zero_grad()
            if losses:
                torch.stack(losses).sum().backward()
                torch.nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
                optimizer.step()
            schedule.step()
        told = predict_conformer(probe, held_out)
        found = float(np.mean([_precision(held_out.truth[name], own) for name, own in told.items()]))
        if found >= best:  # of equally good ones the longest trained
            best, best_state = found, {name: value.clone() for name, value in probe.state_dict().items()}
    probe.load_state_dict(best_state)
    return probe.eval()


@torch.inference_mode()
def predict_conformer(probe: ConformerProbe, recordings: Recordings) -> dict[str, np.ndarray]:
    """Probabilities by label [recordings, classes], the mean over each recording's clips."""
    probe.eval()
    found: dict[str, list[np.ndarray]] = {label: [] for label in probe.heads}
    for codes in recordings.codes:
        starts = clip_starts(len(codes[probe.tracks[0]]), probe.config.clip_frames)
        clips = [(codes, start) for start in starts]
        for label, logits in probe(stack_clips(clips, probe.tracks, probe.config)).items():
            found[label].append(logits.float().softmax(dim=-1).mean(dim=0).cpu().numpy())
    return {label: np.stack(rows) for label, rows in found.items()}


def clip_starts(frames: int, clip_frames: int) -> list[int]:
    """First frames of the fewest clips, evenly spread, that cover so many frames."""
    count = max(1, math.ceil(frames / clip_frames))
    return np.linspace(0, max(0, frames - clip_frames), count).round().astype(int).tolist()


def random_clips(
    recordings: Recordings, tracks: Sequence[str], config: ConformerConfig, rng: np.random.Generator
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """One epoch: as many clips of each recording as cover it, each from a random place, with their truth."""
    pairs = []
    for index, codes in enumerate(recordings.codes):
        frames = len(codes[tracks[0]])
        latest = max(0, frames - config.clip_frames)
        pairs += [(index, int(rng.integers(latest + 1))) for _ in clip_starts(frames, config.clip_frames)]
    order = rng.permutation(len(pairs))
    for first in range(0, len(order), config.batch):
        chosen = [pairs[place] for place in order[first : first + config.batch]]
        owners = [index for index, _ in chosen]
        truth = {name: torch.tensor(own[owners]).to(config.device) for name, own in recordings.truth.items()}
        yield stack_clips([(recordings.codes[i], start) for i, start in chosen], tracks, config), truth


def stack_clips(
    clips: Sequence[tuple[Mapping[str, Tensor], int]], tracks: Sequence[str], config: ConformerConfig
) -> dict[str, Tensor]:
    """By track [clips, clip_frames] of (codes by track, first frame); what is shorter is repeated."""
    frames = torch.arange(config.clip_frames)
    stacked = {}
    for track in tracks:
        rows = [codes[track][(start + frames) % len(codes[track])] for codes, start in clips]
        stacked[track] = torch.stack(rows).long().to(config.device)
    return stacked
