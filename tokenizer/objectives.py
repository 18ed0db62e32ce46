"""What stages 2 and 3 minimize: read-out losses on noisy, then on quantized features (P 3.2, 3.3)."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from .common.errors import ConfigError
from .losses import chroma_distances, mask_distances, mel_distances, summarize_by_kind, text_losses
from .model import TRACKS, DuoTokenizer


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss table (P eq. 2 and 5); the paper gives no numbers for them."""

    mel: float = 1.0
    chroma: float = 1.0
    text: float = 0.1  # CTC, nats per token of the lyrics
    masks: float = 1.0  # stage 2
    commitment: float = 1.0  # stage 3
    usage: float = 0.05  # stage 3: pull towards using all codes

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 0:
                raise ConfigError(
                    f"loss weight {field.name} must not be negative, got {getattr(self, field.name)}"
                )


class MultiTaskObjective(nn.Module):
    """Stage 2: mel, chroma, lyrics and masks through a bottleneck with replacement noise (P 3.2)."""

    def __init__(self, tokenizer: DuoTokenizer, weights: LossWeights, noise_probability: float) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.noise_probability = tokenizer, weights, noise_probability
        tokenizer.tracks.requires_grad_(False)

    def forward(self, stems: Tensor, kind: Tensor, text: Tensor, text_span: Tensor) -> dict[str, Tensor]:
        """Return named losses, each over all cuts and, after a slash, over the cuts of one kind.

        stems [batch, 4, samples] sum to the cuts, at the standard level; kind [batch] indexes KINDS; text
        [runs, longest] lyric tokens, -1 after their end; text_span [runs, 3] tells where each run is sung
        (see `text_losses`).
        """
        tokenizer = self.tokenizer
        wave = stems.sum(dim=1)
        mel = spectrogram(tokenizer, wave)
        heads = tokenizer.read_heads(tokenizer.bottleneck(tokenizer.encoder(mel), self.noise_probability))
        losses = {
            "mel": mel_distances(heads.mel, mel),
            "chroma": chroma_distances(heads.chroma_logits, tokenizer.chroma(wave)),
        }
        if heads.text_logits is not None:
            losses["text"] = text_losses(heads.text_logits, text, text_span)
        if heads.mask_logits is not None:
            losses["masks"] = mask_distances(heads.mask_logits, tokenizer.mask_targets(stems))
        return summarize(losses, kind, self.weights)


class DualCodebookObjective(nn.Module):
    """Stage 3: stems routed to their codebooks, heads on quantized features, encoder frozen (P 3.3)."""

    def __init__(self, tokenizer: DuoTokenizer, weights: LossWeights, freeze_encoder: bool = True) -> None:
        super().__init__()
        self.tokenizer, self.weights, self.freeze_encoder = tokenizer, weights, freeze_encoder
        tokenizer.encoder.requires_grad_(not freeze_encoder)
        tokenizer.bottleneck.requires_grad_(False)

    def forward(
        self, vocal: Tensor, accompaniment: Tensor, kind: Tensor, text: Tensor, text_span: Tensor
    ) -> dict[str, Tensor]:
        """Return named losses as stage 2 does, and those of the two quantizers.

        vocal, accompaniment: [batch, samples] at the standard level; kind, text and text_span: of the cuts of
        both, the vocals first, as in stage 2.
        """
        tokenizer, weights = self.tokenizer, self.weights
        wave = torch.cat([vocal, accompaniment])
        mel = spectrogram(tokenizer, wave)
        with torch.set_grad_enabled(not self.freeze_encoder):
            encoded = tokenizer.encoder(mel)
        parts, quantizers = [], {}
        for track, features in zip(TRACKS, encoded.split([len(vocal), len(accompaniment)]), strict=True):
            route = tokenizer.route(track)
            quantized = route.quantizer(route.project_in(features))
            parts.append(route.project_out(quantized.vectors))
            quantizers[f"{track}_commitment"] = quantized.commitment
            quantizers[f"{track}_usage"] = quantized.usage
        heads = tokenizer.read_heads(torch.cat(parts))
        losses = {
            "mel": mel_distances(heads.mel, mel),
            "chroma": chroma_distances(heads.chroma_logits, tokenizer.chroma(wave)),
        }
        if heads.text_logits is not None:
            losses["text"] = text_losses(heads.text_logits, text, text_span)
        summary = summarize(losses, kind, weights)
        commitment = quantizers["vocal_commitment"] + quantizers["accompaniment_commitment"]
        usage = quantizers["vocal_usage"] + quantizers["accompaniment_usage"]
        summary["total"] = summary["total"] + weights.commitment * commitment + weights.usage * usage
        return summary | quantizers


@torch.no_grad()
def spectrogram(tokenizer: DuoTokenizer, wave: Tensor) -> Tensor:
    """Return the normalized log-mel of wave [batch, samples]."""
    return tokenizer.normalize(tokenizer.log_mel(wave))


def summarize(losses: dict[str, Tensor], kind: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """Return the weighted total, the mean of each loss, and its mean over the cuts of each kind.

    losses: [batch] each, NaN for cuts that it does not apply to; kind [batch].
    """
    summary = summarize_by_kind(losses, kind)
    total = torch.stack([getattr(weights, name) * summary[name] for name in losses]).sum()
    return {"total": total, **summary}
