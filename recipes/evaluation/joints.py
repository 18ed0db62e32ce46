"""Whether the joints of a song made in pieces are heard: spectral flux, level, and the beat's phase there."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.sampling import next_window_start
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.music.tempo import ENVELOPE_RATE_HZ

FFT_SIZE, HOP_SAMPLES = 2048, 480
_BESIDE_SECONDS = 0.2  # of sound whose level is compared across a joint
_SILENCE = 1e-4  # of a level, -80 dBFS
SPAN_SECONDS = 6.0  # of music on each side of a point, of which the phase is taken
LOST_BEATS = 0.25  # mean error of a phase that is drawn by chance


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


def find_joints(frames: int, config: SamplingConfig) -> list[int]:
    """Frames of a song at which `DualTrackLM.compose` begins to sample another window."""
    joints: list[int] = []
    done = 0
    while done < frames:
        if done:
            joints.append(done)
        done = min(frames, next_window_start(done, frames, config) + config.window_frames)
    return joints


def find_middles(frames: int, joints: list[int]) -> list[int]:
    """Frames in the middle of what each window has sampled."""
    edges = [0, *joints, frames]
    return [(low + high) // 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]


def phase_errors(envelope: np.ndarray, beats_seconds: np.ndarray, points_seconds: list[float]) -> list[float]:
    """How far the phase of the onsets moves at each point, in beats: 0 = in time, 0.5 = half a beat off.

    envelope: onsets [frames] at ENVELOPE_RATE_HZ; beats_seconds: the song's beats [beats]. Points with less
    than SPAN_SECONDS on a side, or without onsets there, are left out.
    """
    times = np.arange(len(envelope)) / ENVELOPE_RATE_HZ
    places = np.interp(times, beats_seconds, np.arange(len(beats_seconds)))
    # Before the first and after the last beat there is no phase to compare with.
    known = (times >= beats_seconds[0]) & (times <= beats_seconds[-1])
    turning = np.where(known, envelope, 0.0) * np.exp(2j * np.pi * places)
    span = round(SPAN_SECONDS * ENVELOPE_RATE_HZ)
    errors: list[float] = []
    for point in points_seconds:
        middle = round(point * ENVELOPE_RATE_HZ)
        if middle < span or middle + span > len(envelope):
            continue
        before, after = turning[middle - span : middle].sum(), turning[middle : middle + span].sum()
        if abs(before) > 0 and abs(after) > 0:
            errors.append(float(abs(np.angle(after * before.conjugate())) / (2 * np.pi)))
    return errors


def mel_flux(mel: Tensor) -> np.ndarray:
    """Onsets [frames] of log10-mel [frames, bands] at 100 Hz: how much louder the bands become."""
    rises = mel.detach().cpu().double().diff(dim=0).clamp(min=0).sum(dim=1).numpy()
    return np.concatenate([[0.0], rises])
