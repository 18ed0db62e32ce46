"""Tempo and beats from a wave: onset envelope, autocorrelation, dynamic programming."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..common.audio import SAMPLE_RATE_HZ
from ..common.long_waves import blocks, let_go

ENVELOPE_RATE_HZ = 100.0
_HOP_SAMPLES = 480
_WINDOW_SAMPLES = 2048
_CHUNK_FRAMES = 2_000
_BANDS = 32
_FLOOR = 1e-3  # what a band must exceed to count, where the whole wave has an RMS of 0.1
_TEMPO_RANGE_BPM = (50.0, 220.0)
_TEMPO_CENTRE_BPM = 110.0
_TIGHTNESS = 100.0  # how strongly beats keep the tempo (D. Ellis, Beat Tracking by Dynamic Programming, 2007)


def onset_envelope(wave: Tensor) -> np.ndarray:
    """Spectral flux in log-spaced bands, at 100 Hz, unit variance: [frames] for wave [channels, samples]."""
    samples = wave.shape[-1]
    energy = sum(float(part.float().mean(dim=0).double().square().sum()) for _, (part,) in blocks(wave))
    gain = 0.1 / max(math.sqrt(energy / max(samples, 1)), 1e-6)
    window = torch.hann_window(_WINDOW_SAMPLES) * (2 / _WINDOW_SAMPLES)
    pooling = _band_pooling()
    frames = -(-samples // _HOP_SAMPLES)
    flux = np.zeros(frames)
    before: Tensor | None = None
    for start in range(0, frames, _CHUNK_FRAMES):
        count = min(_CHUNK_FRAMES, frames - start)
        begin = start * _HOP_SAMPLES - _WINDOW_SAMPLES // 2
        end = begin + (count - 1) * _HOP_SAMPLES + _WINDOW_SAMPLES
        piece = wave[:, max(0, begin) : end].float().mean(dim=0).cpu() * gain
        let_go(wave)
        piece = torch.nn.functional.pad(piece, (max(0, -begin), max(0, end - samples)))
        spectrum = torch.stft(
            piece, _WINDOW_SAMPLES, _HOP_SAMPLES, window=window, center=False, return_complex=True
        ).abs()  # [bins, count]
        bands = torch.log10(pooling @ spectrum + _FLOOR)  # [bands, count]
        previous = torch.cat([bands[:, :1] if before is None else before, bands[:, :-1]], dim=1)
        flux[start : start + count] = (bands - previous).clamp(min=0).sum(dim=0).numpy()
        before = bands[:, -1:]
    local = (
        np.convolve(flux, np.ones(100) / 100, mode="same")[: len(flux)] if len(flux) >= 100 else flux.mean()
    )
    flux = np.maximum(flux - local, 0.0)
    return flux / (flux.std() + 1e-9)


def estimate_tempo(envelope: np.ndarray) -> float | None:
    """Tempo in beats per minute by autocorrelation with a log-normal prior; None without any onsets.

    envelope: [frames] at ENVELOPE_RATE_HZ; at least two seconds are needed.
    """
    slowest = int(60 * ENVELOPE_RATE_HZ / _TEMPO_RANGE_BPM[0])
    fastest = int(60 * ENVELOPE_RATE_HZ / _TEMPO_RANGE_BPM[1])
    if len(envelope) < 2 * ENVELOPE_RATE_HZ or envelope.max() < 1e-6:
        return None
    # Onsets are a frame or two wide, periods are not whole numbers of frames: blur before comparing.
    blur = np.exp(-0.5 * (np.arange(-6, 7) / 2.0) ** 2)
    centred = np.convolve(envelope - envelope.mean(), blur / blur.sum(), mode="same")
    size = 1 << (2 * len(centred) - 1).bit_length()
    correlation = np.fft.irfft(np.abs(np.fft.rfft(centred, size)) ** 2, size)[: 4 * slowest + 2]
    # A beat also repeats at its double and is halved by eighth notes; one and a half beats do neither.
    limit = min(slowest, len(envelope) // 2)
    lags = np.arange(fastest, limit + 1)
    reach = len(correlation) - 1
    support = correlation[lags] + 0.5 * correlation[np.minimum(2 * lags, reach)]
    support = support + 0.25 * correlation[np.minimum(4 * lags, reach)] + 0.5 * correlation[lags // 2]
    prior = np.exp(-0.5 * (np.log2(60 * ENVELOPE_RATE_HZ / lags / _TEMPO_CENTRE_BPM) / 0.8) ** 2)
    scores = np.maximum(support, 0) * prior
    best = int(scores.argmax())
    lag = float(lags[best])
    if 0 < best < len(lags) - 1:
        # Four periods place the peak four times as finely as one.
        centre = 4 * int(lags[best])
        if centre + 4 < min(reach, len(envelope)):
            near = correlation[centre - 3 : centre + 4]
            peak = centre - 3 + int(near.argmax())
            left, mid, right = correlation[peak - 1 : peak + 2]
            bend = left - 2 * mid + right
            lag = (peak + (0.5 * (left - right) / bend if bend < 0 else 0.0)) / 4
    return 60 * ENVELOPE_RATE_HZ / lag


def track_beats(envelope: np.ndarray, tempo_bpm: float) -> np.ndarray:
    """Beat times in seconds [beats] that keep tempo_bpm and fall on onsets (Ellis 2007).

    envelope: [frames] at ENVELOPE_RATE_HZ.
    """
    period = 60 * ENVELOPE_RATE_HZ / tempo_bpm
    spread = np.arange(-round(period), round(period) + 1)
    kernel = np.exp(-0.5 * (spread * 32 / period) ** 2)
    local = np.convolve(envelope, kernel, mode="full")[round(period) : round(period) + len(envelope)]
    lookback = np.arange(-round(2 * period), -round(period / 2) + 1)
    cost = -_TIGHTNESS * np.log(-lookback / period) ** 2
    total = local.copy()
    link = np.full(len(local), -1)
    threshold = 0.01 * local.max()
    started = False
    for frame in range(len(local)):
        earlier = frame + lookback
        usable = earlier >= 0
        if usable.any():
            scores = cost[usable] + total[earlier[usable]]
            best = int(scores.argmax())
            if started or scores[best] > 0:
                total[frame] = local[frame] + scores[best]
                link[frame] = earlier[usable][best]
        if not started and local[frame] < threshold:
            link[frame] = -1
        else:
            started = True
    tail = total[-max(1, round(period)) :]
    beat = len(total) - len(tail) + int(tail.argmax())
    beats = []
    while beat >= 0:
        beats.append(beat)
        beat = int(link[beat])
    return np.array(beats[::-1]) / ENVELOPE_RATE_HZ


def _band_pooling() -> Tensor:
    """Rectangular log-spaced bands from 30 Hz to 12 kHz: [bands, bins]."""
    edges = np.geomspace(30.0, 12_000.0, _BANDS + 1)
    frequencies = np.fft.rfftfreq(_WINDOW_SAMPLES, 1 / SAMPLE_RATE_HZ)
    rows = [
        (frequencies >= low) & (frequencies < high) for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    used = np.array([row for row in rows if row.any()], dtype=np.float32)
    return torch.from_numpy(used / used.sum(axis=1, keepdims=True))
