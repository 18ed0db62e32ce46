"""What hears the mixture: a log-mel spectrogram at 50 Hz and a Conformer (Gulati et al., 2020) on it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tokenizer.blocks import Attention, FeedForward, RMSNorm, RotaryPositions
from ...tokenizer.common.errors import ConfigError
from ...tokenizer.spectra import LogMel

FFT_SIZE, HOP_SAMPLES = 2048, 960  # 50 Hz (arXiv 2604.09371, 2.2)
FEATURE_RATE_HZ = 50.0
_MEAN, _DEVIATION = -2.0, 1.0  # of log10-mel magnitudes of music at the standard level, about


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Settings of the Conformer; the defaults are the paper's, which does not tell its width."""

    mel_bands: int = 120
    dim: int = 768
    layers: int = 8
    heads: int = 12
    feed_forward_dim: int = 2048
    kernel_frames: int = 31  # of the depthwise convolution
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.dim % (2 * self.heads):
            raise ConfigError(
                f"a Conformer of dim {self.dim} does not divide into {self.heads} heads of even width; "
                "change dim or heads, with one layer or more"
            )
        if self.kernel_frames % 2 != 1 or self.mel_bands < 1:
            raise ConfigError(f"kernel_frames must be odd and mel_bands positive, got {self.kernel_frames}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")


class ConvolutionModule(nn.Module):
    """Gated pointwise, depthwise and pointwise convolution; normed per frame, which needs no statistics."""

    def __init__(self, dim: int, kernel_frames: int) -> None:
        super().__init__()
        self.gated = nn.Linear(dim, 2 * dim, bias=False)
        padding = kernel_frames // 2
        self.depthwise = nn.Conv1d(dim, dim, kernel_frames, padding=padding, groups=dim, bias=False)
        self.norm = RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Features [batch, frames, dim] -> the same shape."""
        hidden = functional.glu(self.gated(features), dim=-1)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return self.out(functional.silu(self.norm(hidden)))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward; pre-norm, normed at the end."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim, self.dropout = config.dim, config.dropout
        self.norms = nn.ModuleList(RMSNorm(dim) for _ in range(5))
        self.first = FeedForward(dim, config.feed_forward_dim)
        self.attention = Attention(dim, config.heads)
        self.convolution = ConvolutionModule(dim, config.kernel_frames)
        self.second = FeedForward(dim, config.feed_forward_dim)

    def forward(self, features: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Features [batch, frames, dim] -> the same shape."""
        first, attention, convolution, second, last = self.norms
        features = features + 0.5 * self._drop(self.first(first(features)))
        features = features + self._drop(self.attention(attention(features), rotary))
        features = features + self._drop(self.convolution(convolution(features)))
        features = features + 0.5 * self._drop(self.second(second(features)))
        return last(features)

    def _drop(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.dropout, self.training)


class Conformer(nn.Module):
    """Wave at 48 kHz -> features at 50 Hz."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.log_mel = LogMel(config.mel_bands, FFT_SIZE, HOP_SAMPLES)
        self.enter = nn.Linear(config.mel_bands, config.dim)
        self.rotary = RotaryPositions(config.dim // config.heads)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.layers))

    def forward(self, wave: Tensor) -> Tensor:
        """Mono wave [batch, samples] -> [batch, ceil(samples / 960), dim]."""
        wave = functional.pad(wave, (0, -wave.shape[-1] % HOP_SAMPLES))
        with torch.autocast(wave.device.type, enabled=False):
            mel = (self.log_mel(wave) - _MEAN) / _DEVIATION
        hidden, rotary = self.enter(mel), self.rotary(mel.shape[1])
        for block in self.blocks:
            hidden = block(hidden, rotary)
        return hidden
