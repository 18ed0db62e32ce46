"""A mixture becomes four stems: the mask head of stage 2, sharpened by what the mixture's own spectrum shows.

The mask head (P eq. 3) speaks from features that passed stage 2's narrow bottleneck: it knows who plays where
but not each harmonic. `MaskEstimator` starts from its masks and looks at the mixture bin by bin.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common.audio import SAMPLE_RATE_HZ
from .common.component import Component
from .common.errors import AudioError, ConfigError
from .heads import MASKS_PER_FRAME, STEMS
from .level import level_gain
from .mask_unet import MaskUNet
from .model import HOP_SAMPLES, DuoTokenizer, DuoTokenizerConfig

FFT_SIZE = 4096
STFT_HOP = HOP_SAMPLES // MASKS_PER_FRAME
FINE_BINS = 384  # below 4.5 kHz each FFT bin is a band of its own
CHUNK_FRAMES = 500  # tokenizer frames, 20 s


@dataclass(frozen=True, kw_only=True)
class SeparatorConfig:
    """Settings of the separator; the tokenizer is stage 2's, with its mask head."""

    tokenizer: DuoTokenizerConfig = field(default_factory=lambda: DuoTokenizerConfig(mask_head=True))
    channels: int = 32  # of the finest grid of the estimator; they double with each scale, to 128
    scales: int = 5
    coarse_bands: int = 128  # bands above 4.5 kHz

    def __post_init__(self) -> None:
        if not self.tokenizer.mask_head:
            raise ConfigError("the separator needs a tokenizer with a mask head; start from stage 2")
        if self.channels < 1 or self.scales < 1 or self.coarse_bands < 1:
            raise ConfigError(
                "separator: channels, scales and coarse_bands must be positive, got "
                f"{self.channels}, {self.scales} and {self.coarse_bands}"
            )
        if (FINE_BINS + self.coarse_bands) % 2**self.scales:
            raise ConfigError(
                f"separator: {FINE_BINS} + coarse_bands must be a multiple of {2**self.scales} for "
                f"{self.scales} scales, got {self.coarse_bands}"
            )


class MaskEstimator(nn.Module):
    """Masks of four stems per FFT bin from the mixture's spectrum and the mask head's bands."""

    bands: Tensor
    spread: Tensor
    from_mel: Tensor

    def __init__(self, config: SeparatorConfig, mel_filters: Tensor) -> None:
        super().__init__()
        bands = fine_bands(config.coarse_bands)  # [bins, bands]
        narrow = bands / bands.sum(dim=0)
        self.register_buffer("bands", narrow, persistent=False)
        self.register_buffer("spread", bands / bands.sum(dim=1, keepdim=True), persistent=False)
        shares = narrow[: len(mel_filters)].T @ mel_filters  # [bands, mel_bands]
        shares[shares.sum(dim=1) == 0, -1] = 1  # above the highest mel band
        self.register_buffer("from_mel", shares / shares.sum(dim=1, keepdim=True), persistent=False)
        self.unet = MaskUNet(1 + len(STEMS), len(STEMS), bands.shape[1], config.channels, config.scales)

    def forward(self, magnitude: Tensor, mask_logits: Tensor) -> Tensor:
        """Return masks [batch, frames, 4, bins] that sum to 1 over the stems.

        magnitude [batch, frames, bins] of the mixture at the standard level; mask_logits [batch, frames, 4,
        mel_bands] of the tokenizer.
        """
        level = (magnitude.square() @ self.bands).clamp_min(1e-10).log10() / 2 + 2
        coarse = mask_logits.log_softmax(dim=2).clamp_min(-8) @ self.from_mel.T  # [batch, frames, 4, bands]
        grid = torch.cat([level[:, None], coarse.transpose(1, 2) / 4 + 1], dim=1)
        frames = grid.shape[2]
        grid = functional.pad(grid, (0, 0, 0, -frames % self.unet.period))
        logits = coarse + self.unet(grid)[:, :, :frames].transpose(1, 2)
        return logits.float().softmax(dim=2) @ self.spread.T


class MaskSeparator(Component[SeparatorConfig]):
    """Stage 2's tokenizer and the mask estimator; its four stems sum to the mixture."""

    KIND = "separator"
    CONFIG = SeparatorConfig

    window: Tensor

    def __init__(self, config: SeparatorConfig) -> None:
        super().__init__(config)
        self.tokenizer = DuoTokenizer(config.tokenizer)
        self.estimator = MaskEstimator(config, self.tokenizer.log_mel.mel_filters)
        self.register_buffer("window", torch.hann_window(FFT_SIZE), persistent=False)

    def masks(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """Return masks [batch, 4, bins, frames] of wave [batch, samples] at the standard level, and its STFT.

        samples must be a multiple of 1920. The STFT is [batch, bins, frames], 50 frames a second.
        """
        tokenizer = self.tokenizer
        with torch.no_grad():
            mel = tokenizer.normalize(tokenizer.log_mel(wave))
            features = tokenizer.upper(tokenizer.bottleneck(tokenizer.encoder(mel), 0.0))
            assert tokenizer.mask_head is not None
            logits = tokenizer.mask_head(features)
            spectrum = self.stft(wave)
        magnitude = spectrum.abs().transpose(1, 2) * (2 / self.window.sum())
        return self.estimator(magnitude, logits).permute(0, 2, 3, 1), spectrum

    def stft(self, wave: Tensor) -> Tensor:
        """Return the STFT [..., bins, samples // 960] of wave [..., samples]."""
        spectrum = torch.stft(
            wave.flatten(0, -2),
            FFT_SIZE,
            STFT_HOP,
            window=self.window,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum[..., : wave.shape[-1] // STFT_HOP].unflatten(0, wave.shape[:-1])

    @torch.no_grad()
    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """Return {"vocal", "drums", "bass", "other"}, each [channels, samples], of wave at 48 kHz.

        Any length in bounded memory: chunks overlap by as much as a mask can see. The stems sum to wave.
        """
        if wave.ndim != 2 or wave.shape[-1] == 0:
            raise AudioError(f"a mixture must be [channels, samples], got shape {tuple(wave.shape)}")
        samples = wave.shape[-1]
        padded = functional.pad(wave, (0, -samples % HOP_SAMPLES))
        gain = level_gain(padded.mean(dim=0, keepdim=True))
        frames, margin = padded.shape[-1] // HOP_SAMPLES, self._margin()
        stems = torch.zeros(len(STEMS), *padded.shape)
        # Chunks begin where the U-Net's coarsest frames begin, so that its grids are those of one pass.
        grain = self.estimator.unet.period
        for start in range(0, frames, CHUNK_FRAMES):
            stop = min(frames, start + CHUNK_FRAMES)
            low, high = max(0, start - margin) // grain * grain, min(frames, stop + margin)
            piece = padded[:, low * HOP_SAMPLES : high * HOP_SAMPLES].to(self.window.device)
            found = self._separate_piece(piece, gain.to(piece.device))
            inside = slice((start - low) * HOP_SAMPLES, (stop - low) * HOP_SAMPLES)
            stems[:, :, start * HOP_SAMPLES : stop * HOP_SAMPLES] = found[:, :, inside].cpu()
        stems = stems[:, :, :samples]
        # What rounding and the borders leave over belongs to what has no name.
        stems[STEMS.index("other")] += wave - stems.sum(dim=0)
        return dict(zip(STEMS, stems, strict=True))

    def _separate_piece(self, wave: Tensor, gain: Tensor) -> Tensor:
        masks, _ = self.masks(wave.mean(dim=0, keepdim=True) * gain)
        spectrum = self.stft(wave)  # [channels, bins, frames]
        masked = masks[0, :, None] * spectrum  # [4, channels, bins, frames]
        masked = functional.pad(masked, (0, 1))  # istft wants the frame at the very end
        return torch.istft(
            masked.flatten(0, 1), FFT_SIZE, STFT_HOP, window=self.window, length=wave.shape[-1]
        ).unflatten(0, masked.shape[:2])

    def _margin(self) -> int:
        """Tokenizer frames that a sample's stems depend on to each side."""
        tokenizer = self.tokenizer
        reach = tokenizer.encoder.transformer.reach_frames + tokenizer.upper.reach_frames
        return reach + self.estimator.unet.reach // MASKS_PER_FRAME + 8


def fine_bands(coarse: int) -> Tensor:
    """Return weights [bins, bands]: one band per bin up to 4.5 kHz, then wider and wider ones, to 24 kHz."""
    bins = FFT_SIZE // 2 + 1
    edges = torch.logspace(0, 1, coarse + 1, base=bins / FINE_BINS, dtype=torch.float64) * FINE_BINS
    edges = edges.round().long()
    edges[-1] = bins
    weights = torch.zeros(bins, FINE_BINS + coarse)
    weights[torch.arange(FINE_BINS), torch.arange(FINE_BINS)] = 1
    for band, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
        weights[low : max(high, low + 1), FINE_BINS + band] = 1
    return weights


assert SAMPLE_RATE_HZ / STFT_HOP == 50
