"""A mixture becomes four stems: the mask head of stage 2, sharpened by what the mixture's own spectrum shows.

The mask head (P eq. 3) speaks from features that passed stage 2's narrow bottleneck: it knows who plays where
but not each harmonic. `MaskEstimator` starts from its masks and looks at the mixture bin by bin.
"""

from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from .common.checkpoint import Component
from .common.chunks import plan_chunks
from .common.errors import AudioError, ConfigError
from .common.long_waves import let_go, new_wave
from .heads import MASKS_PER_FRAME, STEMS
from .model import HOP_SAMPLES, DuoTokenizer, DuoTokenizerConfig
from .spectra import level_gain

WIDEST = 128  # channels


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each cell, so that a cell's value does not hang on how long a song is."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(channels)

    def forward(self, grid: Tensor) -> Tensor:
        """grid [batch, channels, frames, bands] -> the same shape."""
        cells = rearrange(grid, "batch channels frames bands -> batch frames bands channels")
        return rearrange(self.norm(cells), "batch frames bands channels -> batch channels frames bands")


class Scale(nn.Module):
    """One halving of the grid on the way down and its doubling on the way up."""

    def __init__(self, fine: int, coarse: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(fine, coarse, kernel_size=5, stride=2, padding=2)
        self.down_norm = ChannelNorm(coarse)
        self.up = nn.ConvTranspose2d(coarse, fine, kernel_size=4, stride=2, padding=1)
        self.join = nn.Conv2d(2 * fine, fine, kernel_size=3, padding=1)
        self.join_norm = ChannelNorm(fine)

    def descend(self, grid: Tensor) -> Tensor:
        """[batch, fine, frames, bands] -> [batch, coarse, frames / 2, bands / 2]."""
        return functional.gelu(self.down_norm(self.down(grid)))

    def ascend(self, grid: Tensor, skipped: Tensor) -> Tensor:
        """[batch, coarse, frames / 2, bands / 2] and what `descend` was given -> the shape of the latter."""
        joined = self.join(torch.cat([self.up(grid), skipped], dim=1))
        return skipped + functional.gelu(self.join_norm(joined))


class MaskUNet(nn.Module):
    """U-Net over a time-frequency grid: logits per stem (Ronneberger et al., 2015; Jansson et al., 2017).

    Convolutions see a harmonic alike wherever it lies; what depends on the place, as that a bass plays low,
    is learned per band.
    """

    def __init__(self, inputs: int, outputs: int, bands: int, channels: int, scales: int) -> None:
        super().__init__()
        self.period = 2**scales  # frames and bands must be multiples of it
        widths = [min(channels * 2**number, max(channels, WIDEST)) for number in range(scales + 1)]
        self.into = nn.Conv2d(inputs, channels, kernel_size=3, padding=1)
        self.scales = nn.ModuleList(
            Scale(fine, coarse) for fine, coarse in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Conv2d(channels, outputs, kernel_size=1, bias=False)
        nn.init.zeros_(self.out.weight)
        self.place_in = nn.Parameter(torch.zeros(channels, 1, bands))
        self.place_out = nn.Parameter(torch.zeros(outputs, 1, bands))

    @property
    def reach(self) -> int:
        """Frames to each side that a cell depends on."""
        # Per scale, in frames of its finer grid: 2 down, 2 coarse ones up, 1 of the join.
        return 1 + sum(7 * 2**number for number in range(len(self.scales)))

    def forward(self, grid: Tensor) -> Tensor:
        """grid [batch, inputs, frames, bands] -> [batch, outputs, frames, bands]."""
        hidden = self.into(grid.contiguous(memory_format=torch.channels_last)) + self.place_in
        skipped = []
        for scale in self.scales:
            assert isinstance(scale, Scale)
            skipped.append(hidden)
            hidden = scale.descend(hidden)
        for scale in reversed(self.scales):
            assert isinstance(scale, Scale)
            hidden = scale.ascend(hidden, skipped.pop())
        return self.out(hidden) + self.place_out


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
        """Masks [batch, 4, bins, frames] and STFT [batch, bins, frames], 50 Hz, of wave [batch, n x 1920]."""
        tokenizer = self.tokenizer
        with torch.no_grad():
            mel = tokenizer.normalize(tokenizer.log_mel(wave))
            features = tokenizer.upper(tokenizer.bottleneck(tokenizer.encoder(mel), 0.0))
            assert tokenizer.mask_head is not None
            logits = tokenizer.mask_head(features)
            spectrum = self.stft(wave)
        magnitude = spectrum.abs().transpose(1, 2) * (2 / self.window.sum())
        masks = self.estimator(magnitude, logits)
        return rearrange(masks, "batch frames stems bins -> batch stems bins frames"), spectrum

    def stft(self, wave: Tensor) -> Tensor:
        """Return the STFT [..., bins, samples // 960] of wave [..., samples]."""
        flat, window = wave.flatten(0, -2), self.window
        spectrum = torch.stft(
            flat, FFT_SIZE, STFT_HOP, window=window, pad_mode="constant", return_complex=True
        )
        return spectrum[..., : wave.shape[-1] // STFT_HOP].unflatten(0, wave.shape[:-1])

    @torch.no_grad()
    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """The four stems, each [channels, samples], that sum to wave at 48 kHz; memory is bounded."""
        if wave.ndim != 2 or wave.shape[-1] == 0:
            raise AudioError(f"a mixture must be [channels, samples], got shape {tuple(wave.shape)}")
        samples = wave.shape[-1]
        gain = level_gain(wave[None])
        frames = -(-samples // HOP_SAMPLES)
        stems = new_wave(len(STEMS) * len(wave), samples).unflatten(0, (len(STEMS), len(wave)))
        # Chunks begin where the U-Net's coarsest frames begin, so that its grids are those of one pass.
        for chunk in plan_chunks(frames, CHUNK_FRAMES, self._margin(), grain=self.estimator.unet.period):
            piece = wave[:, chunk.low * HOP_SAMPLES : chunk.high * HOP_SAMPLES].to(self.window.device)
            piece = functional.pad(piece, (0, -piece.shape[-1] % HOP_SAMPLES))
            found = self._separate_piece(piece, gain.to(piece.device))[:, :, chunk.inside(HOP_SAMPLES)]
            place = slice(chunk.start * HOP_SAMPLES, min(samples, chunk.stop * HOP_SAMPLES))
            stems[:, :, place] = found[:, :, : place.stop - place.start].cpu()
            # What rounding and the borders leave over belongs to what has no name.
            stems[STEMS.index("other"), :, place] += wave[:, place] - stems[:, :, place].sum(dim=0)
            let_go(wave)
            let_go(stems)
        return dict(zip(STEMS, stems, strict=True))

    def _separate_piece(self, wave: Tensor, gain: Tensor) -> Tensor:
        masks, _ = self.masks(wave.mean(dim=0, keepdim=True) * gain)
        spectrum = self.stft(wave)  # [channels, bins, frames]
        masked = masks[0, :, None] * spectrum  # [4, channels, bins, frames]
        masked = functional.pad(masked, (0, 1))  # istft wants the frame at the very end
        signals = rearrange(masked, "stems channels bins frames -> (stems channels) bins frames")
        samples = torch.istft(signals, FFT_SIZE, STFT_HOP, window=self.window, length=wave.shape[-1])
        return rearrange(samples, "(stems channels) samples -> stems channels samples", stems=len(STEMS))

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


# Noise this far below the mixture counts as none (30 dB), so that a silent stem has a finite ratio.
FLOOR = 1e-3


class SeparationObjective(nn.Module):
    """Negative thresholded signal-to-noise ratio in dB (Wisdom et al., 2020, eq. 2); the tokenizer is frozen.

    The squared error of complex spectra asks for the mask whose stem has the right level on average; their
    absolute error, whose optimum is a median, turns down whatever is often masked by others, the voice above
    all. A ratio per cut weighs quiet stems like loud ones.
    """

    def __init__(self, separator: MaskSeparator) -> None:
        super().__init__()
        self.separator = separator
        separator.tokenizer.requires_grad_(False)

    def forward(self, stems: Tensor) -> dict[str, Tensor]:
        """stems [batch, 4, samples] that sum to the mixtures -> named losses in dB."""
        wave = stems.sum(dim=1)
        gain = level_gain(wave)
        masks, mixture = self.separator.masks(wave * gain)
        truth = self.separator.stft(stems * gain[:, None])  # [batch, 4, bins, frames]
        noise = power(masks * mixture[:, None] - truth)
        floor = FLOOR * power(mixture)[:, None] + 1e-8
        ratio = 10 * ((noise + floor) / (power(truth) + floor)).log10()  # [batch, 4]
        losses = {stem: ratio[:, index].mean() for index, stem in enumerate(STEMS)}
        return {"total": ratio.mean(), **losses}


def power(spectrum: Tensor) -> Tensor:
    """Return the mean square magnitude of spectra [..., bins, frames] as [...]."""
    return (spectrum.real.square() + spectrum.imag.square()).mean(dim=(-2, -1))
