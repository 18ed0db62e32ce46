"""Fast source-filter synthesis from WORLD parameters: pulses and noise through minimum-phase envelopes.

It computes what WORLD's own synthesizer does (Morise et al. 2016, section 3), frame by frame instead of pulse
by pulse, in single precision and at 48 kHz: several times faster, and silence costs nothing.
"""

import numpy as np

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

FFT_SIZE = 2048
HOP_SAMPLES = 240  # 5 ms
WINDOW_SAMPLES = 2 * HOP_SAMPLES
BINS = FFT_SIZE // 2 + 1
BATCH_FRAMES = 256
PULSE_TAPS = 16


def make_pulses(pitch_hz: np.ndarray, voiced: np.ndarray, samples: int) -> np.ndarray:
    """Band-limited pulse train of unit power [samples]; pitch and voicing are per 5 ms frame."""
    times = np.arange(samples) / HOP_SAMPLES
    frequency = np.interp(times, np.arange(len(pitch_hz)), pitch_hz)
    phase = np.cumsum(frequency / SAMPLE_RATE_HZ)
    turns = np.floor(phase)
    at = np.flatnonzero(np.diff(turns) > 0)  # the pulse falls between at and at + 1
    fraction = (turns[at + 1] - phase[at]) / (phase[at + 1] - phase[at])
    sounding = voiced[np.minimum((at / HOP_SAMPLES + 0.5).astype(int), len(voiced) - 1)]
    at, fraction = at[sounding], fraction[sounding]
    heights = np.sqrt(SAMPLE_RATE_HZ / frequency[at])
    taps = np.arange(PULSE_TAPS) - PULSE_TAPS // 2 + 1
    offset = taps[None] - fraction[:, None]
    shapes = np.sinc(offset) * np.square(np.cos(np.pi * offset / (PULSE_TAPS + 2))) * heights[:, None]
    places = at[:, None] + taps[None]
    inside = (places >= 0) & (places < samples)
    train = np.bincount(places[inside], weights=shapes[inside], minlength=samples)
    # A train of pulses has a mean value; no voice has.
    train -= np.sqrt(frequency / SAMPLE_RATE_HZ) * np.repeat(voiced, HOP_SAMPLES)[:samples]
    return train.astype(np.float32)


def synthesize(
    log_power: np.ndarray,
    aperiodicity: np.ndarray,
    pitch_hz: np.ndarray,
    voiced: np.ndarray,
    active: np.ndarray,
    expand_power: np.ndarray,
    expand_aperiodicity: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sound at 48 kHz [frames * 240] of envelopes given every 5 ms.

    log_power: [frames, bands] natural log; aperiodicity: [frames, noise_bands], 0..1; the two matrices
    (bands -> BINS) spread them over the FFT bins. pitch_hz, voiced: [frames]. Only frames where `active`
    is set sound.
    """
    frames = len(log_power)
    samples = frames * HOP_SAMPLES
    margin = WINDOW_SAMPLES
    pulses = np.zeros(samples + 2 * margin, dtype=np.float32)
    pulses[margin : margin + samples] = make_pulses(pitch_hz, voiced, samples)
    noise = rng.standard_normal(len(pulses), dtype=np.float32)
    window = np.hanning(WINDOW_SAMPLES + 1)[:-1].astype(np.float32)
    output = np.zeros(samples + FFT_SIZE + 2 * margin, dtype=np.float32)
    # Cepstrum of a minimum-phase filter: the part of negative time folded onto the positive one.
    fold = np.zeros(FFT_SIZE, dtype=np.float32)
    fold[0] = fold[FFT_SIZE // 2] = 0.5
    fold[1 : FFT_SIZE // 2] = 1.0
    span = np.arange(WINDOW_SAMPLES)
    chosen = np.flatnonzero(active)
    for first in range(0, len(chosen), BATCH_FRAMES):
        batch = chosen[first : first + BATCH_FRAMES]
        starts = margin + batch * HOP_SAMPLES - HOP_SAMPLES  # the window is centered on the frame
        pieces = starts[:, None] + span[None]
        periodic = np.fft.rfft(pulses[pieces] * window, FFT_SIZE)
        random = np.fft.rfft(noise[pieces] * window, FFT_SIZE)
        share = np.clip(aperiodicity[batch].astype(np.float32) @ expand_aperiodicity, 0.001, 1.0)
        log_spectrum = log_power[batch].astype(np.float32) @ expand_power
        cepstrum = np.fft.irfft(log_spectrum, FFT_SIZE)
        transfer = np.exp(np.fft.rfft(cepstrum * fold, FFT_SIZE))  # exp(log power / 2) and its phase
        transfer *= np.sqrt(1 - np.square(share)) * periodic + share * random
        sound = np.fft.irfft(transfer, FFT_SIZE)
        for start, piece in zip(starts, sound, strict=True):
            output[start : start + FFT_SIZE] += piece
    return output[margin : margin + samples]
