"""Loudness (ITU-R BS.1770-4).

Measured in blocks of a few seconds, so an hour needs no more working memory than a minute.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .audio import SAMPLE_RATE_HZ
from .long_waves import let_go

# K-weighting at 48 kHz: BS.1770-4, tables 1 and 2 (high shelf, then high pass).
_SHELF = ([1.53512485958697, -2.69169618940638, 1.19839281085285], [1.0, -1.69065929318241, 0.73248077421585])
_HIGH_PASS = ([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621])
K_WEIGHTING = (_SHELF, _HIGH_PASS)  # (numerator, denominator) of each biquad
_STEP_SAMPLES = SAMPLE_RATE_HZ // 10  # gating blocks of 400 ms start every 100 ms
_PIECE_SAMPLES = 10 * _STEP_SAMPLES
_CHUNK_SAMPLES = 10 * _PIECE_SAMPLES
_LEAD_SAMPLES = 2 * _STEP_SAMPLES  # after which K-weighting has forgotten what was before: below 1e-20
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_DB = 10.0


def measure_loudness(wave: Tensor) -> float:
    """Integrated loudness in LUFS of wave [channels, samples] at 48 kHz (BS.1770-4; -inf for silence).

    Shorter than one gating block of 0.4 s, or nothing above the gates: ungated K-weighted level.
    """
    steps = _k_weighted_steps(wave)
    if len(steps) < 4:
        total = float(steps.sum())
        return _to_lufs(total / max(wave.shape[-1], 1))
    cumulative = np.concatenate([[0.0], np.cumsum(steps)])
    whole = wave.shape[-1] // _STEP_SAMPLES  # the incomplete last step is in no block
    blocks = (cumulative[4 : whole + 1] - cumulative[: whole - 3]) / (4 * _STEP_SAMPLES)
    gated = blocks[blocks > _to_power(_ABSOLUTE_GATE_LUFS)]
    if gated.size == 0:
        return _to_lufs(float(cumulative[-1]) / wave.shape[-1])
    gated = gated[gated > gated.mean() * 10 ** (-_RELATIVE_GATE_DB / 10)]
    return _to_lufs(float(gated.mean()))


def _k_weighted_steps(wave: Tensor) -> np.ndarray:
    """Energy of the K-weighted wave, summed over channels, per 100 ms step [steps]; the last may be short."""
    lead, piece, energies = _LEAD_SAMPLES, _PIECE_SAMPLES, []
    response = _k_response(lead + piece)
    for start in range(0, wave.shape[-1], _CHUNK_SAMPLES):
        chunk = wave[:, max(0, start - lead) : start + _CHUNK_SAMPLES].double().cpu()
        let_go(wave)
        chunk = functional.pad(chunk, (lead if start == 0 else 0, 0))
        samples = chunk.shape[-1] - lead
        pieces = functional.pad(chunk, (0, -samples % piece)).unfold(-1, lead + piece, piece)
        # A cyclic product: what it carries from the end to the beginning dies away within the lead.
        weighted = torch.fft.irfft(torch.fft.rfft(pieces) * response, lead + piece)[..., lead:]
        power = weighted.square().sum(dim=0).flatten()[:samples].numpy()
        energies.append(np.add.reduceat(power, np.arange(0, samples, _STEP_SAMPLES)))
    return np.concatenate(energies) if energies else np.zeros(0)


def _k_response(size: int) -> Tensor:
    """What K-weighting does to each frequency of a spectrum of so many samples."""
    stages = [
        [torch.fft.rfft(torch.tensor(p, dtype=torch.float64), size) for p in stage] for stage in K_WEIGHTING
    ]
    (shelf, below_shelf), (high_pass, below_high_pass) = stages
    return shelf * high_pass / (below_shelf * below_high_pass)


def _to_lufs(power: float) -> float:
    return -0.691 + 10 * math.log10(power) if power > 1e-20 else -math.inf


def _to_power(lufs: float) -> float:
    return 10 ** ((lufs + 0.691) / 10)
