"""Train the separation by tokens on exact stems, or those of any manifest (arXiv 2604.09371).

Run: python -m duotok.recipes.lm.separator.train_token_separator recipes/lm/separator/small.yaml \\
         --out runs/small/token_separator
The folder `final` holds the separator and, in `codec`, what turns its codes into sound: all that
`separate --separator tokens --checkpoint runs/small/token_separator/final` needs.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.lm.hierarchical.stage import StreamConfig
from duotok.lm.metrics import nats_to_bits
from duotok.lm.separator.model import (
    TRACK_STEMS,
    TokenSeparator,
    TokenSeparatorConfig,
    TokenSeparatorObjective,
)
from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.renderer.latent_codec import open_codec
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.layered import semantic_rows
from duotok.tokenizer.semantic import SemanticTokenizer

EQUALIZER_HZ = (60.0, 150.0, 400.0, 1_000.0, 2_500.0, 6_000.0, 15_000.0)  # middles of the seven bands
_VALIDATION_SEED = 1


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """What is done to each track, before they are mixed (arXiv 2604.09371, 3.1)."""

    gain: tuple[float, float] = (0.5, 1.5)
    polarity: float = 0.1  # probability that a track is turned upside down
    equalizer_db: float = 4.0  # each band of the equalizer is uniform in +- this

    def __post_init__(self) -> None:
        if not 0 < self.gain[0] <= self.gain[1] or not 0 <= self.polarity <= 1 or self.equalizer_db < 0:
            raise ConfigError(
                "augmentation: gain must be a range above 0, polarity in 0..1 and equalizer_db not negative, "
                f"got {self.gain}, {self.polarity:g}, {self.equalizer_db:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. Rates and codebooks of the model are those of the codec."""

    codec: str  # folder or hub id of the acoustic codec
    data: CutConfig  # its seconds are the model's window
    validation: str | None = None  # a manifest of other songs, of which fixed windows are judged
    validation_windows: int = 16
    levels: int | None = None  # codebooks that are written; None: all of the codec's
    semantic: str | None = None  # folder of a semantic tokenizer, whose codes are written too
    features: str | None = None  # folder of one, whose frozen encoder hears in place of the Conformer (A1)
    model: TokenSeparatorConfig = field(default_factory=TokenSeparatorConfig)
    level_weights: tuple[float, ...] = (2.0, 1.0)  # of the first levels in the loss; the last one goes on
    label_smoothing: float = 0.1
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.level_weights or min(self.level_weights) <= 0:
            raise ConfigError(f"level_weights must be above 0, got {self.level_weights}")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.validation_windows < 2:
            raise ConfigError(f"validation_windows must be at least 2, got {self.validation_windows}")


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    objective = build_objective(config)
    separator, codec = objective.separator, objective.codec
    draw = TrackCuts(config, separator.config)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        tracks = torch.stack([draw(rng) for _ in range(config.train.batch_size)])
        return {"tracks": augment(tracks, config.augmentation, rng)}

    def export(folder: Path) -> None:
        separator.save_pretrained(folder)
        codec.save_pretrained(folder / "codec")

    codes = len(separator.config.row_sizes) * separator.config.frames
    return Task(
        objective=objective,
        make_batch=make_batch,
        seek=draw.seek,
        export=export,
        validate=None if config.validation is None else make_validation(config, objective),
        count_units=lambda batch: math.prod(batch["tracks"].shape[:2]) * codes,
    )


def build_objective(config: Config) -> TokenSeparatorObjective:
    """Return a new separator for the codec, with what it learns by."""
    codec = open_codec(config.codec)
    levels = codec.codebooks if config.levels is None else config.levels
    if not 1 <= levels <= codec.codebooks:
        raise ConfigError(f"levels must be in 1..{codec.codebooks}, as the codec has, got {levels}")
    stream = StreamConfig(rate_hz=codec.frame_rate_hz, levels=levels, codebook_size=codec.codebook_size)
    semantic = None if config.semantic is None else SemanticTokenizer.from_pretrained(config.semantic)
    heard = None if config.features is None else SemanticTokenizer.from_pretrained(config.features)
    own = None
    if semantic is not None:
        rows = semantic_rows(semantic.frame_rate_hz, codec.frame_rate_hz)
        own = replace(stream, levels=rows, codebook_size=semantic.config.clusters)
    settings = replace(
        config.model,
        codec=stream,
        semantic=own,
        features=None if heard is None else heard.config,
        window_seconds=config.data.seconds,
    )
    separator = TokenSeparator(settings)
    if heard is not None:
        separator.encoder.load_state_dict(heard.state_dict())
    separator.codec_fingerprint = codec.fingerprint
    separator.semantic_fingerprint = None if semantic is None else semantic.fingerprint
    return TokenSeparatorObjective(
        separator,
        codec,
        semantic,
        level_weights=config.level_weights,
        label_smoothing=config.label_smoothing,
    )


class TrackCuts:
    """Windows of the tracks [tracks, samples], mono, whose sum is near the standard level."""

    def __init__(self, config: Config, model: TokenSeparatorConfig, manifest: str | None = None) -> None:
        data = config.data if manifest is None else replace(config.data, manifest=manifest)
        self._sampler, self._samples = CutSampler(data), model.samples
        self.seek = self._sampler.seek
        self._parts = [[STEMS.index(stem) for stem in TRACK_STEMS[track]] for track in model.tracks]

    def __call__(self, rng: np.random.Generator) -> Tensor:
        """Return a random window."""
        stems = self._sampler.cut(rng, "mix").stems[:, : self._samples]
        return torch.stack([stems[part].sum(dim=0) for part in self._parts])


def augment(tracks: Tensor, config: AugmentationConfig, rng: np.random.Generator) -> Tensor:
    """Draw a gain, a polarity and an equalizer for each of tracks [batch, tracks, samples]."""
    shape = tracks.shape[:2]
    signs = np.where(rng.random(shape) < config.polarity, -1.0, 1.0)
    gains = torch.from_numpy(signs * rng.uniform(*config.gain, shape)).float()[..., None]
    bands_db = rng.uniform(-config.equalizer_db, config.equalizer_db, (*shape, len(EQUALIZER_HZ)))
    return equalize(tracks * gains, torch.from_numpy(bands_db).float())


def equalize(waves: Tensor, bands_db: Tensor) -> Tensor:
    """Filter waves [..., samples] at 48 kHz without delay, by the gains of seven bands [..., 7] in dB.

    Between the bands' middles gains go over into each other along octaves; beyond them they stay.
    """
    samples = waves.shape[-1]
    octaves = torch.fft.rfftfreq(samples, 1 / SAMPLE_RATE_HZ).clamp_min(1.0).log2()
    middles = torch.tensor(EQUALIZER_HZ).log2()
    right = torch.searchsorted(middles, octaves).clamp(1, len(middles) - 1)
    share = ((octaves - middles[right - 1]) / (middles[right] - middles[right - 1])).clamp(0, 1)
    gains_db = torch.lerp(bands_db[..., right - 1], bands_db[..., right], share)
    return torch.fft.irfft(torch.fft.rfft(waves) * 10 ** (gains_db / 20), samples)


def make_validation(config: Config, objective: TokenSeparatorObjective) -> Callable[[int, int], Figures]:
    """Return the function that judges the separator as it is then on fixed windows of other songs.

    Bits per code: with the mixture heard, and with that of another window; with all losses' weights alike.
    """
    rng = np.random.default_rng(_VALIDATION_SEED)
    draw = TrackCuts(config, objective.separator.config, config.validation)
    tracks = torch.stack([draw(rng) for _ in range(config.validation_windows)])

    def validate(process: int, processes: int) -> Figures:  # every process measures all
        figures, size = {}, min(4, config.train.batch_size)
        device = objective.separator.device
        for case, shift in (("heard", 0), ("mismatched", len(tracks) // 2)):
            found = []
            mixtures = tracks.sum(dim=1).roll(shift, 0)
            for first in range(0, len(tracks), size):
                part = tracks[first : first + size].to(device)
                codes = objective.encode(part)
                nats, _ = objective.nats(mixtures[first : first + size].to(device), codes, 0.0)
                found.append(nats * len(part))
            mean = torch.stack(found).sum(dim=0) / len(tracks)  # [tracks, rows]
            figures[f"bits_per_code/{case}"] = (nats_to_bits(float(mean.mean())), 1)
            figures[f"bits_of_first_level/{case}"] = (nats_to_bits(float(mean[:, 0].mean())), 1)
        return figures

    return validate


main = recipe_main("Train the separation by tokens", Config, build)

if __name__ == "__main__":
    sys.exit(main())
