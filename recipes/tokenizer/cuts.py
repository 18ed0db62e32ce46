"""Random cuts of corpus items by kind: full mix, sung vocal, accompaniment, instrumental (P C.2)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.level import level_gain
from duotok.tokenizer.model import HOP_SAMPLES

KINDS = ("mix", "vocal", "accompaniment", "instrumental")
START_CANDIDATES = 4


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """What is cut from where."""

    manifest: str
    seconds: float = 10.0
    gain_db: float = 4.0  # random gain around the standard level, uniform in +- this

    def __post_init__(self) -> None:
        if self.seconds * SAMPLE_RATE_HZ < HOP_SAMPLES:
            raise ConfigError(f"data.seconds must be at least 0.04, got {self.seconds}")


class CutSampler:
    """Draws cuts of one length from a manifest."""

    def __init__(self, config: CutConfig) -> None:
        self.config = config
        self.frames = int(config.seconds * SAMPLE_RATE_HZ // HOP_SAMPLES)
        self.items = [item for item in read_manifest(Path(config.manifest)) if item.seconds >= config.seconds]
        if not self.items:
            raise DataError(f"{config.manifest} has no item of at least {config.seconds:g} s")

    def draw(self, rng: np.random.Generator, kinds: list[str]) -> Tensor:
        """Return one mono cut per kind, [len(kinds), frames * 1920], near the standard level."""
        return torch.cat([self._draw_one(rng, kind) for kind in kinds])

    def draw_mixture(self, rng: np.random.Generator, count: int, mixture: dict[str, float]) -> Tensor:
        """Return `count` cuts as `draw` does, of kinds in the proportions of a mixture."""
        return self.draw(rng, self.draw_kinds(rng, count, mixture))

    def draw_kinds(self, rng: np.random.Generator, count: int, mixture: dict[str, float]) -> list[str]:
        """Draw kinds in the proportions of a mixture."""
        unknown = set(mixture) - set(KINDS)
        if unknown:
            raise ConfigError(
                f"unknown kind {sorted(unknown)[0]!r} in the mixture; known are {', '.join(KINDS)}"
            )
        shares = np.array(list(mixture.values()), dtype=float)
        return [str(kind) for kind in rng.choice(list(mixture), size=count, p=shares / shares.sum())]

    def _draw_one(self, rng: np.random.Generator, kind: str) -> Tensor:
        samples = self.frames * HOP_SAMPLES
        item = self.items[rng.integers(len(self.items))]
        starts = rng.uniform(0, max(0.0, item.seconds - self.config.seconds), size=START_CANDIDATES)
        if kind in ("vocal", "instrumental"):
            sung = [self._sung_seconds(item, start) for start in starts]
            start = starts[int(np.argmax(sung) if kind == "vocal" else np.argmin(sung))]
        else:
            start = starts[0]
        part = "accompaniment" if kind == "instrumental" else kind
        wave = item.read(part, start_seconds=float(start), seconds=self.config.seconds, channels=1)
        wave = functional.pad(wave, (0, max(0, samples - wave.shape[-1])))[:, :samples]
        gain_db = rng.uniform(-self.config.gain_db, self.config.gain_db)
        return wave * level_gain(wave) * 10 ** (gain_db / 20)

    def _sung_seconds(self, item: Item, start: float) -> float:
        stop = start + self.config.seconds
        return sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end, *_ in item.notes)


def mel_statistics(sampler: CutSampler, log_mel: torch.nn.Module, cuts: int = 96) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per mel band over cuts of all kinds, the same for the same corpus."""
    rng = np.random.default_rng(0)
    waves = sampler.draw_mixture(rng, cuts, {"mix": 1, "vocal": 1, "accompaniment": 1})
    mel = torch.cat([log_mel(wave[None]).flatten(0, 1) for wave in waves])
    return mel.mean(dim=0), mel.std(dim=0).clamp_min(0.1)
