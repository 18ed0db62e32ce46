"""Phase for magnitudes alone: a phase-vocoder start, then a few fast Griffin-Lim iterations."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from .spectrum import Stft, with_magnitudes


def advance_phases(magnitudes: Tensor, stft: Stft, first_phase: Tensor | None = None) -> Tensor:
    """Return phases [batch, bins, frames] in radians that let each spectral peak run on at its frequency.

    Single pass spectrogram inversion (Beauregard, Harish and Wyse, 2015):
    the frequency of a peak comes from a parabola through three log magnitudes, the bins around it share its
    phase. magnitudes [batch, bins, frames]; first_phase [batch, bins] is that of the first frame (default 0).
    """
    level = magnitudes.transpose(1, 2).clamp_min(1e-5).log()  # [batch, frames, bins]
    below, here, above = level[..., :-2], level[..., 1:-1], level[..., 2:]
    bins = torch.arange(1, level.shape[-1] - 1, device=level.device)
    offset = 0.5 * (below - above) / (below - 2 * here + above).clamp_max(-1e-6)
    frequency = (bins + offset.clamp(-0.5, 0.5)) * (2 * math.pi / stft.fft_size)  # radians per sample
    peaks = _nearest_peaks((here > below) & (here >= above), bins)
    frequency = frequency.gather(-1, peaks)
    # Phases refer to the middle of the window, where all bins of a peak agree.
    centring = math.pi * torch.arange(level.shape[-1], device=level.device)
    phase = torch.zeros_like(level[:, 0]) if first_phase is None else first_phase + centring
    phase = phase[:, 1:-1]
    phases = [phase]
    for frame in range(1, level.shape[1]):
        step = stft.hop_samples * 0.5 * (frequency[:, frame - 1] + frequency[:, frame])
        phase = torch.remainder(phase.gather(-1, peaks[:, frame]) + step, 2 * math.pi)
        phases.append(phase)
    return (functional.pad(torch.stack(phases, dim=1), (1, 1)) - centring).transpose(1, 2)


def griffin_lim(
    magnitudes: Tensor, stft: Stft, *, iterations: int, momentum: float = 0.99, held: Tensor | None = None
) -> Tensor:
    """Return waves [batch, frames * hop] with about these magnitudes [batch, bins, frames]; deterministic.

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard, 2013) from the phases of advance_phases.
    held: complex spectrum [batch, bins, k] of the first k frames, known from sound that is already there; it
    stays as it is.
    """
    known = 0 if held is None else held.shape[-1]
    if held is None:
        phases = advance_phases(magnitudes, stft)
    else:
        later = advance_phases(magnitudes[..., known - 1 :], stft, held[..., -1].angle())
        phases = functional.pad(later, (known - 1, 0))

    def impose(direction: Tensor) -> Tensor:
        target = with_magnitudes(direction, magnitudes)
        if held is not None:
            target[..., :known] = held
        return target

    target = impose(torch.polar(torch.ones_like(phases), phases))
    previous: Tensor | None = None
    for _ in range(iterations):
        spectrum = stft(stft.inverse(target))
        ahead = spectrum if previous is None else spectrum - previous * (momentum / (1 + momentum))
        previous = spectrum
        target = impose(ahead)
    return stft.inverse(target)


def _nearest_peaks(is_peak: Tensor, bins: Tensor) -> Tensor:
    """Return for each inner bin the index (among the inner bins) of the nearest peak."""
    index = (bins - 1).expand_as(is_peak)
    far = 4 * len(bins)
    before = torch.where(is_peak, index, -far).cummax(dim=-1).values
    after = -torch.where(is_peak, -index, -far).flip(-1).cummax(dim=-1).values.flip(-1)
    return torch.where(index - before <= after - index, before, after).clamp(0, len(bins) - 1)
