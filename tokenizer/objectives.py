"""What stages 1 to 3 minimize: BEST-RQ, and the loss table per cut and kind of cut (P 3.1, eq. 2, 3, 5)."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common.errors import ConfigError
from .heads import HeadOutputs
from .model import MEL_PER_FRAME, TRACKS, DuoTokenizer
from .quantizers import QUANTIZER_LOSSES

KINDS = ("mix", "vocal", "accompaniment", "instrumental")


def chroma_distances(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy [batch] of chroma in 0..1 [batch, frames, 12], less its entropy."""
    loss = functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    entropy = functional.binary_cross_entropy(target, target, reduction="none")
    return (loss - entropy).mean(dim=(1, 2))


def mask_distances(logits: Tensor, target: Tensor) -> Tensor:
    """Return the L1 distance [batch] of soft masks [batch, frames, 4, bands] to their targets (P eq. 3)."""
    return (logits.float().softmax(dim=2) - target).abs().mean(dim=(1, 2, 3))


def text_losses(logits: Tensor, text: Tensor, span: Tensor) -> Tensor:
    """Return the CTC loss [batch] in nats per token; NaN where there is no text.

    logits [batch, frames, text_tokens], the last one the blank; text [runs, longest], -1 after its end; span
    [runs, 3], the cut's index and the first and after-last frame of each run. A text that does not fit into
    its frames counts as none. Runs shorter than the cut leave CTC fewer alignments to choose from.
    """
    cut, first, stop = span.unbind(dim=1)
    frames = stop.clamp_max(logits.shape[1]) - first
    steps = torch.arange(int(frames.max()), device=logits.device)
    places = (first[:, None] + steps).clamp_max(logits.shape[1] - 1)
    lengths = (text >= 0).sum(dim=1)
    losses = functional.ctc_loss(
        logits[cut[:, None], places].float().log_softmax(dim=-1).transpose(0, 1),
        text.clamp_min(0),
        frames,
        lengths,
        blank=logits.shape[-1] - 1,
        reduction="none",
        zero_infinity=True,
    )
    has_text = (lengths > 0) & (losses > 0)
    nothing = losses.new_zeros(len(logits))
    nats = nothing.index_add(0, cut, torch.where(has_text, losses, 0.0))
    tokens = nothing.index_add(0, cut, torch.where(has_text, lengths, 0).to(losses.dtype))
    return torch.where(tokens > 0, nats / tokens.clamp_min(1), torch.nan)


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss table (P eq. 2 and 5); the paper gives no numbers for them."""

    mel: float = 1.0
    chroma: float = 1.0
    text: float = 0.1  # CTC, nats per token of the lyrics
    masks: float = 1.0  # stage 2
    # Of stage 3's quantizers, each loss as `quantizers.Quantized` tells it.
    commitment: float = 0.25
    codebook: float = 1.0
    usage: float = 0.05  # pull towards using all codes

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) >= 0:
                raise ConfigError(f"loss weight {field.name} must not be negative, got {value}")


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
        losses = read_out_losses(tokenizer, heads, wave, mel, text, text_span)
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
        parts: list[Tensor] = []
        found: dict[str, Tensor] = {}
        for track, features in zip(TRACKS, encoded.split([len(vocal), len(accompaniment)]), strict=True):
            route = tokenizer.route(track)
            quantized = route.quantizer(route.project_in(features))
            parts.append(route.project_out(quantized.vectors))
            found |= {f"{track}_{name}": getattr(quantized, name) for name in QUANTIZER_LOSSES}
        heads = tokenizer.read_heads(torch.cat(parts))
        summary = summarize(read_out_losses(tokenizer, heads, wave, mel, text, text_span), kind, weights)
        for name in QUANTIZER_LOSSES:
            loss = torch.stack([found[f"{track}_{name}"] for track in TRACKS]).sum()
            summary["total"] = summary["total"] + getattr(weights, name) * loss
        return summary | found


def read_out_losses(
    tokenizer: DuoTokenizer, heads: HeadOutputs, wave: Tensor, mel: Tensor, text: Tensor, text_span: Tensor
) -> dict[str, Tensor]:
    """What the heads, but for the masks, get wrong of wave [batch, samples] of log-mel mel: [batch] each."""
    losses = {
        "mel": (heads.mel.float() - mel).abs().mean(dim=(1, 2)),
        "chroma": chroma_distances(heads.chroma_logits, tokenizer.chroma(wave)),
    }
    if heads.text_logits is not None:
        losses["text"] = text_losses(heads.text_logits, text, text_span)
    return losses


@torch.no_grad()
def spectrogram(tokenizer: DuoTokenizer, wave: Tensor) -> Tensor:
    """Return the normalized log-mel of wave [batch, samples]."""
    return tokenizer.normalize(tokenizer.log_mel(wave))


def summarize(losses: dict[str, Tensor], kind: Tensor, weights: LossWeights) -> dict[str, Tensor]:
    """Return {"total": weighted sum, name: mean, "name/kind": mean over the cuts of that kind}.

    losses: [batch] each, NaN for cuts that it does not apply to; kind [batch] indexes KINDS. The mean of a
    loss that applies to no cut of the batch is 0.
    """
    summary: dict[str, Tensor] = {}
    for name, values in losses.items():
        applies = values.isfinite()
        known = torch.where(applies, values, 0.0)
        summary[name] = known.sum() / applies.sum().clamp_min(1)
        for index, label in enumerate(KINDS):
            chosen = applies & (kind == index)
            if chosen.any():
                summary[f"{name}/{label}"] = known[chosen].mean().detach()
    total = torch.stack([getattr(weights, name) * summary[name] for name in losses]).sum()
    return {"total": total, **summary}


class RandomProjectionQuantizer(nn.Module):
    """Frozen random projection to the nearest of frozen random unit vectors."""

    projection: Tensor
    codebook: Tensor

    def __init__(self, in_dim: int, code_dim: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("projection", torch.randn(in_dim, code_dim) / in_dim**0.5)
        self.register_buffer("codebook", functional.normalize(torch.randn(codebook_size, code_dim), dim=-1))

    def forward(self, frames: Tensor) -> Tensor:
        """frames [batch, frames, in_dim] -> labels [batch, frames] int64."""
        projected = functional.normalize(frames @ self.projection, dim=-1)
        return (projected @ self.codebook.T).argmax(dim=-1)


class BestRQ(nn.Module):
    """Masked prediction of random-projection labels by the tokenizer's encoder."""

    CODES = 1024  # that are predicted
    MASK_PROBABILITY = 0.06  # of a frame to start a masked span
    MASK_FRAMES = 8  # length of a span

    def __init__(self, tokenizer: DuoTokenizer) -> None:
        super().__init__()
        tokenizer.requires_grad_(False)
        tokenizer.encoder.requires_grad_()
        self.tokenizer = tokenizer
        in_dim = tokenizer.config.mel_bands * MEL_PER_FRAME
        self.quantizer = RandomProjectionQuantizer(in_dim, 16, self.CODES)
        self.head = nn.Linear(tokenizer.dim, self.CODES)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [batch, samples] -> {"total": cross-entropy in nats, "accuracy": share of masked frames}."""
        with torch.no_grad():
            mel = self.tokenizer.normalize(self.tokenizer.log_mel(wave))
            labels = self.quantizer(mel.unflatten(1, (-1, MEL_PER_FRAME)).flatten(2))
            starts = torch.rand(labels.shape, device=mel.device) < self.MASK_PROBABILITY
            # A start masks itself and the following frames.
            spans = functional.pad(starts.float(), (self.MASK_FRAMES - 1, 0))[:, None]
            masked = functional.max_pool1d(spans, self.MASK_FRAMES, stride=1)[:, 0].bool()
            masked[:, 0] |= ~masked.any(dim=1)
            noise = 0.1 * torch.randn_like(mel)
            mel = torch.where(masked.repeat_interleave(MEL_PER_FRAME, dim=1)[..., None], noise, mel)
        logits = self.head(self.tokenizer.encoder(mel))[masked].float()
        loss = functional.cross_entropy(logits, labels[masked])
        accuracy = (logits.argmax(dim=-1) == labels[masked]).float().mean()
        return {"total": loss, "accuracy": accuracy}
