"""The contract of every autoencoder behind the renderer (P 3.4): excerpts at once, songs chunk by chunk."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from ..tokenizer.common.checkpoint import Component, ConfigT
from ..tokenizer.common.chunks import plan_chunks
from ..tokenizer.common.errors import ConfigError

ENCODER_CHUNK_SECONDS = 40
ENCODER_HALO_SECONDS = 2  # seen on both sides of a chunk; more than any encoder reaches


class Autoencoder(Component[ConfigT], ABC):
    """48 kHz stereo <-> latents of about unit scale; no gradients pass a network of another rate."""

    latent_dim: int  # numbers per frame
    hop_samples: int  # samples per frame, at the network's own rate
    sample_rate_hz: int = SAMPLE_RATE_HZ  # of the network; the interface is always at 48 kHz
    latents_of: str | None = None  # fingerprint of another whose latents these are, where there is one

    @property
    def known_as(self) -> str | None:
        """What names its latents: the fingerprint of the first autoencoder that made such ones."""
        return self.latents_of or self.fingerprint

    @property
    def latent_rate_hz(self) -> float:
        """Frames per second."""
        return self.sample_rate_hz / self.hop_samples

    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> latents [batch, latent_dim, as many frames as cover it]."""
        if wave.ndim != 3 or wave.shape[1] != 2 or wave.shape[2] < 1:
            raise ConfigError(f"the VAE needs a wave [batch, 2, samples], got {tuple(wave.shape)}")
        return self._encode(self._to_network(wave))

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, samples]; all frames' samples by default."""
        if latents.ndim != 3 or latents.shape[1] != self.latent_dim or latents.shape[2] < 1:
            raise ConfigError(
                f"the VAE needs latents [batch, {self.latent_dim}, frames], got {tuple(latents.shape)}"
            )
        samples = self._require_samples(latents.shape[2], samples)
        return self._from_network(self._decode(latents), samples)

    @torch.no_grad()
    def encode_song(self, wave: Tensor) -> Tensor:
        """wave [2, samples] of any length -> latents [latent_dim, frames] as of one pass, chunk by chunk."""
        wave, hop = self._to_network(wave), self.hop_samples
        chunk, halo = (int(s * self.latent_rate_hz) for s in (ENCODER_CHUNK_SECONDS, ENCODER_HALO_SECONDS))
        parts = []
        for part in plan_chunks(-(-wave.shape[-1] // hop), chunk, halo):
            latents = self._encode(wave[None, :, part.low * hop : part.high * hop])[0]
            parts.append(latents[:, part.inside()])
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def decode_song(
        self, latents: Tensor, samples: int, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, samples] on the CPU by chunks; progress gets frames."""
        samples = self._require_samples(latents.shape[-1], samples)
        return self._from_network(self._decode_in_chunks(latents, progress or (lambda frames: None)), samples)

    @torch.no_grad()
    def decode_between(
        self,
        latents: Tensor,
        before: Tensor,
        after: Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, samples] that goes on from sound and leads into other.

        before, after: what it begins and ends with [2, samples of whole frames], perhaps of no length; who
        cannot go by them may leave them.
        """
        return self.decode_song(latents, self._require_samples(latents.shape[-1], None), progress)

    @abstractmethod
    def _encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] at the network's rate -> latents [batch, latent_dim, frames]."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, frames * hop_samples] at its rate."""

    @abstractmethod
    def _decode_in_chunks(self, latents: Tensor, progress: Callable[[int], None]) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, frames * hop_samples] at its rate, on the CPU."""

    def _to_network(self, wave: Tensor) -> Tensor:
        """wave [..., samples] at 48 kHz -> the same at the network's rate, to the last sample begun."""
        own_samples = -(-wave.shape[-1] * self.sample_rate_hz // SAMPLE_RATE_HZ)
        return _resample(wave, SAMPLE_RATE_HZ, self.sample_rate_hz, own_samples)

    def _from_network(self, wave: Tensor, samples: int) -> Tensor:
        """wave [..., n] at the network's rate -> [..., samples] at 48 kHz."""
        return _resample(wave, self.sample_rate_hz, SAMPLE_RATE_HZ, samples)

    def _require_samples(self, frames: int, samples: int | None) -> int:
        """The samples at 48 kHz to give of so many frames."""
        longest = frames * self.hop_samples * SAMPLE_RATE_HZ // self.sample_rate_hz
        samples = longest if samples is None else samples
        if not 0 < samples <= longest:
            raise ConfigError(f"{frames} latent frames give 1 to {longest} samples, not {samples}")
        return samples


def _resample(wave: Tensor, from_hz: int, to_hz: int, samples: int) -> Tensor:
    """wave [..., n] at from_hz -> [..., samples] at to_hz; gradients pass only at equal rates."""
    return wave[..., :samples] if from_hz == to_hz else resample(wave, from_hz, to_hz, samples)
