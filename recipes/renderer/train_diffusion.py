"""Stage 4: the latent diffusion decoder of one track (P 3.4, C.4), on shards of the latents recipe.

Run: python -m duotok.recipes.renderer.train_diffusion \\
         recipes/renderer/train_diffusion/small.yaml --out runs/small/diffusion
With data.manifest the decoder learns to be told the chart of what it plays (renderer.chart) as well, with vae
to foretell the chroma of what it draws (renderer.foretold_chroma).
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn

from duotok.lm.sheet.columns import CHART
from duotok.recipes.lm.sheets import SheetLabels
from duotok.recipes.renderer.latents import LatentShards, ShardOrigin
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.chart import COLUMNS as CHART_COLUMNS
from duotok.renderer.chart import UNKNOWN
from duotok.renderer.diffusion import LATENTS_PER_FEATURE, DiffusionDecoder, DiffusionDecoderConfig, Known
from duotok.renderer.foretold_chroma import correlate, sounding
from duotok.renderer.renderer import open_vae
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer


@dataclass(frozen=True, kw_only=True)
class DiffusionLossConfig:
    """Settings of the loss."""

    drop_features: float = 0.1  # probability of the null features, for classifier-free guidance
    know_prefix: float = 0.5  # probability that the first frames are given
    known_seconds: float = 3.0  # longest given prefix; the overlap of a song's windows
    regression_weight: float = 0.25  # of the regression's negative log-likelihood
    chroma_weight: float = 0.25  # of what is missed of the latents' chroma
    drop_chart: float = 0.15  # probability that nothing of the chart is told
    drop_column: float = 0.2  # and of each of its columns by itself

    def __post_init__(self) -> None:
        for name in ("drop_features", "know_prefix", "drop_chart", "drop_column"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"loss.{name} must be in 0..1, got {getattr(self, name)}")
        if self.known_seconds <= 0:
            raise ConfigError(f"loss.known_seconds must be positive, got {self.known_seconds}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how they are cut."""

    latents: str  # folder of the latents recipe
    manifest: str | None = None  # of the same items, with their chords, styles and notes: what charts say
    seconds: float = 10.0  # length of a window
    context_seconds: float = 2.0  # codes before and after, for features as they are inside a song

    def __post_init__(self) -> None:
        if self.seconds < 0.04 or self.context_seconds < 0:
            raise ConfigError("data.seconds must be at least 0.04 and data.context_seconds not negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    tokenizer: str  # folder of the frozen tokenizer
    data: DataConfig
    vae: str | None = None  # folder of the autoencoder whose latents they are; it tells their chroma
    # A decoder of the same track and VAE to go on from, instead of a new one; its tokenizer may be another,
    # and it need not have been told charts.
    start_from: str | None = None
    model: DiffusionDecoderConfig = field(default_factory=DiffusionDecoderConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class CodeFeatures(Protocol):
    """What gives features of codes: the tokenizer, or the code vectors of any other."""

    fingerprint: str | None

    @property
    def dim(self) -> int:
        """Width of the features."""
        ...

    def features(self, codes: Tensor, track: str) -> Tensor:
        """codes [batch, frames25, ...] -> features [batch, frames25, dim]."""
        ...


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = LatentShards(config.data.latents)
    origin = shards.origin
    if origin is None:
        raise DataError(f"{config.data.latents} holds no shards; run duotok.recipes.renderer.latents first")
    if origin.drawn_by:
        raise DataError(f"the latents in {config.data.latents} were drawn by a decoder; give the VAE's")
    if origin.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the shards in {config.data.latents} were made by the tokenizer {origin.tokenizer_fingerprint}, "
            f"{config.tokenizer} is {tokenizer.fingerprint}; make the shards again"
        )
    return make_task(shards, origin, tokenizer, config)


def make_task(shards: LatentShards, origin: ShardOrigin, tokenizer: CodeFeatures, config: Config) -> Task:
    """Make the objective and its batches for features of any tokenizer, whose codes the shards hold."""
    frames, context = round(config.data.seconds * 25), round(config.data.context_seconds * 25)
    names = [name for name, length in shards.frames.items() if length >= frames + 2 * context]
    if not names:
        raise DataError(f"no item in {config.data.latents} is as long as data.seconds and its context")
    mean, deviation = shards.statistics()
    given, needed = (config.model.feature_dim, config.model.latent_dim), (tokenizer.dim, len(mean))
    if given != needed:
        raise ConfigError(
            f"model.feature_dim and model.latent_dim are {given[0]} and {given[1]}, the tokenizer and the "
            f"VAE have {needed[0]} and {needed[1]}; set them in the recipe"
        )
    sheets, styles = None, ()
    if config.data.manifest is not None:
        rate_hz = DuoTokenizer.frame_rate_hz
        sheets = SheetLabels(config.data.manifest, shards.frames, shards.folder, rate_hz)
        styles = tuple(sorted({item.style for item in sheets.items.values()}))
    torch.manual_seed(config.train.seed)
    vae = None if config.vae is None else _open_chroma(config.vae, origin)
    model = replace(config.model, foretells_chroma=vae is not None)
    if config.start_from is None:
        decoder = DiffusionDecoder(replace(model, styles=styles))
        decoder.latent_mean.copy_(mean)
        decoder.latent_deviation.copy_(deviation)
    else:
        decoder = _open_start(config.start_from, model, origin, styles)
    if sheets is not None:
        sheets.styles = decoder.config.styles
    decoder.track = origin.track
    decoder.tokenizer_fingerprint = origin.tokenizer_fingerprint
    decoder.vae_fingerprint = origin.vae_fingerprint
    objective = DiffusionObjective(decoder, tokenizer, origin.track, config.loss, vae)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        cuts = [shards.draw_cut(rng, names, frames, context) for _ in range(config.train.batch_size)]
        batch = {
            "codes": torch.stack([cut.codes for cut in cuts]),
            "offset": torch.tensor([cut.offset for cut in cuts]),
            "latents": torch.stack([cut.latents for cut in cuts]),
        }
        if sheets is not None:
            told = [sheets.cut(cut.name, cut.start, frames)[:, list(CHART)] for cut in cuts]
            batch["chart"] = torch.stack(told)
        return batch

    return Task(objective, make_batch, decoder.save_pretrained)


def _open_chroma(folder: str, origin: ShardOrigin) -> SpectralVAE:
    """The autoencoder of these latents, which must be able to tell their chroma without a sound."""
    vae = open_vae(folder)
    if vae.known_as != origin.vae_fingerprint:
        raise CheckpointError(
            f"the VAE {origin.vae_fingerprint} made the latents, {folder} is {vae.known_as}; give that one"
        )
    if not isinstance(vae, SpectralVAE):
        raise ConfigError(f"only a spectral VAE tells the chroma of latents, {folder} is none; leave out vae")
    return vae


def _open_start(
    folder: str, model: DiffusionDecoderConfig, origin: ShardOrigin, styles: tuple[str, ...]
) -> DiffusionDecoder:
    """A decoder to go on with, which knows these styles and its own from now on; none: it stays as it is."""
    start = DiffusionDecoder.from_pretrained(folder)
    start.require(track=origin.track, vae=origin.vae_fingerprint)
    if start.config.foretells_chroma and not model.foretells_chroma:
        raise ConfigError(f"{folder} foretells chroma, which must be learned on with the rest; give vae")
    alike = [replace(each, styles=(), foretells_chroma=False) for each in (start.config, model)]
    if alike[0] != alike[1]:
        raise ConfigError(f"{folder} has another model than the recipe; give it the settings of that run")
    own = start.config.styles
    decoder = DiffusionDecoder(replace(model, styles=(*own, *(each for each in styles if each not in own))))
    known = start.state_dict()
    for name, weight in decoder.state_dict().items():
        if name not in known:
            known[name] = weight  # of a decoder that was told no chart, or foretold no chroma
        elif known[name].shape != weight.shape:
            known[name] = torch.cat([known[name], weight[len(known[name]) :]])  # styles that it did not know
    decoder.load_state_dict(known)
    return decoder.train()


class DiffusionObjective(nn.Module):
    """Codes and their latents -> loss of the decoder; tokenizer and autoencoder stay as they are."""

    def __init__(
        self,
        decoder: DiffusionDecoder,
        tokenizer: CodeFeatures,
        track: str,
        config: DiffusionLossConfig,
        vae: SpectralVAE | None = None,
    ) -> None:
        super().__init__()
        assert isinstance(tokenizer, nn.Module)
        self.decoder = decoder
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.track = track
        self.config = config

    def train(self, mode: bool = True) -> "DiffusionObjective":
        """Set the decoder's mode; what is frozen stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        if self.vae is not None:
            self.vae.eval()
        return self

    def forward(
        self, codes: Tensor, offset: Tensor, latents: Tensor, chart: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the losses "total", "diffusion" (mean squared error) and "regression" (nats per number).

        With an autoencoder "chroma" as well: 1 less the correlation with the latents' own.

        codes: [batch, context frames] int64 (with a third dimension where a frame has several codes), more
        than the window needs; offset: [batch], where the window begins in them; latents: [batch, latent_dim,
        frames] and chart: [batch, frames25, COLUMNS] of the window alone.
        """
        frames25 = latents.shape[2] // LATENTS_PER_FEATURE
        features = cast(CodeFeatures, self.tokenizer).features(codes, self.track)
        index = offset[:, None] + torch.arange(frames25, device=codes.device)
        features = features.gather(1, index[:, :, None].expand(-1, -1, features.shape[2]))
        clean = self.decoder.normalize(latents)
        batch = len(clean)
        dropped = torch.rand(batch, device=clean.device) < self.config.drop_features
        condition = self.decoder.encode_condition(features, dropped, self._hide(chart))
        known = self._draw_known(clean)
        time = torch.sigmoid(torch.randn(batch, device=clean.device))  # logit-normal (2403.03206, 3.1)
        noise = torch.randn_like(clean)
        path = self.decoder.path
        noisy = path.mix(clean, noise, time[:, None, None])
        error = self.decoder(noisy, time, condition, known) - path.target(clean, noise, time[:, None, None])
        unknown = (1 - known.mask).expand_as(error)  # the given frames need no prediction
        diffusion = (error.square() * unknown).sum() / unknown.sum()
        # The regression's Gaussian negative log-likelihood, without its constant.
        deviation = condition.deviation
        regression = (0.5 * ((clean - condition.mean) / deviation).square() + deviation.log()).mean()
        total = diffusion + self.config.regression_weight * regression
        losses = {"diffusion": diffusion, "regression": regression}
        if self.vae is not None and condition.chroma is not None:
            with torch.no_grad():
                heard = self.vae.hear_chroma(latents)
            counts = sounding(heard) * ~dropped[:, None]
            missed = counts * (1 - correlate(condition.chroma, heard))
            losses["chroma"] = missed.sum() / counts.sum().clamp_min(1)
            total = total + self.config.chroma_weight * losses["chroma"]
        return {"total": total, **losses}

    def _hide(self, chart: Tensor | None) -> Tensor | None:
        if chart is None:
            return None
        shape = len(chart), 1, CHART_COLUMNS
        hidden = torch.rand(shape, device=chart.device) < self.config.drop_column
        hidden |= torch.rand(shape[0], 1, 1, device=chart.device) < self.config.drop_chart
        return torch.where(hidden, UNKNOWN, chart)

    def _draw_known(self, clean: Tensor) -> Known:
        batch, _, frames = clean.shape
        longest = max(1, min(frames // 2, round(self.config.known_seconds * 50)))
        count = 1 + (torch.rand(batch, device=clean.device) * longest).long()
        count *= torch.rand(batch, device=clean.device) < self.config.know_prefix
        mask = (torch.arange(frames, device=clean.device) < count[:, None]).to(clean.dtype)[:, None, :]
        return Known(latents=clean * mask, mask=mask)


main = recipe_main("Latent diffusion decoder", Config, build)

if __name__ == "__main__":
    sys.exit(main())
