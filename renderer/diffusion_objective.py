"""The training loss of the diffusion decoder (P C.4)."""

from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..tokenizer.common.errors import ConfigError
from .diffusion import LATENTS_PER_FEATURE, Condition, DiffusionDecoder, Known


@dataclass(frozen=True, kw_only=True)
class DiffusionLossConfig:
    """Settings of the loss."""

    drop_features: float = 0.1  # probability of the null features, for classifier-free guidance
    know_prefix: float = 0.5  # probability that the first frames are given
    known_seconds: float = 3.0  # longest given prefix; the overlap of a song's windows
    regression_weight: float = 0.25  # of the regression's negative log-likelihood
    time_deviation: float = 1.0  # of the logit-normal draw of the diffusion time (arXiv 2403.03206, 3.1)

    def __post_init__(self) -> None:
        for name in ("drop_features", "know_prefix"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"loss.{name} must be in 0..1, got {getattr(self, name)}")
        if self.known_seconds <= 0 or self.time_deviation <= 0:
            raise ConfigError("loss.known_seconds and loss.time_deviation must be positive")


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


class DiffusionObjective(nn.Module):
    """Codes and their latents -> loss of the decoder; the tokenizer stays as it is."""

    def __init__(
        self, decoder: DiffusionDecoder, tokenizer: CodeFeatures, track: str, config: DiffusionLossConfig
    ) -> None:
        super().__init__()
        assert isinstance(tokenizer, nn.Module)
        self.decoder = decoder
        self.tokenizer = tokenizer.requires_grad_(False).eval()
        self.track = track
        self.config = config

    def train(self, mode: bool = True) -> "DiffusionObjective":
        """Set the decoder's mode; the frozen tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    def forward(self, codes: Tensor, offset: Tensor, latents: Tensor) -> dict[str, Tensor]:
        """Return the losses "total", "diffusion" (mean squared error) and "regression" (nats per number).

        codes: [batch, context frames] int64 (with a third dimension where a frame has several codes), more
        than the window needs; offset: [batch], where the window begins in them; latents: [batch, latent_dim,
        frames] of the window alone.
        """
        frames25 = latents.shape[2] // LATENTS_PER_FEATURE
        features = self._features(codes)
        index = offset[:, None] + torch.arange(frames25, device=codes.device)
        features = features.gather(1, index[:, :, None].expand(-1, -1, features.shape[2]))
        clean = self.decoder.normalize(latents)
        batch = len(clean)
        dropped = torch.rand(batch, device=clean.device) < self.config.drop_features
        condition = self.decoder.encode_condition(features, dropped)
        known = self._draw_known(clean)
        time = torch.sigmoid(torch.randn(batch, device=clean.device) * self.config.time_deviation)
        noise = torch.randn_like(clean)
        path = self.decoder.path
        noisy = path.mix(clean, noise, time[:, None, None])
        error = self.decoder(noisy, time, condition, known) - path.target(clean, noise, time[:, None, None])
        unknown = (1 - known.mask).expand_as(error)  # the given frames need no prediction
        diffusion = (error.square() * unknown).sum() / unknown.sum()
        losses = {"total": diffusion, "diffusion": diffusion}
        if self.decoder.config.regression:
            losses["regression"] = regression_loss(condition, clean)
            losses["total"] = diffusion + self.config.regression_weight * losses["regression"]
        return losses

    def _features(self, codes: Tensor) -> Tensor:
        return cast(CodeFeatures, self.tokenizer).features(codes, self.track)

    def _draw_known(self, clean: Tensor) -> Known:
        batch, _, frames = clean.shape
        longest = max(1, min(frames // 2, round(self.config.known_seconds * 50)))
        count = 1 + (torch.rand(batch, device=clean.device) * longest).long()
        count *= torch.rand(batch, device=clean.device) < self.config.know_prefix
        mask = (torch.arange(frames, device=clean.device) < count[:, None]).to(clean.dtype)[:, None, :]
        return Known(latents=clean * mask, mask=mask)


def regression_loss(condition: Condition, clean: Tensor) -> Tensor:
    """Gaussian negative log-likelihood of clean latents in nats per number, without its constant."""
    deviation = condition.deviation
    return (0.5 * ((clean - condition.mean) / deviation).square() + deviation.log()).mean()
