"""PESQ and STOI of a rebuilt voice; each needs a package of its own, which may be missing."""

import warnings
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import soxr
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

_RATE_HZ = 16_000
_SHORTEST_SECONDS = 0.5  # that STOI, which judges stretches of 0.4 s, can be asked about
# Measure -> the PyPI package that computes it.
PACKAGES = {"pesq": "pesq", "stoi": "pystoi"}


def find_voice_metrics() -> dict[str, Callable[[Tensor, Tensor], float]]:
    """The measures whose packages are installed, by name."""
    measures = {"pesq": measure_pesq, "stoi": measure_stoi}
    return {name: measures[name] for name, package in PACKAGES.items() if find_spec(package) is not None}


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


def _prepare(wave: Tensor) -> np.ndarray:
    mono = wave.detach().float().mean(dim=0).cpu().numpy()
    return soxr.resample(mono, SAMPLE_RATE_HZ, _RATE_HZ)
