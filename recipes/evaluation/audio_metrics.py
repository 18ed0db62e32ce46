"""How near a rebuilt sound is to the original, and facts about one sound. Needs librosa.

A mel distance alone lies: a sound can reach 0.22 and have lost every pitch. Judge by chroma correlation and
fine structure first. PESQ and STOI each need a package of their own, which may be missing.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from itertools import pairwise

import librosa
import numpy as np
import soxr
import torch
from scipy.signal import find_peaks
from torch import Tensor
from torch.nn import functional

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.sampling import next_window_start
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.music.tempo import ENVELOPE_RATE_HZ, onset_envelope

_FINE_FFT = 8192
_FINE_BANDS_HZ = ((50, 300), (300, 1000), (1000, 3000))
_FINE_NAMES = tuple(f"fine_structure_{low}_{high}_hz" for low, high in _FINE_BANDS_HZ)
_MEL_SCALES = ((2048, 150), (512, 80))  # window in samples and bands
_BLOCK_SAMPLES = SAMPLE_RATE_HZ // 20
_FAR_BELOW_DB = 120.0  # what the difference to silence is set to
_NARROWEST_DB = -40.0  # of side over mid, below which nobody hears a side
_RATE_HZ = 16_000
_SHORTEST_SECONDS = 0.5  # that STOI, which judges stretches of 0.4 s, can be asked about


def compare_spectra(reference: Tensor, found: Tensor) -> dict[str, float]:
    """Chroma correlation, log10-mel L1 and fine structure by band, both waves [channels, samples]."""
    return {
        "chroma_correlation": chroma_correlation(reference, found),
        "log10_mel_l1": log10_mel_l1(reference, found),
        **dict(zip(_FINE_NAMES, fine_structure(reference, found), strict=True)),
    }


def chroma_correlation(reference: Tensor, found: Tensor) -> float:
    """Mean correlation of the mean-free 12-bin chroma of frames every 0.1 s; 1 is perfect.

    Both waves [channels, samples] at 48 kHz; channels are averaged.
    """
    chromas = [
        librosa.feature.chroma_stft(y=wave, sr=SAMPLE_RATE_HZ, n_fft=_FINE_FFT, hop_length=4800)
        for wave in _to_mono(reference, found)
    ]
    return float(_correlations(*chromas, floor=1e-6).mean())


def fine_structure(reference: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Mean correlation per frame of mean-free log10 magnitudes in 50-300, 300-1000 and 1000-3000 Hz."""
    spectra = [
        np.log10(np.abs(librosa.stft(wave, n_fft=_FINE_FFT)) + 1e-3) for wave in _to_mono(reference, found)
    ]
    frequencies = librosa.fft_frequencies(sr=SAMPLE_RATE_HZ, n_fft=_FINE_FFT)
    values = []
    for low, high in _FINE_BANDS_HZ:
        band = (frequencies >= low) & (frequencies < high)
        values.append(float(_correlations(spectra[0][band], spectra[1][band], floor=1e-9).mean()))
    return values[0], values[1], values[2]


def log10_mel_l1(reference: Tensor, found: Tensor) -> float:
    """Mean absolute difference of log10 mel magnitudes (128 bands, 2048-point, hop 512); 0 is perfect."""
    filters = librosa.filters.mel(sr=SAMPLE_RATE_HZ, n_fft=2048, n_mels=128)
    levels = [
        np.log10(np.maximum(filters @ np.abs(librosa.stft(wave, n_fft=2048, hop_length=512)), 1e-5))
        for wave in _to_mono(reference, found)
    ]
    return float(np.abs(levels[0] - levels[1]).mean())


def mel_distance(reference: Tensor, found: Tensor) -> float:
    """Mel distance of codec papers, by the definition of descript-audio-codec's evaluation; 0 is perfect.

    The sum over two mel spectrograms (window 2048 with 150 bands, 512 with 80; a quarter window apart) of
    the mean difference of log10 of the squared magnitude (no less than 1e-5 before squaring) and of the
    magnitude itself. P does not define its mel distance, but this one agrees with its numbers: it is about
    four times a log10-mel L1, as are those of P table 1 (0.95) beside those of its ablation (0.24).
    """
    total = 0.0
    waves = _to_mono(reference, found)
    for window, bands in _MEL_SCALES:
        filters = librosa.filters.mel(sr=SAMPLE_RATE_HZ, n_fft=window, n_mels=bands)
        first, second = (
            filters @ np.abs(librosa.stft(wave, n_fft=window, hop_length=window // 4, pad_mode="reflect"))
            for wave in waves
        )
        levels = [2 * np.log10(np.maximum(mel, 1e-5)) for mel in (first, second)]
        total += np.abs(levels[0] - levels[1]).mean() + np.abs(first - second).mean()
    return float(total)


def _to_mono(*waves: Tensor) -> list[np.ndarray]:
    shapes = [tuple(wave.shape) for wave in waves]
    if len(set(shape[-1] for shape in shapes)) != 1:
        raise ValueError(f"both waves must be equally long, got {shapes}")
    return [wave.detach().float().mean(dim=0).cpu().numpy() for wave in waves]


def _correlations(first: np.ndarray, second: np.ndarray, *, floor: float) -> np.ndarray:
    """Correlation of the columns."""
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    norms = np.linalg.norm(first, axis=0) * np.linalg.norm(second, axis=0)
    return (first * second).sum(axis=0) / (norms + floor)


def measure_peak(wave: Tensor) -> float:
    """Largest sample magnitude; 1.0 is full scale. wave: [channels, samples]."""
    return float(wave.abs().max()) if wave.numel() else 0.0


def longest_silence_seconds(wave: Tensor, *, threshold_db: float = -60.0) -> float:
    """Length of the longest stretch whose level stays below threshold_db (dBFS RMS in blocks of 50 ms).

    wave: [channels, samples] at 48 kHz.
    """
    power = wave.float().square().mean(dim=0)
    padded = functional.pad(power, (0, -len(power) % _BLOCK_SAMPLES))
    blocks = padded.unflatten(0, (-1, _BLOCK_SAMPLES)).mean(dim=1)
    longest = current = 0
    for silent in (blocks < 10 ** (threshold_db / 10)).tolist():
        current = current + 1 if silent else 0
        longest = max(longest, current)
    return longest * _BLOCK_SAMPLES / SAMPLE_RATE_HZ


def loudness_difference_lu(wave: Tensor, reference: Tensor) -> float:
    """How much louder wave is than the reference, in LU (BS.1770); -120 or 120 where one is silent."""
    level, base = measure_loudness(wave), measure_loudness(reference)
    if math.isinf(level) and math.isinf(base):
        return 0.0
    return max(-_FAR_BELOW_DB, min(_FAR_BELOW_DB, level - base))


def stereo_width_db(wave: Tensor) -> float:
    """Energy of the side over that of the mid channel in dB, from -40 (mono, or silent) to 40.

    wave: [2, samples].
    """
    left, right = wave.double()
    mid, side = float((left + right).square().sum()), float((left - right).square().sum())
    if max(mid, side) == 0:
        return _NARROWEST_DB
    ratio_db = 10 * math.log10(max(side, 1e-30) / max(mid, 1e-30))
    return max(_NARROWEST_DB, min(-_NARROWEST_DB, ratio_db))


def worst_loss_percent(figures: dict[str, float], reference: dict[str, float]) -> float:
    """By how many percent the worst of compare_spectra's figures is worse than the reference's."""
    losses = []
    for name in ("chroma_correlation", "log10_mel_l1", *_FINE_NAMES):
        rise = 100 * (figures[name] - reference[name]) / max(abs(reference[name]), 1e-6)
        losses.append(rise if name == "log10_mel_l1" else -rise)
    return max(losses)


def find_voice_metrics() -> dict[str, Callable[[Tensor, Tensor], float]]:
    """The measures whose packages are installed, by name."""
    measures = {"pesq": measure_pesq, "stoi": measure_stoi}
    return {name: measures[name] for name in measures if name not in missing_voice_metrics()}


def missing_voice_metrics() -> dict[str, str]:
    """The PyPI packages that are not installed, by the measure that needs them."""
    packages = {"pesq": "pesq", "stoi": "pystoi"}
    return {name: package for name, package in packages.items() if find_spec(package) is None}


def measure_pesq(reference: Tensor, found: Tensor) -> float:
    """Wideband PESQ (ITU-T P.862.2), 1.0 to 4.64, higher is better; NaN where no voice is found.

    Both waves [channels, samples] at 48 kHz, compared at 16 kHz in mono.
    """
    from pesq import PesqError, pesq

    score = pesq(_RATE_HZ, _prepare(reference), _prepare(found), "wb", on_error=PesqError.RETURN_VALUES)
    return float(score) if score >= 1 else float("nan")


def measure_stoi(reference: Tensor, found: Tensor) -> float:
    """Short-time objective intelligibility (Taal et al., 2011), up to 1; NaN where the voice is too short.

    Both waves [channels, samples] at 48 kHz, compared in mono.
    """
    from pystoi import stoi

    if reference.shape[-1] < _SHORTEST_SECONDS * SAMPLE_RATE_HZ:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # pystoi warns where it has too little to judge
        try:
            return float(stoi(_prepare(reference), _prepare(found), _RATE_HZ))
        except RuntimeWarning:
            return float("nan")


def require_visqol() -> None:
    """Raise ConfigError where the package of `measure_visqol` is missing."""
    if find_spec("visqol") is None:
        raise ConfigError(
            "ViSQOL needs the package visqol-python, which is missing: pip install visqol-python"
        )


def measure_visqol(reference: Tensor, found: Tensor) -> float:
    """ViSQOL of music (Chinen et al., 2020), 1 to 4.73, higher is better; half a second per second of sound.

    Both waves [channels, samples] at 48 kHz, compared in mono; it bears small shifts in time.
    """
    from visqol import VisqolApi

    api = VisqolApi()
    api.create(mode="audio")
    reference, found = (wave.double().mean(dim=0) for wave in (reference, found))
    return float(api.measure_from_arrays(reference.numpy(), found.numpy(), SAMPLE_RATE_HZ).moslqo)


def _prepare(wave: Tensor) -> np.ndarray:
    mono = wave.detach().float().mean(dim=0).cpu().numpy()
    return soxr.resample(mono, SAMPLE_RATE_HZ, _RATE_HZ)


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


_PLAYING_FFT = 4096
_EVEN_RMS = 0.1  # of the whole wave, before levels are compared
_BASS_HZ, _CHORDS_HZ, _DRUMS_HZ = (40, 120), (250, 1000), (8000, 16_000)
_ONSET = 1.0  # standard deviations of the envelope
_ONSET_FRAMES = 6  # between two onsets, at the least
_EARLY_SECONDS = 0.05  # that the onset of a beat may be


def measure_playing(
    wave: Tensor, beats_seconds: np.ndarray, downbeats_seconds: np.ndarray
) -> dict[str, float]:
    """What a band [channels, samples] at 48 kHz plays: onsets per beat, shares of the bars with each stem.

    Beats and bars are the song's own; NaN where there are not two of them. See `hear_stems`.
    """
    peaks, _ = find_peaks(onset_envelope(wave), height=_ONSET, distance=_ONSET_FRAMES)
    times, beats = peaks / ENVELOPE_RATE_HZ + _EARLY_SECONDS, len(beats_seconds) - 1
    onsets = math.nan
    if beats > 0:
        onsets = float(((times >= beats_seconds[0]) & (times < beats_seconds[-1])).sum() / beats)
    bars = hear_stems(wave, downbeats_seconds)
    return {"onsets_per_beat": onsets} | {
        f"bars_with_{stem}": float(heard.mean()) if len(heard) else math.nan for stem, heard in bars.items()
    }


def hear_stems(wave: Tensor, downbeats_seconds: np.ndarray) -> dict[str, np.ndarray]:
    """Whether drums, bass and chords are heard in each bar of a band: {stem: [bars] bool}.

    Drums are noise that comes in with a stroke (energy above 8 kHz rises at once), bass is what lasts below
    120 Hz, where a kick only passes, chords are what lasts between 250 and 1000 Hz; all against the level of
    the whole wave [channels, samples]. Limits were set on mixes of validation stems.
    """
    mono = wave.float().mean(dim=0)
    mono = mono * (_EVEN_RMS / mono.square().mean().sqrt().clamp_min(1e-6))
    window = torch.hann_window(_PLAYING_FFT) * (2 / _PLAYING_FFT)
    hop = round(SAMPLE_RATE_HZ / ENVELOPE_RATE_HZ)
    power = torch.stft(mono, _PLAYING_FFT, hop, window=window, return_complex=True).abs().square()
    width = SAMPLE_RATE_HZ / _PLAYING_FFT
    drums, bass, chords = (
        10 * (power[round(low / width) : round(high / width)].sum(dim=0) + floor).log10().numpy()
        for (low, high), floor in ((_DRUMS_HZ, 1e-5), (_BASS_HZ, 1e-10), (_CHORDS_HZ, 1e-10))
    )
    frames = np.round(np.asarray(downbeats_seconds) * ENVELOPE_RATE_HZ).astype(int)
    bars = [slice(start, stop) for start, stop in pairwise(frames) if stop - start > 1]
    return {
        "drums": np.array([np.diff(drums[bar]).max() > 2.3 for bar in bars]),
        "bass": np.array([np.percentile(bass[bar], 40) > -33.5 for bar in bars]),
        "chords": np.array([np.percentile(chords[bar], 10) > -36 for bar in bars]),
    }
