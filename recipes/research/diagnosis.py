"""What the diagnostics need: models, windows and codes of items, each loaded or made when first asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
from duotok.recipes.evaluation.lm_part import Windows, encode_windows, open_matching_lm
from duotok.recipes.lm.tokenize import encode_here, open_index
from duotok.recipes.lm.tokens import TokenShards, append_shard
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

# Of the curves; score.py's lm part has fewer points of the same (P 6.1).
SHIFTS_SECONDS = {f"shift_{ms}ms": ms / 1000 for ms in (40, 80, 200, 500, 1000, 2000, 4000, 8000, 15000)}
MASK_SHARES = {f"mask_{percent}": percent / 100 for percent in range(10, 101, 10)}
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
    """Models and codes."""

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
        return open_matching_lm(self.settings.lm, self.tokenizer).to(self.settings.device)

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
        """The windows that score.py's lm part measures on."""
        own, items = self.settings, read_split(self.settings.corpus)
        excerpts = choose_excerpts(items, count=own.items, seconds=own.seconds, seed=own.seed)
        return encode_windows(excerpts, self.tokenizer)

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

    def codes_of(self, items: Sequence[Item], name: str) -> dict[str, dict[str, Tensor]]:
        """{item id: {track: codes [frames]}}, kept as token shards in out/tokens/name.

        Goes on where an earlier run stopped. An item that cannot be read goes with its reason into
        `unreadable`; DataError where none is left.
        """
        folder = self.settings.out / "tokens" / name
        index = open_index(folder, self.tokenizer)
        known = {song.id for song in index.songs}
        new = [[item] for item in items if item.id not in known]
        pairs: dict[str, tuple[str, str, dict[str, Tensor]]] = {}
        encoded = tqdm(encode_here(new, self.tokenizer), f"codes of {name}", len(new), disable=None)
        for number, ((item,), (codes,)) in enumerate(encoded, start=1):
            if isinstance(codes, str):
                self.unreadable[item.id] = codes
            else:
                tensors = {track: torch.from_numpy(rows) for track, rows in codes.items()}
                pairs[item.id] = (item.song, item.split, tensors)
            if pairs and (len(pairs) >= _ITEMS_PER_SHARD or number == len(new)):
                append_shard(folder, index, pairs)
                pairs = {}
        wanted = {item.id for item in items} & {song.id for song in index.songs}
        if not wanted:
            reason = next(iter(self.unreadable.values()), "the list is empty")
            raise DataError(f"no item for {folder} can be read; the first: {reason}")
        shards = TokenShards(folder)
        return {song.id: shards.codes(song) for song in shards.index.songs if song.id in wanted}


def count_codes(items: Sequence[Mapping[str, Tensor]], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """How often each code occurs in items' codes {track: codes [frames]}: by track [codebook_size]."""
    return {t: metrics.code_counts(torch.cat([item[t] for item in items]), sizes[t]) for t in TRACKS}


def describe_usage(counts: Mapping[str, Tensor]) -> dict[str, float]:
    """Use of the codebooks by track (P E.1).

    perplexity: so many equally likely codes have the same entropy.
    """
    figures: dict[str, float] = {}
    for track, own in counts.items():
        size, tokens = len(own), int(own.sum())
        most_used = own.sort(descending=True).values[: max(1, size // 10)].sum()
        found = {
            "utilization": metrics.utilization(own),
            # The share that so many tokens reach on average if all codes are equally likely.
            "utilization_of_uniform_codes": 1.0 - (1.0 - 1.0 / size) ** tokens,
            "normalized_entropy": metrics.normalized_entropy(own),
            "perplexity_codes": 2 ** metrics.unigram_entropy_bits(own),
            "share_of_most_used_tenth": int(most_used) / max(tokens, 1),
            "codes": size,
            "tokens": tokens,
        }
        figures |= {f"{track}_{name}": value for name, value in found.items()}
    return figures
