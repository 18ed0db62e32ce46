"""The spectral VAE: 48 kHz stereo <-> 64 latents per 20 ms, a linear coding with learned corrections."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.common.errors import ConfigError
from ..tokenizer.common.long_waves import let_go, new_wave
from ..tokenizer.spectra import chroma_filterbank
from .autoencoder import Autoencoder
from .spectrum import StereoFeatures, griffin_lim

OVERLAP_FRAMES = 24  # of a chunk of a song that repeat the one before
TAIL_FRAMES = 6  # of a chunk that lack the future and are made again by the next one
FADE_FRAMES = 2  # crossfade, inside sound that both chunks share
_INAUDIBLE_POWER = 1e-12  # of a pitch class, where a full sine has 1


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution over time, then two pointwise layers (Liu et al. 2022; 1-D as in Vocos)."""

    def __init__(self, dim: int, kernel_frames: int, expansion: int = 3) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel_frames, padding=kernel_frames // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.activation = nn.GELU()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        context = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden + self.contract(self.activation(self.expand(self.norm(context))))


class ResidualBranch(nn.Module):
    """Input -> a few ConvNeXt blocks -> a correction that is zero before training."""

    def __init__(self, inputs: int, outputs: int, *, dim: int, blocks: int, kernel_frames: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, dim)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, kernel_frames) for _ in range(blocks)))
        self.norm = nn.LayerNorm(dim)
        self.leave = nn.Linear(dim, outputs)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)
        self.reach_frames = blocks * (kernel_frames // 2)

    def forward(self, values: Tensor, outputs: int | None = None) -> Tensor:
        """values [batch, frames, inputs] -> correction [batch, frames, outputs], all or the first ones."""
        hidden = self.norm(self.blocks(self.enter(values)))
        return functional.linear(hidden, self.leave.weight[:outputs], self.leave.bias[:outputs])


@dataclass(frozen=True, kw_only=True)
class SpectralVAEConfig:
    """Settings of the spectral VAE; the defaults are what was measured best at 64 latents."""

    mid_latents: int = 58  # of the sum of both channels
    side_latents: int = 6  # of their difference
    fft_size: int = 4096
    hop_samples: int = 960  # 50 Hz
    low_bins: int = 700  # kept one by one (8.2 kHz at 4096); those above are pooled
    group: int = 4  # bins per pooled value
    power: float = 0.2  # compression of magnitudes
    side_bands: int = 32  # gains of the side relative to the mid, see StereoFeatures
    corner_hz: float = 300.0  # a bin at f counts as 1 / (f + corner): loudness of pitches above noise
    encoder_blocks: int = 0  # ConvNeXt blocks of the encoder's correction; 0 = linear encoder
    decoder_blocks: int = 4  # the same of the decoder
    dim: int = 256  # width of the corrections
    kernel_frames: int = 7
    phase_iterations: int = 8  # Griffin-Lim, after the phase-vocoder start

    def __post_init__(self) -> None:
        sizes = ("mid_latents", "side_latents", "fft_size", "hop_samples", "low_bins", "group", "side_bands")
        for name in (*sizes, "dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("encoder_blocks", "decoder_blocks", "phase_iterations"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.fft_size % 2 or self.hop_samples * 4 > self.fft_size or self.hop_samples % 2:
            raise ConfigError(
                f"fft_size {self.fft_size} and hop_samples {self.hop_samples} must be even, overlap 4 times"
            )
        if self.low_bins + self.group > self.fft_size // 2:
            raise ConfigError(f"low_bins must leave room for a group below {self.fft_size // 2}")
        if not 0 < self.power <= 1 or self.corner_hz <= 0:
            raise ConfigError("power must be in (0, 1] and corner_hz positive")
        if self.kernel_frames % 2 != 1:
            raise ConfigError(f"kernel_frames must be odd, got {self.kernel_frames}")


class SpectralVAE(Autoencoder[SpectralVAEConfig]):
    """PCA of compressed spectra, corrected by ConvNeXt branches; phase by phase vocoder and Griffin-Lim."""

    KIND = "spectral_vae"
    CONFIG = SpectralVAEConfig
    STORED = ("latents_of",)
    CHUNK_FRAMES = 500  # of a song that are decoded at once: 10 s

    feature_weight: Tensor
    feature_mean: Tensor
    mid_basis: Tensor
    side_basis: Tensor
    latent_scale: Tensor
    feature_gain: Tensor
    chroma_filters: Tensor

    def __init__(self, config: SpectralVAEConfig) -> None:
        super().__init__(config)
        self.features = StereoFeatures(
            fft_size=config.fft_size,
            hop_samples=config.hop_samples,
            low_bins=config.low_bins,
            group=config.group,
            power=config.power,
            bands=config.side_bands,
        )
        mid_dim, side_dim = self.features.mid_dim, self.features.side_dim
        self.hop_samples = config.hop_samples
        self.latent_dim = config.mid_latents + config.side_latents
        if config.mid_latents > mid_dim or config.side_latents > side_dim:
            raise ConfigError(
                f"mid_latents {config.mid_latents} and side_latents {config.side_latents} must be at most "
                f"{mid_dim} and {side_dim}, which is what there is to code"
            )
        weight = self.features.weights(config.corner_hz)
        self.register_buffer("feature_weight", weight, persistent=False)
        # The linear coding; `set_linear` fills it. Until then any orthonormal basis keeps the shapes alive.
        self.register_buffer("feature_mean", torch.zeros(self.features.dim))
        self.register_buffer("mid_basis", torch.eye(mid_dim, config.mid_latents))
        self.register_buffer("side_basis", torch.eye(side_dim, config.side_latents))
        self.register_buffer("latent_scale", torch.ones(self.latent_dim))
        # What a decoder knows only roughly it gives too softly, for it gives the mean of compressed values:
        # gains, fitted after training, with which each band keeps its mean energy.
        self.register_buffer("feature_gain", torch.ones(self.features.dim))
        self.register_buffer("chroma_filters", chroma_filterbank(config.fft_size), persistent=False)
        shape = {"dim": config.dim, "kernel_frames": config.kernel_frames}

        def correct(inputs: int, outputs: int, blocks: int) -> ResidualBranch | None:
            return ResidualBranch(inputs, outputs, blocks=blocks, **shape) if blocks else None

        self.encoder = correct(self.features.dim, self.latent_dim, config.encoder_blocks)
        self.decoder = correct(self.latent_dim, self.features.dim, config.decoder_blocks)

    def set_linear(self, *, mean: Tensor, mid_basis: Tensor, side_basis: Tensor, scale: Tensor) -> None:
        """Store a fitted linear coding: feature mean, bases of weighted features, latent deviation."""
        self.feature_mean.copy_(mean)
        self.mid_basis.copy_(mid_basis)
        self.side_basis.copy_(side_basis)
        self.latent_scale.copy_(scale)

    def _encode(self, wave: Tensor) -> Tensor:
        return self.encode_features(self.features(wave))

    def encode_features(self, features: Tensor) -> Tensor:
        """features [batch, frames, feature_dim] -> latents [batch, latent_dim, frames]."""
        centred = (features - self.feature_mean) * self.feature_weight
        mid, side = centred.split([self.features.mid_dim, self.features.side_dim], dim=-1)
        linear = torch.cat([mid @ self.mid_basis, side @ self.side_basis], dim=-1)
        latents = linear / self.latent_scale
        if self.encoder is not None:
            latents = latents + self.encoder(centred)
        return latents.transpose(1, 2)

    def decode_features(self, latents: Tensor, bins: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> features [batch, frames, feature_dim].

        bins: of so many lowest bins alone [batch, frames, bins], with no time and memory for the others.
        """
        latents = latents.transpose(1, 2)
        mid, side = (latents * self.latent_scale).split(
            [self.config.mid_latents, self.config.side_latents], dim=-1
        )
        centred = mid @ self.mid_basis[:bins].T
        if bins is None:
            centred = torch.cat([centred, side @ self.side_basis.T], dim=-1)
        if self.decoder is not None:
            centred = centred + self.decoder(latents, bins)
        return (centred / self.feature_weight[:bins] + self.feature_mean[:bins]) * self.feature_gain[:bins]

    def hear_chroma(self, latents: Tensor) -> Tensor:
        """Chroma [batch, frames, 12] of what latents [batch, latent_dim, frames] decode to, C first.

        Root of the power per pitch class, near 1 for a full sine, by magnitudes alone, with gradients. Of
        shorter windows than the tokenizer's: notes of a bass are wider.
        """
        bins = len(self.chroma_filters)
        if bins > self.features.pooled.low_bins:
            raise ConfigError(f"chroma needs low_bins of at least {bins}, this VAE has fewer")
        with torch.autocast(latents.device.type, enabled=False):  # bf16 to the fifth power tells little
            magnitudes = self.features.magnitudes(self.decode_features(latents.float(), bins))
            power = (magnitudes * (2 / self.features.stft.window.sum())).square()
            return (power @ self.chroma_filters + _INAUDIBLE_POWER).sqrt()

    def _decode(self, latents: Tensor) -> Tensor:
        return self.synthesize(self.decode_features(latents))

    def synthesize(
        self, features: Tensor, held_mid: Tensor | None = None, held_end: Tensor | None = None
    ) -> Tensor:
        """features [batch, frames, dim] -> wave [batch, 2, samples].

        held_mid, held_end: spectrum of the first and of the last frames, where they are known.
        """
        stft = self.features.stft
        magnitudes = self.features.mid_magnitudes(features)
        mid = griffin_lim(
            magnitudes, stft, iterations=self.config.phase_iterations, held=held_mid, held_end=held_end
        )
        side = stft.inverse(self.features.side_spectrum(features, stft(mid)))
        return torch.stack([mid + side, mid - side], dim=1)

    @torch.no_grad()
    def decode_between(
        self,
        latents: Tensor,
        before: Tensor,
        after: Tensor,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Decode with the phases of the sound before and after, see `Autoencoder.decode_between`."""
        return self._decode_in_chunks(latents, progress or (lambda frames: None), before, after)

    def _decode_in_chunks(
        self,
        latents: Tensor,
        progress: Callable[[int], None],
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, frames * hop]: chunks that go on where the sound ends.

        Frames that the finished sound already fills keep its spectrum during the phase search: both sides of
        a joint are the same wave, so nothing cancels.
        """
        hop, frames = self.hop_samples, latents.shape[-1]
        wave = new_wave(2, frames * hop)
        done = 0  # frames whose sound is final
        if before is not None:
            wave[:, : before.shape[-1]] = before
            done = before.shape[-1] // hop
        while done < frames:
            start = max(0, done - OVERLAP_FRAMES)
            stop = min(frames, start + self.CHUNK_FRAMES)
            if frames - stop < OVERLAP_FRAMES:
                stop = frames  # no tiny last chunk
            past = wave[:, start * hop : done * hop]
            chunk = self._decode_chunk(latents, start, stop, past, after if stop == frames else None).cpu()
            final = stop if stop == frames else stop - TAIL_FRAMES
            chunk = chunk[:, : (final - start) * hop]
            if done:
                fade = FADE_FRAMES * hop
                joint, rise = done * hop, torch.linspace(0, 1, fade)
                within = (done - start) * hop
                wave[:, joint - fade : joint].lerp_(chunk[:, within - fade : within], rise)
                chunk = chunk[:, within:]
            wave[:, done * hop : final * hop] = chunk
            let_go(wave)
            progress(final - done)
            done = final
        return wave

    def _decode_chunk(
        self, latents: Tensor, start: int, stop: int, past: Tensor, future: Tensor | None = None
    ) -> Tensor:
        """Decode frames start..stop to [2, (stop - start) * hop].

        past, future [2, k * hop]: how they begin and end.
        """
        reach = self.decoder.reach_frames if self.decoder is not None else 0
        low, high = max(0, start - reach), min(latents.shape[-1], stop + reach)
        features = self.decode_features(latents[None, :, low:high])[:, start - low : stop - low]
        # Only frames whose whole window lies inside the finished sound are known.
        held, held_end, stft = None, None, self.features.stft
        half = -(-stft.fft_size // (2 * self.hop_samples))
        if (known := past.shape[-1] // self.hop_samples - half) > 0:
            held = stft(past.mean(dim=0, keepdim=True).to(features.device))[..., :known]
        if future is not None and future.shape[-1] // self.hop_samples > half:
            held_end = stft(future.mean(dim=0, keepdim=True).to(features.device))[..., half:]
        return self.synthesize(features, held, held_end)[0]
