"""The contract of every acoustic codec: 48 kHz waves <-> a few codes per frame, coarse to fine.

Language models of acoustic tokens depend on this page alone. The codec on this project's VAE is
`renderer.latent_codec`, published ones are `tokenizer.published_codecs`; `renderer.latent_codec.open_codec`
opens either.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .common.audio import SAMPLE_RATE_HZ
from .common.checkpoint import Component, ConfigT
from .common.errors import AudioError, ConfigError


class AcousticCodec(Component[ConfigT], ABC):
    """48 kHz wave <-> codes [batch, codebooks, frames]; codebook k refines what those before it leave.

    Codes of the first codebooks alone can be decoded, too. Waves of any length and codes of one batch are of
    one length; neither way passes gradients. `fingerprint` names the weights, as of any component.
    """

    frame_rate_hz: float  # frames per second of sound
    codebooks: int  # levels
    codebook_size: int  # codes of each level, 0..codebook_size - 1

    def bits_per_second(self, codebooks: int | None = None) -> float:
        """Return the rate of the codes of the first codebooks, of all by default."""
        return self.frame_rate_hz * (codebooks or self.codebooks) * math.log2(self.codebook_size)

    def frames(self, samples: int) -> int:
        """Return how many frames a wave of so many samples at 48 kHz becomes."""
        return math.ceil(samples * self.frame_rate_hz / SAMPLE_RATE_HZ - 1e-6)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 1 or 2 channels, samples] at 48 kHz -> codes [batch, codebooks, frames] int64."""
        if wave.ndim != 3 or wave.shape[1] not in (1, 2) or wave.shape[2] < 1:
            raise AudioError(f"a codec needs a wave [batch, 1 or 2, samples], got {tuple(wave.shape)}")
        return self._encode(wave.expand(-1, 2, -1))

    @torch.no_grad()
    def decode(self, codes: Tensor, samples: int | None = None) -> Tensor:
        """codes [batch, 1..codebooks, frames] -> wave [batch, 2, samples] at 48 kHz, float32.

        samples: all that the frames give by default. Raises ConfigError for codes of another codec's shape or
        size, and for more samples than the frames give.
        """
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.codebooks or codes.shape[2] < 1:
            raise ConfigError(
                f"this codec has {self.codebooks} codebooks and needs codes [batch, 1..{self.codebooks}, "
                f"frames], got {tuple(codes.shape)}; give codes of this codec"
            )
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.codebook_size:
            raise ConfigError(
                f"codes must be in 0..{self.codebook_size - 1}, got {low}..{high}; give codes of this codec"
            )
        longest = math.floor(codes.shape[2] * SAMPLE_RATE_HZ / self.frame_rate_hz + 1e-6)
        samples = longest if samples is None else samples
        if not 0 < samples <= longest:
            raise ConfigError(f"{codes.shape[2]} frames give 1 to {longest} samples, not {samples}")
        return self._decode(codes, samples)

    @abstractmethod
    def _encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] at 48 kHz -> codes [batch, codebooks, frames]."""

    @abstractmethod
    def _decode(self, codes: Tensor, samples: int) -> Tensor:
        """codes [batch, 1..codebooks, frames] -> wave [batch, 2, samples] at 48 kHz."""
