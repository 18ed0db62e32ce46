"""What every autoencoder behind the renderer offers (P 3.4)."""

from typing import Protocol

from torch import Tensor


class Autoencoder(Protocol):
    """48 kHz stereo <-> latents of a fixed rate."""

    @property
    def latent_dim(self) -> int:
        """Numbers per frame."""
        ...

    @property
    def hop_samples(self) -> int:
        """Samples per frame."""
        ...

    @property
    def latent_rate_hz(self) -> float:
        """Frames per second."""
        ...

    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> latents [batch, latent_dim, ceil(samples / hop)], about unit scale."""
        ...

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, samples]; all frames' samples by default."""
        ...
