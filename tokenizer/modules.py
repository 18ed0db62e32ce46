"""The parts between spectrogram and read-out: downsampling encoder, bottlenecks and upsampling heads."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .blocks import LocalTransformer


class Encoder(nn.Module):
    """Normalized log-mel at 100 Hz -> convolutional downsampling by 4 -> Transformer, at 25 Hz."""

    def __init__(self, mel_bands: int, transformer: LocalTransformer, dim: int) -> None:
        super().__init__()
        self.down1 = nn.Conv1d(mel_bands, dim, kernel_size=4, stride=2, padding=1)
        self.down2 = nn.Conv1d(dim, dim, kernel_size=4, stride=2, padding=1)
        self.norm = nn.RMSNorm(dim)
        self.transformer = transformer

    def forward(self, mel: Tensor) -> Tensor:
        """mel [batch, 4 * frames, bands] -> [batch, frames, dim]."""
        hidden = functional.gelu(self.down1(mel.transpose(1, 2)))
        hidden = self.down2(hidden).transpose(1, 2)
        return self.transformer(self.norm(hidden))


class NoisyBottleneck(nn.Module):
    """Stage 2's bottleneck: frames are replaced by noise of the features' own mean and variance (P eq. 1)."""

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, code_dim)
        self.project_out = nn.Linear(code_dim, dim)

    def forward(self, features: Tensor, noise_probability: float) -> Tensor:
        """features [batch, frames, dim] -> the same shape."""
        codes = self.project_in(features)
        if noise_probability > 0:
            statistics = codes.detach().float().flatten(0, 1)
            noise = torch.randn_like(codes) * statistics.std(dim=0) + statistics.mean(dim=0)
            replaced = torch.rand(codes.shape[:2], device=codes.device) < noise_probability
            codes = torch.where(replaced[..., None], noise.to(codes.dtype), codes)
        return self.project_out(codes)


class UpsamplingHead(nn.Module):
    """Transposed convolutions that double the frame rate `doublings` times, then a linear read-out."""

    def __init__(self, dim: int, hidden: int, out_dim: int, doublings: int) -> None:
        super().__init__()
        widths = [dim] + [hidden] * doublings
        self.layers = nn.ModuleList(
            nn.ConvTranspose1d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Conv1d(hidden, out_dim, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> [batch, frames * 2**doublings, out_dim]."""
        hidden = features.transpose(1, 2)
        for layer in self.layers:
            hidden = functional.gelu(layer(hidden))
        return self.out(hidden).transpose(1, 2)
