"""What every autoencoder behind the renderer offers (P 3.4)."""

from collections.abc import Callable
from typing import Protocol, Self

import torch
from torch import Tensor


class Autoencoder(Protocol):
    """48 kHz stereo <-> latents of a fixed rate."""

    @property
    def fingerprint(self) -> str | None:
        """Of the weights as they were last written or read."""
        ...

    @property
    def latent_dim(self) -> int:
        """Numbers per frame."""
        ...

    @property
    def hop_samples(self) -> int:
        """Samples per frame, at the rate that the network itself works at."""
        ...

    @property
    def latent_rate_hz(self) -> float:
        """Frames per second."""
        ...

    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> latents [batch, latent_dim, frames], about unit scale.

        As many frames as it takes to cover the wave: ceil(samples / hop_samples) of a network at 48 kHz.
        """
        ...

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, samples]; all frames' samples by default."""
        ...

    def decode_song(
        self, latents: Tensor, samples: int, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, samples] in chunks; progress gets the frames of each."""
        ...

    def to(self, device: str | torch.device, /) -> Self:
        """Move all weights."""
        ...
