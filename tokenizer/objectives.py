"""What stages 2 and 3 minimize: read-out losses on noisy, then on quantized features (P 3.2, 3.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common.errors import ConfigError
from .model import TRACKS, DuoTokenizer


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss table (P eq. 2 and 5)."""

    mel: float = 1.0
    chroma: float = 1.0
    commitment: float = 1.0  # stage 3
    usage: float = 0.05  # stage 3: pull towards using all codes

    def __post_init__(self) -> None:
        for name in ("mel", "chroma", "commitment", "usage"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss weight {name} must not be negative, got {getattr(self, name)}")


class MultiTaskObjective(nn.Module):
    """Stage 2: reconstruct mel and chroma through a bottleneck with Gaussian replacement noise (P 3.2)."""

    def __init__(self, tokenizer: DuoTokenizer, weights: LossWeights, noise_probability: float) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.noise_probability = tokenizer, weights, noise_probability
        tokenizer.tracks.requires_grad_(False)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [batch, samples] at the standard level -> named losses."""
        tokenizer = self.tokenizer
        mel, chroma = read_out_targets(tokenizer, wave)
        features = tokenizer.bottleneck(tokenizer.encoder(mel), self.noise_probability)
        losses = read_out_losses(tokenizer, features, mel, chroma)
        losses["total"] = self.weights.mel * losses["mel"] + self.weights.chroma * losses["chroma"]
        return losses


class DualCodebookObjective(nn.Module):
    """Stage 3: stems routed to their codebooks, heads on quantized features, encoder frozen (P 3.3)."""

    def __init__(self, tokenizer: DuoTokenizer, weights: LossWeights) -> None:
        super().__init__()
        self.tokenizer, self.weights = tokenizer, weights
        tokenizer.encoder.requires_grad_(False)
        tokenizer.bottleneck.requires_grad_(False)

    def forward(self, vocal: Tensor, accompaniment: Tensor) -> dict[str, Tensor]:
        """vocal, accompaniment: [batch, samples] at the standard level -> named losses."""
        tokenizer, weights = self.tokenizer, self.weights
        wave = torch.cat([vocal, accompaniment])
        mel, chroma = read_out_targets(tokenizer, wave)
        with torch.no_grad():
            encoded = tokenizer.encoder(mel)
        parts, losses = [], {}
        for track, features in zip(TRACKS, encoded.split([len(vocal), len(accompaniment)]), strict=True):
            route = tokenizer.route(track)
            quantized = route.quantizer(route.project_in(features))
            parts.append(route.project_out(quantized.vectors))
            losses[f"{track}_commitment"] = quantized.commitment
            losses[f"{track}_usage"] = quantized.usage
        losses |= read_out_losses(tokenizer, torch.cat(parts), mel, chroma)
        commitment = losses["vocal_commitment"] + losses["accompaniment_commitment"]
        usage = losses["vocal_usage"] + losses["accompaniment_usage"]
        losses["total"] = (
            weights.mel * losses["mel"]
            + weights.chroma * losses["chroma"]
            + weights.commitment * commitment
            + weights.usage * usage
        )
        return losses


@torch.no_grad()
def read_out_targets(tokenizer: DuoTokenizer, wave: Tensor) -> tuple[Tensor, Tensor]:
    """Return normalized log-mel and chroma of wave [batch, samples]."""
    return tokenizer.normalize(tokenizer.log_mel(wave)), tokenizer.chroma(wave)


def read_out_losses(
    tokenizer: DuoTokenizer, features: Tensor, mel_target: Tensor, chroma_target: Tensor
) -> dict[str, Tensor]:
    """Return L1 of normalized log-mel and cross-entropy of chroma for features after the bottleneck."""
    mel, chroma_logits = tokenizer.decode_features(features)
    mel_loss = functional.l1_loss(mel.float(), mel_target)
    chroma_loss = functional.binary_cross_entropy_with_logits(chroma_logits.float(), chroma_target)
    # What no prediction could avoid is taken off, so that 0 is a perfect chroma.
    entropy = functional.binary_cross_entropy(chroma_target, chroma_target)
    return {"mel": mel_loss, "chroma": chroma_loss - entropy}
