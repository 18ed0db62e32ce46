"""BEST-RQ pre-training: predict random-projection labels of masked frames (P 3.1)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .model import MEL_PER_FRAME, DuoTokenizer


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

    def __init__(
        self,
        tokenizer: DuoTokenizer,
        *,
        codebook_size: int = 1024,
        mask_probability: float = 0.06,
        mask_frames: int = 8,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.mask_probability, self.mask_frames = mask_probability, mask_frames
        in_dim = tokenizer.config.mel_bands * MEL_PER_FRAME
        self.quantizer = RandomProjectionQuantizer(in_dim, 16, codebook_size)
        self.head = nn.Linear(tokenizer.dim, codebook_size)
        for module in (
            tokenizer.bottleneck,
            tokenizer.tracks,
            tokenizer.upper,
            tokenizer.mel_head,
            tokenizer.chroma_head,
        ):
            module.requires_grad_(False)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [batch, samples] -> {"total": cross-entropy in nats, "accuracy": share of masked frames}."""
        with torch.no_grad():
            mel = self.tokenizer.normalize(self.tokenizer.log_mel(wave))
            labels = self.quantizer(mel.unflatten(1, (-1, MEL_PER_FRAME)).flatten(2))
            starts = torch.rand(labels.shape, device=mel.device) < self.mask_probability
            # A start masks itself and the following frames.
            masked = functional.max_pool1d(
                functional.pad(starts.float(), (self.mask_frames - 1, 0))[:, None], self.mask_frames, stride=1
            )[:, 0].bool()
            masked[:, 0] |= ~masked.any(dim=1)
            noise = 0.1 * torch.randn_like(mel)
            mel = torch.where(masked.repeat_interleave(MEL_PER_FRAME, dim=1)[..., None], noise, mel)
        logits = self.head(self.tokenizer.encoder(mel))[masked].float()
        loss = functional.cross_entropy(logits, labels[masked])
        accuracy = (logits.argmax(dim=-1) == labels[masked]).float().mean()
        return {"total": loss, "accuracy": accuracy}
