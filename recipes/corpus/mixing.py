"""Turns dry stems into a mix: equalizer, compression, rooms, levels; stems that sum to the mix exactly."""

from dataclasses import dataclass

import numpy as np

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

FULL_SCALE = 32_767
HEADROOM = 0.97  # highest peak of the mix
LEVEL_FRAME = 2_400  # samples; 50 ms
COMPRESSOR_FRAME = 480  # samples; 10 ms
EQUALIZER_TAPS = 2_048
BALANCE_DB = {"drums": (-2.0, 2.5), "bass": (-1.0, 2.0), "other": (0.0, 2.0)}  # mean, spread


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Finished stems as int16 [samples, channels]; mix = vocal + drums + bass + other."""

    stems: dict[str, np.ndarray]
    mix: np.ndarray


def mix_stems(vocal: np.ndarray, band: dict[str, np.ndarray], rng: np.random.Generator) -> Mix:
    """Mix a dry vocal [samples] with dry band stems [2, samples], all float32 at 48 kHz."""
    room_seconds = rng.uniform(0.25, 1.8)
    wet_db = {"vocal": rng.uniform(-28, -12), "drums": rng.uniform(-30, -15), "other": rng.uniform(-26, -12)}
    voice = compress(normalize(vocal[None], 0.1), rng.uniform(1.5, 4.0))
    voice = color(voice, room_seconds, wet_db["vocal"], rng, low_cut_hz=rng.uniform(60, 130))
    voice_level = 10 ** (rng.uniform(-20, -16) / 20)
    voice = normalize(voice, voice_level)
    parts = {}
    for name in ("drums", "bass", "other"):
        mean, spread = BALANCE_DB[name]
        wave = normalize(band[name], 0.1)
        if name == "bass":
            wave = wave.mean(axis=0, keepdims=True)  # bass stays in the middle, and is stored as mono
        wave = compress(wave, rng.uniform(1.0, 3.0)) if name != "other" else wave
        wave = color(wave, room_seconds, wet_db.get(name), rng, low_cut_hz=rng.uniform(20, 40))
        parts[name] = normalize(wave, 10 ** (rng.normal(mean, spread) / 20))
    together = parts["drums"] + parts["bass"] + parts["other"]
    accompaniment_level = voice_level * 10 ** (rng.uniform(-4, 6) / 20)
    gain = accompaniment_level / max(active_level(together), 1e-6)
    parts = {name: wave * np.float32(gain) for name, wave in parts.items()}
    if rng.random() < 0.15:  # what the singer's microphone or a separator lets through
        voice = voice + together.mean(axis=0, keepdims=True) * np.float32(
            gain * 10 ** (rng.uniform(-40, -28) / 20)
        )
    if rng.random() < 0.6:  # microphone noise
        noise = rng.standard_normal(voice.shape, dtype=np.float32)
        voice = voice + noise * np.float32(voice_level * 10 ** (rng.uniform(-65, -45) / 20))
    return finish({"vocal": voice, **parts})


def finish(stems: dict[str, np.ndarray]) -> Mix:
    """Scale the stems so that nothing clips, round them to int16 and add them up."""
    total = np.sum([np.broadcast_to(wave, (2, wave.shape[-1])) for wave in stems.values()], axis=0)
    peak = max([float(np.abs(total).max()), *(float(np.abs(wave).max()) for wave in stems.values())])
    scale = FULL_SCALE * min(1.0, HEADROOM / max(peak, 1e-9))
    whole = {name: np.rint(wave * np.float32(scale)).astype(np.int16) for name, wave in stems.items()}
    mix = np.zeros(total.shape, dtype=np.int32)
    for wave in whole.values():
        mix += wave
    assert np.abs(mix).max() <= FULL_SCALE, "the headroom covers the rounding"
    return Mix(stems={name: wave.T for name, wave in whole.items()}, mix=mix.astype(np.int16).T)


def frame_levels(wave: np.ndarray, frame: int) -> np.ndarray:
    """RMS of consecutive frames over all channels of wave [channels, samples]; at least one frame."""
    count = max(1, wave.shape[-1] // frame)
    frame = min(frame, wave.shape[-1])
    frames = wave[:, : count * frame].reshape(len(wave), count, frame)
    return np.sqrt(np.einsum("cnf,cnf->n", frames, frames) / (len(wave) * frame))


def active_level(wave: np.ndarray) -> float:
    """RMS of the frames that are not much quieter than the loud ones."""
    levels = frame_levels(wave, LEVEL_FRAME)
    loud = float(np.quantile(levels, 0.95))
    active = levels[levels > 0.1 * loud]
    return float(np.sqrt(np.square(active).mean())) if loud > 1e-6 else 0.0


def normalize(wave: np.ndarray, level: float) -> np.ndarray:
    """The wave at the given active RMS; silence stays silence."""
    now = active_level(wave)
    return wave * np.float32(level / now) if now > 1e-6 else wave


def compress(wave: np.ndarray, ratio: float) -> np.ndarray:
    """Gentle compression above the active level, with 20 ms attack and 120 ms release."""
    if ratio <= 1.05:
        return wave
    levels = frame_levels(wave, COMPRESSOR_FRAME)
    threshold = max(active_level(wave), 1e-6)
    over = np.maximum(20 * np.log10(np.maximum(levels, 1e-6) / threshold), 0.0)
    smooth, state = np.empty_like(over), 0.0
    for index, value in enumerate(over):
        state += (value - state) * (0.5 if value > state else 0.08)
        smooth[index] = state
    gain = 10 ** (-smooth * (1 - 1 / ratio) / 20)
    # Straight lines between the frames, all frames at once.
    ramp = np.arange(COMPRESSOR_FRAME, dtype=np.float32) / COMPRESSOR_FRAME
    gain = np.append(gain, gain[-1]).astype(np.float32)
    lines = (gain[:-1, None] + np.diff(gain)[:, None] * ramp).ravel()
    curve = np.full(wave.shape[-1], gain[-1], dtype=np.float32)
    curve[: min(len(lines), len(curve))] = lines[: len(curve)]
    return wave * curve


def color(
    wave: np.ndarray,
    room_seconds: float,
    wet_db: float | None,
    rng: np.random.Generator,
    *,
    low_cut_hz: float,
) -> np.ndarray:
    """Equalizer (low cut, tilt, one broad bell) and room, in one pass over the spectrum."""
    from scipy.fft import next_fast_len
    from scipy.signal import oaconvolve

    tail = int(room_seconds * SAMPLE_RATE_HZ) if wet_db is not None else 0
    size = int(next_fast_len(tail + 2 * EQUALIZER_TAPS, real=True) or 0)
    frequency = np.fft.rfftfreq(size, 1 / SAMPLE_RATE_HZ).astype(np.float32)
    octaves = np.log2(np.maximum(frequency, 20.0) / 1_000).astype(np.float32)
    tilt_db, bell_db, bell = rng.uniform(-1.0, 1.0), rng.normal(0, 2.0), rng.uniform(-2.5, 3.0)
    curve_db = tilt_db * np.clip(octaves, -4, 4) + bell_db * np.exp(-0.5 * np.square(octaves - bell))
    curve = np.exp(curve_db * np.float32(np.log(10) / 20))
    # The magnitude of a second-order high-pass, with zero phase.
    ratio = np.square(np.square(frequency / np.float32(low_cut_hz)))
    curve *= np.sqrt(ratio / (1 + ratio))
    result = np.empty_like(wave)
    for channel in range(len(wave)):
        spectrum = curve.astype(np.complex64)
        if wet_db is not None:
            spectrum *= 1 + np.fft.rfft(make_room(room_seconds, wet_db, rng), size)
        # The equalizer reaches EQUALIZER_TAPS into the past: the filter is delayed and the sound moved back.
        taps = np.roll(np.fft.irfft(spectrum, size), EQUALIZER_TAPS)[: tail + 2 * EQUALIZER_TAPS]
        filtered = oaconvolve(wave[channel], taps.astype(np.float32))
        result[channel] = filtered[EQUALIZER_TAPS : EQUALIZER_TAPS + wave.shape[-1]]
    return result


def make_room(seconds: float, wet_db: float, rng: np.random.Generator) -> np.ndarray:
    """Reverberation without the direct sound: noise that decays by 60 dB in `seconds`, darker later on."""
    length = int(seconds * SAMPLE_RATE_HZ)
    delay = int(rng.uniform(0.004, 0.03) * SAMPLE_RATE_HZ)
    noise = rng.standard_normal(length, dtype=np.float32)
    time = np.arange(length, dtype=np.float32) / length
    # The dull part (a running mean of the noise) fades slower than the bright part.
    dull = np.convolve(noise, np.full(12, 1 / np.sqrt(12), dtype=np.float32), "same")
    tail = noise * np.exp(-11.0 * time) * 0.5 + dull * np.exp(-6.9 * time)
    tail[:delay] = 0.0
    tail *= 10 ** (wet_db / 20) / np.sqrt(np.square(tail).sum())
    return tail.astype(np.float32)
