"""Figures of singers who are not at A = 440 Hz: how far the band is from them, and whether it still fits."""

import librosa
import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.evaluation.generate_part import listen_to_singer
from duotok.recipes.evaluation.heard_coherence import energy_chroma, measure_harmony, measure_in_key
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.music.tuning import PitchClock

CENTS = tuple(range(-50, 51, 10))
DRIFT_CENTS = 60.0
_WINDOW_SECONDS = 5.0  # of a drifting song, in which the band has one tuning
_LOWEST_HZ, _HIGHEST_HZ = 100.0, 1_500.0


def measure_tuning(settings: Settings) -> dict[str, float]:
    """Cents between band and singer for vocals resampled to CENTS and to a drift; harmony and in-key share.

    The corpus' singers are at pitch. A band is brought back by what its vocal was resampled by, so that it
    ought to be at A = 440 Hz; what it is away from that is counted: of the whole, and in the worst window of
    5 s of a drifting song.
    """
    accompanist = Accompanist.from_pretrained(settings.bundle)
    excerpts = excerpts_of(settings, items=6)
    errors: dict[float | None, list[float]] = {}
    fits: dict[float | None, list[tuple[float, float]]] = {}
    wrong_lengths = 0
    for number, excerpt in enumerate(tqdm(excerpts, desc="tuning: singers", disable=None)):
        vocal, pitches = excerpt.read("vocal"), listen_to_singer(excerpt).pitches
        for cents in (*CENTS, None):
            drift = np.linspace(-DRIFT_CENTS / 2, DRIFT_CENTS / 2, round(excerpt.seconds))
            clock = PitchClock(drift if cents is None else float(cents), excerpt.seconds)
            sung = clock.bring_back(vocal, vocal.shape[-1])
            band = accompanist.accompany(sung, seed=settings.seed + number).accompaniment
            wrong_lengths += band.shape != sung.shape
            band = clock.bring_to_pitch(band)
            errors.setdefault(cents, []).append(_away(band, windows=cents is None))
            chroma = energy_chroma(band)
            fits.setdefault(cents, []).append(
                (measure_harmony(chroma, pitches), measure_in_key(chroma, pitches))
            )
    constant = [error for cents in CENTS for error in errors[cents]]
    means = {cents: np.mean(fits[cents], axis=0) for cents in (0, CENTS[0], None)}
    return {
        "excerpts": len(excerpts),
        "cents_worst": max(constant),
        "cents_mean": float(np.mean(constant)),
        "cents_worst_drift": max(errors[None]),
        "cents_mean_drift": float(np.mean(errors[None])),
        "wrong_lengths": wrong_lengths,
        **{
            f"{name}{ending}": float(means[cents][place])
            for cents, ending in ((0, ""), (CENTS[0], "_flat"), (None, "_drift"))
            for place, name in enumerate(("harmony", "in_key"))
        },
    }


def _away(band: Tensor, *, windows: bool) -> float:
    """Cents that a band [channels, samples] is away from A = 440 Hz, or the most of it in any window."""
    size = round(_WINDOW_SECONDS * SAMPLE_RATE_HZ) if windows else band.shape[-1]
    starts = range(0, max(1, band.shape[-1] - size + 1), size)
    return max(abs(hear_cents(band[:, start : start + size])) for start in starts)


def hear_cents(wave: Tensor) -> float:
    """Cents of wave [channels, samples] over A = 440 Hz, -50 to 50: where its spectral peaks lie on the mean.

    As librosa.estimate_tuning, with the mean round the circle in place of the fullest bin of a histogram.
    """
    mono = wave.float().mean(dim=0).numpy()
    pitches, magnitudes = librosa.piptrack(
        y=mono, sr=SAMPLE_RATE_HZ, n_fft=8192, hop_length=4096, fmin=_LOWEST_HZ, fmax=_HIGHEST_HZ
    )
    found = pitches > 0
    turns = magnitudes[found] * np.exp(2j * np.pi * librosa.hz_to_midi(pitches[found]))
    return float(100 * np.angle(turns.sum()) / (2 * np.pi))
