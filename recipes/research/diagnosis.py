"""What the diagnostics measure: the models and codes, costs of a damaged vocal, use of the codes.

The vocal is moved in time, hidden in part, or replaced by another song's (P 6.1, eq. 8, figure 3). Every
damage is read over whole windows after the paper's prefix of 2 s, and over the first 5 s without a prefix,
where the accompaniment's own past cannot yet tell key and tempo.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import mask_source, score_batch, shift_source
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
from duotok.recipes.evaluation.heard_coherence import pair_with_others
from duotok.recipes.evaluation.lm_part import PREFIX_SECONDS, Windows, severity_figures
from duotok.recipes.lm.tokenize import encode_waves, open_index, read_waves
from duotok.recipes.lm.tokens import TokenShards, append_shard
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError, DuoTokError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

SHIFTS_SECONDS = (0.04, 0.08, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
MASK_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
START_SECONDS = 5.0
SCOPES = {"whole": "", "first_5s": "_first_5s"}  # scope -> how its figures' names end
_ITEMS_PER_SHARD = 16


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """What is diagnosed, on what."""

    corpus: Path  # folder with test.jsonl, and train.jsonl for the probe
    tokenizer: Path
    lm: Path | None  # not needed for codes and probe
    out: Path
    items: int = 48  # test items, and windows of the language model's diagnostics
    seconds: float = 30.0  # of each window
    train_items: int | None = None  # items the probe learns from; None = all
    epochs: int = 10  # of the Conformer probe
    mel: bool = True  # whether the probe is also given mel statistics, which needs all of the sound
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("items", 2), ("seconds", 4), ("epochs", 1), ("train_items", 2)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least {lowest}, got {value:g}")


class Diagnosis:
    """Models and codes, each loaded or made when a part first needs it."""

    def __init__(self, settings: DiagnosisSettings) -> None:
        self.settings = settings
        self.unreadable: dict[str, str] = {}  # id -> reason

    @cached_property
    def tokenizer(self) -> DuoTokenizer:
        """The tokenizer."""
        return DuoTokenizer.from_pretrained(self.settings.tokenizer).to(self.settings.device)

    @cached_property
    def lm(self) -> DualTrackLM:
        """The language model, which must have learned from this tokenizer."""
        assert self.settings.lm is not None  # the command leaves out the parts that need it
        lm = DualTrackLM.from_pretrained(self.settings.lm)
        if lm.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise CheckpointError(
                f"the language model in {self.settings.lm} learned from the tokenizer "
                f"{lm.tokenizer_fingerprint}, not {self.tokenizer.fingerprint} in {self.settings.tokenizer}"
            )
        return lm.to(self.settings.device)

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """Code vectors by track, [codes, code_dim] of zero mean and unit deviation, on the CPU."""
        found = {}
        for track in TRACKS:
            vectors = self.tokenizer.code_vectors(track).float().cpu()
            centred = vectors - vectors.mean(dim=0)
            found[track] = centred / centred.std().clamp_min(1e-6)
        return found

    @cached_property
    def windows(self) -> Windows:
        """The windows that score.py's lm part measures on, chosen in the same way."""
        settings = self.settings
        items = read_split(settings.corpus)
        excerpts = choose_excerpts(items, count=settings.items, seconds=settings.seconds, seed=settings.seed)
        rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
        for excerpt in tqdm(excerpts, desc="codes of windows", disable=None):
            for track in TRACKS:
                wave = excerpt.read(track)[None].to(settings.device)
                rows[track].append(self.tokenizer.encode(wave, track)[0].cpu())
        codes = {track: torch.stack(parts) for track, parts in rows.items()}
        partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
        return Windows(codes=codes, partners=partners, rate_hz=self.tokenizer.frame_rate_hz)

    @cached_property
    def test_items(self) -> list[Item]:
        """The test items that are encoded whole."""
        return self._some(read_split(self.settings.corpus), self.settings.items)

    @cached_property
    def train_items(self) -> list[Item]:
        """The items the probe learns from."""
        return self._some(read_manifest(self.settings.corpus / "train.jsonl"), self.settings.train_items)

    def _some(self, items: Sequence[Item], count: int | None) -> list[Item]:
        order = np.random.default_rng(self.settings.seed).permutation(len(items))
        return [items[index] for index in order[:count]]

    def test_codes(self) -> dict[str, dict[str, Tensor]]:
        """{item id: {track: codes [frames]}} of the test items, kept in out/tokens/test."""
        return self._item_codes(self.test_items, self.settings.out / "tokens" / "test")

    def train_codes(self) -> dict[str, dict[str, Tensor]]:
        """The same of the items the probe learns from, kept in out/tokens/train."""
        return self._item_codes(self.train_items, self.settings.out / "tokens" / "train")

    def _item_codes(self, items: Sequence[Item], folder: Path) -> dict[str, dict[str, Tensor]]:
        """Codes of whole items, kept as token shards; goes on where an earlier run stopped.

        An item that cannot be read goes with its reason into `unreadable`; DataError where none is left.
        """
        index = open_index(folder, self.tokenizer)
        known = {song.id for song in index.songs}
        new = [item for item in items if item.id not in known]
        pairs: dict[str, tuple[str, str, dict[str, Tensor]]] = {}
        for item in tqdm(new, desc=f"codes of {folder.name}", disable=None):
            try:
                waves = read_waves([item])
            except DuoTokError as error:
                self.unreadable[item.id] = str(error)
                continue
            codes = {track: encode_waves(waves[track], track, self.tokenizer)[0] for track in TRACKS}
            pairs[item.id] = (item.song, item.split, codes)
            if len(pairs) >= _ITEMS_PER_SHARD:
                append_shard(folder, index, pairs)
                pairs = {}
        if pairs:
            append_shard(folder, index, pairs)
        wanted = {item.id for item in items} & {song.id for song in index.songs}
        if not wanted:
            reason = next(iter(self.unreadable.values()), "the list is empty")
            raise DataError(f"no item for {folder} can be read; the first: {reason}")
        shards = TokenShards(folder)
        return {song.id: shards.codes(song) for song in shards.index.songs if song.id in wanted}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How much a damage raises the loss."""

    percent: float
    error_percent: float  # standard error over windows, by the jackknife


Costs = Mapping[str, Cost]  # by scope


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """The costs of every damage."""

    shifts: Mapping[float, Costs]  # by seconds
    masks: Mapping[float, Costs]  # by share of the frames
    mismatch: Costs
    windows: int
    seconds: float

    def figures(self) -> dict[str, float]:
        """Flat figures; of shifts and masks also those of `severity_figures`."""
        named = {f"shift_{round(1000 * seconds)}ms": costs for seconds, costs in self.shifts.items()}
        named |= {f"mask_{round(100 * share)}": costs for share, costs in self.masks.items()}
        named["mismatch"] = self.mismatch
        found: dict[str, float] = {"windows": self.windows, "window_seconds": self.seconds}
        for scope, suffix in SCOPES.items():
            for name, costs in named.items():
                found[f"{name}_cost{suffix}_percent"] = costs[scope].percent
                found[f"{name}_cost{suffix}_error_percent"] = costs[scope].error_percent
            for kind, curve in (("shift", self.shifts), ("mask", self.masks)):
                percents = [curve[amount][scope].percent for amount in sorted(curve)]
                found |= severity_figures(kind, suffix, percents)
        return found


def measure_corruption(lm: DualTrackLM, windows: Windows, seed: int = 0) -> Corruption:
    """Score all windows with the right vocal and with every damaged one."""
    vocal, rate_hz = windows.codes["vocal"], windows.rate_hz
    sources: dict[tuple[str, float], Tensor] = {("mismatch", 0.0): vocal[windows.partners]}
    for seconds in (seconds for seconds in SHIFTS_SECONDS if seconds < windows.seconds):
        sources["shift", seconds] = shift_source(vocal, round(seconds * rate_hz))
    for share in MASK_SHARES:
        # The same draw for every share: what a small share hides, a larger one hides as well.
        generator = torch.Generator().manual_seed(seed)
        sources["mask", share] = mask_source(vocal, share, lm.pads["vocal"], generator)
    prefix, start = (round(seconds * rate_hz) for seconds in (PREFIX_SECONDS, START_SECONDS))

    def losses(shown: Tensor) -> dict[str, Tensor]:  # of each window [windows], in nats per token, by scope
        scores = score_batch(lm, shown, windows.codes["accompaniment"], "vocal_to_accompaniment")
        nats = scores.loss_nats["accompaniment"].double()
        return {"whole": nats[:, prefix:].mean(dim=1), "first_5s": nats[:, :start].mean(dim=1)}

    intact = losses(vocal)
    costs: dict[tuple[str, float], Costs] = {}
    for key, shown in tqdm(sources.items(), "corruption", disable=None):
        damaged = losses(shown)
        costs[key] = {scope: relative_cost(damaged[scope], intact[scope]) for scope in SCOPES}
    return Corruption(
        shifts={amount: cost for (kind, amount), cost in costs.items() if kind == "shift"},
        masks={amount: cost for (kind, amount), cost in costs.items() if kind == "mask"},
        mismatch=costs["mismatch", 0.0],
        windows=windows.count,
        seconds=windows.seconds,
    )


def relative_cost(damaged: Tensor, intact: Tensor) -> Cost:
    """Cost of a damage from each window's loss [windows], in any unit, with and without it."""
    percent = metrics.corruption_cost_percent(damaged.sum().item(), intact.sum().item())
    count = len(intact)
    if count < 2:
        return Cost(percent=percent, error_percent=0.0)
    without = 100 * ((damaged.sum() - damaged) / (intact.sum() - intact) - 1)  # each window left out once
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return Cost(percent=percent, error_percent=error.item())


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """How often each code of a track occurs (P E.1, figure 6, table 11)."""

    track: str
    counts: Tensor  # [codebook_size] int64

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    def sorted_shares(self) -> np.ndarray:
        """Each code's share of the tokens, largest first: [codebook_size]."""
        return np.sort(self.counts.numpy())[::-1] / max(self.tokens, 1)

    def figures(self) -> dict[str, float]:
        """Flat figures; perplexity: as many equally likely codes have the same entropy."""
        size = len(self.counts)
        found = {
            "utilization": metrics.utilization(self.counts),
            # The share that so many tokens reach on average if all codes are equally likely.
            "utilization_of_uniform_codes": 1.0 - (1.0 - 1.0 / size) ** self.tokens,
            "normalized_entropy": metrics.normalized_entropy(self.counts),
            "perplexity_codes": 2 ** metrics.unigram_entropy_bits(self.counts),
            "share_of_most_used_tenth": float(self.sorted_shares()[: max(1, size // 10)].sum()),
            "codes": size,
            "tokens": self.tokens,
        }
        return {f"{self.track}_{name}": value for name, value in found.items()}


def count_usage(items: Iterable[Mapping[str, Tensor]], sizes: Mapping[str, int]) -> dict[str, CodeUsage]:
    """Usage by track of items' codes {track: codes [frames]}; sizes: of the codebooks."""
    items, usage = list(items), {}
    for track in TRACKS:
        codes = torch.cat([item[track] for item in items])
        usage[track] = CodeUsage(track=track, counts=metrics.code_counts(codes, sizes[track]))
    return usage
