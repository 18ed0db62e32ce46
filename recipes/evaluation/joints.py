"""Whether the joints of a song made in pieces are heard: spectral flux and level there, against anywhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

FFT_SIZE, HOP_SAMPLES = 2048, 480
_BESIDE_SECONDS = 0.2  # of sound whose level is compared across a joint
_SILENCE = 1e-4  # of a level, -80 dBFS


def spectral_flux(wave: Tensor) -> Tensor:
    """Rise of the magnitudes from frame to frame [frames]: sum of their positive differences, every 10 ms.

    wave: [channels, samples] at 48 kHz; frame i is centred at sample 480 i.
    """
    mono = wave.float().mean(dim=0)
    spectrum = torch.stft(
        mono, FFT_SIZE, HOP_SAMPLES, window=torch.hann_window(FFT_SIZE), return_complex=True
    ).abs()
    rise = (spectrum[:, 1:] - spectrum[:, :-1]).clamp_min(0).sum(dim=0)
    return torch.nn.functional.pad(rise, (1, 0))


def flux_ratios(wave: Tensor, samples: Sequence[int] | None = None) -> Tensor:
    """Flux around each place over the song's median flux [places]; without places: around every frame.

    Around: mean over the frames whose windows hold the place, so that a click counts wherever it falls.
    """
    flux = spectral_flux(wave)
    reach = FFT_SIZE // (2 * HOP_SAMPLES)
    around = torch.nn.functional.avg_pool1d(
        flux[None], 2 * reach + 1, stride=1, padding=reach, count_include_pad=False
    )[0]
    around = around / flux.median().clamp_min(1e-9)
    if samples is None:
        return around
    frames = torch.tensor([round(place / HOP_SAMPLES) for place in samples]).clamp_max(len(flux) - 1)
    return around[frames]


def level_jumps_db(wave: Tensor, samples: Sequence[int]) -> Tensor:
    """Size of the change of level at each place [places]: 0.2 s after it against 0.2 s before, in dB."""
    beside = round(_BESIDE_SECONDS * SAMPLE_RATE_HZ)
    power = wave.float().square().mean(dim=0)

    def level(start: int, stop: int) -> Tensor:
        return power[max(0, start) : stop].mean().sqrt().clamp_min(_SILENCE)

    ratios = [level(place, place + beside) / level(place - beside, place) for place in samples]
    return 20 * torch.stack(ratios).log10().abs()
