"""What the diagnostics share: their settings, the models, the test windows, the codes of whole items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
from duotok.recipes.evaluation.heard_coherence import pair_with_others
from duotok.recipes.evaluation.lm_part import Windows
from duotok.recipes.lm.tokenize import encode_waves, open_index, read_waves
from duotok.recipes.lm.tokens import TokenShards, append_shard
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError, DuoTokError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

_ITEMS_PER_SHARD = 16


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings:
    """What is diagnosed, on what."""

    corpus: Path  # folder with test.jsonl, and train.jsonl for the probe
    tokenizer: Path
    lm: Path | None  # only corruption and context need it
    out: Path
    items: int = 48  # test items, and windows of the language model's diagnostics
    seconds: float = 30.0  # of each window
    train_items: int | None = None  # items the probe learns from; None = all
    tokens: Path | None = None  # shards of the corpus' train split; None = encoded into out/tokens
    epochs: int = 10  # of the Conformer probe
    mel: bool = True  # whether the probe is also given mel statistics, which needs all of the sound
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("items", 2), ("seconds", 4), ("epochs", 1)):
            if getattr(self, name) < lowest:
                raise ConfigError(f"--{name} must be at least {lowest}, got {getattr(self, name):g}")
        if self.train_items is not None and self.train_items < 2:
            raise ConfigError(f"--train-items must be at least 2, got {self.train_items}")


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
        if self.settings.lm is None:
            raise ConfigError("corruption and context need a language model: give --lm or --bundle")
        lm = DualTrackLM.from_pretrained(self.settings.lm)
        if lm.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise CheckpointError(
                f"the language model in {self.settings.lm} learned from the tokenizer "
                f"{lm.tokenizer_fingerprint}, not from {self.tokenizer.fingerprint} in "
                f"{self.settings.tokenizer}"
            )
        return lm.to(self.settings.device)

    @cached_property
    def vectors(self) -> dict[str, Tensor]:
        """Code vectors by track, [codes, code_dim] of zero mean and unit deviation, on the CPU."""
        return {track: _standardize(self.tokenizer.code_vectors(track).float().cpu()) for track in TRACKS}

    @cached_property
    def windows(self) -> Windows:
        """The windows that score.py's lm part measures on, chosen in the same way."""
        excerpts = choose_excerpts(
            read_split(self.settings.corpus),
            count=self.settings.items,
            seconds=self.settings.seconds,
            seed=self.settings.seed,
        )
        partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
        rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
        for excerpt in tqdm(excerpts, desc="codes of windows", disable=None):
            for track in TRACKS:
                wave = excerpt.read(track)[None].to(self.settings.device)
                rows[track].append(self.tokenizer.encode(wave, track)[0].cpu())
        codes = {track: torch.stack(parts) for track, parts in rows.items()}
        return Windows(codes=codes, partners=partners, rate_hz=self.tokenizer.frame_rate_hz)

    @cached_property
    def test_items(self) -> list[Item]:
        """The test items that are encoded whole."""
        return self._some(read_split(self.settings.corpus), self.settings.items)

    @cached_property
    def train_items(self) -> list[Item]:
        """The items the probe learns from."""
        items = read_manifest(self.settings.corpus / "train.jsonl")
        if self.settings.tokens is not None:
            known = {song.id for song in TokenShards(self.settings.tokens).index.songs}
            items = [item for item in items if item.id in known]
        if len(items) < 2:
            raise DataError(f"{self.settings.corpus / 'train.jsonl'} has no items with tokens to learn from")
        return self._some(items, self.settings.train_items)

    def test_codes(self) -> dict[str, dict[str, Tensor]]:
        """{item id: {track: codes [frames]}} of the test items, kept in out/tokens/test."""
        return self.item_codes(self.test_items, self.settings.out / "tokens" / "test")

    def train_codes(self) -> dict[str, dict[str, Tensor]]:
        """The same of the items the probe learns from, out of --tokens or kept in out/tokens/train."""
        folder = self.settings.tokens
        if folder is None:
            return self.item_codes(self.train_items, self.settings.out / "tokens" / "train")
        shards = TokenShards(folder)
        if shards.index.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{folder} holds tokens of the tokenizer {shards.index.tokenizer_fingerprint}, not of "
                f"{self.tokenizer.fingerprint} in {self.settings.tokenizer}; leave --tokens out to make them"
            )
        wanted = {item.id for item in self.train_items}
        return {song.id: shards.codes(song) for song in shards.index.songs if song.id in wanted}

    def item_codes(self, items: Sequence[Item], folder: Path) -> dict[str, dict[str, Tensor]]:
        """{id: {track: codes [frames]}} of whole items, kept as token shards in a folder.

        Goes on where an earlier run stopped. An item that cannot be read is left out and goes with its
        reason into `unreadable`; DataError where none is left.
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

    def _some(self, items: Sequence[Item], count: int | None) -> list[Item]:
        order = np.random.default_rng(self.settings.seed).permutation(len(items))
        return [items[index] for index in order[:count]]


def _standardize(vectors: Tensor) -> Tensor:
    centred = vectors - vectors.mean(dim=0)
    return centred / centred.std().clamp_min(1e-6)
