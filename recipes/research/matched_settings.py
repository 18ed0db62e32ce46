"""Settings of the matched-decoder protocol (P B.3.1)."""

from dataclasses import dataclass, field
from typing import Any

from duotok.recipes.renderer.train_diffusion import DiffusionLossConfig
from duotok.recipes.research.matched_codecs import CodecConfig
from duotok.recipes.training.task import TrainConfig
from duotok.renderer.diffusion import DiffusionDecoderConfig
from duotok.tokenizer.common.config import config_from_dict
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import TRACKS


@dataclass(frozen=True, kw_only=True)
class MatchedDataConfig:
    """What the decoders learn from, and what they are judged on."""

    train: str  # manifest
    corpus: str  # folder with validation.jsonl (and test.jsonl)
    split: str = "validation"
    train_items: int = 0  # the first so many of the manifest; 0 = all
    fit_items: int = 60  # of these, for codecs that are fitted
    seconds: float = 10.0  # of a training window
    excerpts: int = 12
    excerpt_seconds: float = 8.0

    def __post_init__(self) -> None:
        for name in ("fit_items", "excerpts", "excerpt_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.train_items < 0:
            raise ConfigError(f"data.train_items must not be negative, got {self.train_items}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison; feature_dim of the model follows from each codec."""

    vae: str  # folder
    data: MatchedDataConfig
    codecs: dict[str, Any]  # name in the table -> settings of a CodecConfig
    track: str = "accompaniment"
    steps: int = 50  # of the solver when listening (P C.4)
    guidance: float = 2.0
    model: DiffusionDecoderConfig = field(default_factory=DiffusionDecoderConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {self.track!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not self.codecs:
            raise ConfigError("codecs must name at least one codec")
        self.codec_configs()

    def codec_configs(self) -> dict[str, CodecConfig]:
        """The checked settings of every codec."""
        return {
            name: config_from_dict(CodecConfig, settings, f"codecs.{name}")
            for name, settings in self.codecs.items()
        }
