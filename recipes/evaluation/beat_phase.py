"""Whether the beat goes on in time past a point of a song: the phase of onsets before and after it."""

import numpy as np
from torch import Tensor

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.sampling import next_window_start
from duotok.tokenizer.music.tempo import ENVELOPE_RATE_HZ

SPAN_SECONDS = 6.0  # of music on each side of a point, of which the phase is taken
LOST_BEATS = 0.25  # mean error of a phase that is drawn by chance


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
