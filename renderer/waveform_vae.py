"""The waveform autoencoder: Oobleck of Stable Audio (by diffusers), with ear-VAE's latent transformer."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.blocks import RotaryPositions, rotate
from ..tokenizer.common.chunks import plan_chunks
from ..tokenizer.common.errors import ConfigError
from ..tokenizer.common.long_waves import let_go, new_wave
from .autoencoder import Autoencoder

FEED_FORWARD_FACTOR = 4


class GlobalAttention(nn.Module):
    """Self-attention of every frame to every frame; rotary positions turn the first half of each head."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape; rotary: each [frames, head_dim / 2]."""
        heads = "batch frames (three heads dim) -> three batch heads frames dim"
        query, key, value = rearrange(self.qkv(hidden), heads, three=3, dim=self.head_dim)
        query, key = (_rotate_half(part, rotary).to(value.dtype) for part in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(rearrange(mixed, "batch heads frames dim -> batch frames (heads dim)"))


class GatedFeedForward(nn.Module):
    """Two layers, the first gated by SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * FEED_FORWARD_FACTOR * dim)  # values, then gates
        self.down = nn.Linear(FEED_FORWARD_FACTOR * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        values, gates = self.up(hidden).chunk(2, dim=-1)
        return self.down(values * functional.silu(gates))


class LatentBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = GlobalAttention(dim, head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = GatedFeedForward(dim)
        # Branches start silent: an untrained stack is the identity.
        for linear in (self.attention.out, self.feed_forward.down):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.feed_forward.down.bias)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class LatentTransformer(nn.Module):
    """Blocks over all frames of a stretch of latents, in the channels of the latents themselves."""

    def __init__(self, *, dim: int, head_dim: int, blocks: int) -> None:
        super().__init__()
        self.rotary = RotaryPositions(head_dim // 2)
        self.blocks = nn.ModuleList(LatentBlock(dim, head_dim) for _ in range(blocks))

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, dim, frames] -> the same shape."""
        hidden = latents.mT
        rotary = self.rotary(hidden.shape[1])
        for block in self.blocks:
            hidden = block(hidden, rotary)
        return hidden.mT

    def in_windows(self, latents: Tensor, window: int, overlap: int) -> Tensor:
        """The same by windows of so many frames at most, crossfaded where they overlap by `overlap` or more.

        Exact for a single window only: beyond it, a frame sees its window and not the whole song.
        """
        frames = latents.shape[-1]
        result = self(latents[..., :window])
        while (done := result.shape[-1]) < frames:
            start = min(done - overlap, frames - window)  # the last window looks back as far as the others
            part = self(latents[..., start : start + window])
            rise = torch.linspace(0, 1, overlap, device=latents.device)
            faded = torch.lerp(result[..., start : start + overlap], part[..., :overlap], rise)
            result = torch.cat([result[..., :start], faded, part[..., overlap:]], dim=-1)
        return result


def _rotate_half(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """heads [batch, heads, frames, head_dim]: the first half by its position, the second as it is."""
    turned, kept = heads.chunk(2, dim=-1)
    return torch.cat([rotate(turned, *rotary), kept.to(rotary[0].dtype)], dim=-1)


SMALLEST_DEVIATION = 1e-4


@dataclass(frozen=True, kw_only=True)
class OobleckVAEConfig:
    """Settings: by default the paper's rates (48 kHz, 50 Hz, 64 latents; P 3.4), Stable Audio's width."""

    sample_rate_hz: int = 48_000  # of the network; the interface stays at 48 kHz
    latent_dim: int = 64
    decoder_width: int = 128
    strides: tuple[int, ...] = (2, 4, 4, 5, 6)  # their product is the hop
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    transformer_blocks: int = 0  # over the latents, before the decoder
    head_dim: int = 64  # of the transformer

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.channel_multiples) or not self.strides:
            raise ConfigError("strides and channel_multiples must have the same number of entries")
        if min(self.strides) < 2 or min(self.channel_multiples) < 1:
            raise ConfigError(
                f"strides must be at least 2 and channel_multiples at least 1, got {self.strides} and "
                f"{self.channel_multiples}"
            )
        for name in ("sample_rate_hz", "latent_dim", "decoder_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.transformer_blocks < 0:
            raise ConfigError(f"transformer_blocks must not be negative, got {self.transformer_blocks}")
        if self.transformer_blocks and (
            self.head_dim < 4 or self.head_dim % 4 or self.latent_dim % self.head_dim
        ):
            raise ConfigError(
                f"head_dim must be a multiple of 4 that divides latent_dim {self.latent_dim}, "
                f"got {self.head_dim}"
            )


class OobleckVAE(Autoencoder[OobleckVAEConfig]):
    """48 kHz stereo <-> latents by strided convolutions (Evans et al. 2024); the latents are the means."""

    KIND = "oobleck_vae"
    CONFIG = OobleckVAEConfig
    CHUNK_FRAMES = 250  # of the convolutions at a time: 5 s at 50 Hz
    WINDOW_SECONDS = 30.0  # of the transformer at a time
    OVERLAP_SECONDS = 3.0

    def __init__(self, config: OobleckVAEConfig) -> None:
        super().__init__(config)
        self.latent_dim = config.latent_dim
        self.hop_samples = prod(config.strides)
        self.sample_rate_hz = config.sample_rate_hz
        # A second of importing, which the other autoencoder needs not wait for.
        from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck

        self.model = AutoencoderOobleck(
            encoder_hidden_size=2 * config.latent_dim,  # means and deviations
            downsampling_ratios=list(config.strides),
            channel_multiples=list(config.channel_multiples),
            decoder_channels=config.decoder_width,
            decoder_input_channels=config.latent_dim,
            audio_channels=2,
            sampling_rate=config.sample_rate_hz,
        )
        sizes = {"dim": config.latent_dim, "head_dim": config.head_dim, "blocks": config.transformer_blocks}
        self.transformer = LatentTransformer(**sizes) if config.transformer_blocks else None

    @property
    def reach_frames(self) -> int:
        """How many frames to each side the decoder's convolutions see from the one that a sample lies in."""
        units = 3 * (1 + 3 + 9)  # kernels of 7, dilated
        past = future = 3
        for stride in self.config.strides:
            past, future, padding = past + units, future + units, ceil(stride / 2)
            past = (past + 2 * stride - 1 - padding) // stride
            future = (future + padding + stride - 1) // stride
        return max(past, future) + 3

    def encode_distribution(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """wave [batch, 2, samples] at the own rate -> mean and deviation [batch, latent_dim, frames]."""
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.hop_samples))
        mean, scale = self.model.encoder(wave).chunk(2, dim=1)
        return mean, functional.softplus(scale) + SMALLEST_DEVIATION

    def _encode(self, wave: Tensor) -> Tensor:
        return self.encode_distribution(wave)[0]

    def _decode(self, latents: Tensor) -> Tensor:
        return self._convolve(latents if self.transformer is None else self.transformer(latents))

    def _decode_in_chunks(self, latents: Tensor, progress: Callable[[int], None]) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, frames * hop_samples]: one pass, to float rounding.

        A transformer, which sees everything at once, runs in windows of 30 s beyond 30 s, whose results are
        crossfaded over 3 s before the convolutions, so that no two waves are mixed.
        """
        frames, hop = latents.shape[-1], self.hop_samples
        if self.transformer is not None:
            window, overlap = (
                max(1, round(seconds * self.latent_rate_hz))
                for seconds in (self.WINDOW_SECONDS, self.OVERLAP_SECONDS)
            )
            latents = self.transformer.in_windows(latents[None], window, overlap)[0]
        wave = new_wave(2, frames * hop)
        for part in plan_chunks(frames, self.CHUNK_FRAMES, self.reach_frames):
            chunk = self._convolve(latents[None, :, part.low : part.high])[0, :, part.inside(hop)]
            wave[:, part.start * hop : part.stop * hop] = chunk.cpu()
            let_go(wave)
            progress(part.stop - part.start)
        return wave

    def _convolve(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, frames * hop_samples]."""
        # Odd strides make the transposed convolutions a few samples shorter than a whole number of hops.
        length = latents.shape[-1] * self.hop_samples
        wave = self.model.decoder(latents)
        return functional.pad(wave, (0, max(0, length - wave.shape[-1])))[..., :length]
