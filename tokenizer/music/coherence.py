"""How well an accompaniment fits the singing, by listening alone; what candidates are ranked by.

Harmony and in-key share as the evaluation defines them, on a light pitch tracker and the tokenizer's chroma,
so that `generate` needs no evaluation packages.
"""

import math
from dataclasses import dataclass

import numpy as np

from .key import Key, estimate_key


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """Fit of one accompaniment to one vocal; None where nothing is sung or no key can be heard."""

    harmony: float | None  # share of chroma energy at the sung pitch class x 12; 1.0 = chance
    in_key: float | None  # share of sung frames inside the accompaniment's key, 0 to 1

    @property
    def score(self) -> float:
        """What to rank candidates by, higher is better: in-key share plus half the octaves of harmony."""
        harmony = 0.5 * math.log2(max(self.harmony, 0.05)) if self.harmony is not None else 0.0
        return (self.in_key or 0.0) + harmony


def measure_coherence(chroma: np.ndarray, pitches: np.ndarray) -> Coherence:
    """Compare accompaniment chroma [frames, 12] with sung MIDI pitches [frames], NaN = not sung."""
    frames = min(len(chroma), len(pitches))
    sung = np.isfinite(pitches[:frames])
    if not sung.any():
        return Coherence(harmony=None, in_key=None)
    classes = np.round(pitches[:frames][sung]).astype(int) % 12
    energy = np.square(chroma[:frames][sung])
    total = energy.sum(axis=1)
    share = energy[np.arange(len(classes)), classes] / np.maximum(total, 1e-12)
    harmony = float(12 * np.where(total > 1e-9, share, 0.0).mean())
    key = estimate_chroma_key(chroma)
    in_key = float(np.isin(classes, sorted(key.scale)).mean()) if key is not None else None
    return Coherence(harmony=harmony, in_key=in_key)


def estimate_chroma_key(chroma: np.ndarray) -> Key | None:
    """Key of chroma amplitudes [frames, 12], every sounding frame counting alike."""
    energy = np.square(chroma)
    total = energy.sum(axis=1, keepdims=True)
    heard = total[:, 0] > 1e-9
    return estimate_key(energy[heard] / total[heard]) if heard.any() else None
