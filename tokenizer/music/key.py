"""Musical key: by the harmony reader, or by Krumhansl and Kessler's probe-tone profiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .blocks import average_blocks
from .chord_names import PITCH_CLASSES
from .harmony_reader import HarmonyReader, default_reader

# C. L. Krumhansl, Cognitive Foundations of Musical Pitch (1990), table 2.1.
_PROFILES = {
    "maj": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "min": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_SCALES = {"maj": (0, 2, 4, 5, 7, 9, 11), "min": (0, 2, 3, 5, 7, 8, 10)}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One of the 24 major and (natural) minor keys."""

    tonic: int  # pitch class, 0 = C
    mode: str  # "maj" or "min"
    correlation: float = 1.0  # of the profile with the chroma, -1 to 1 (Krumhansl)
    probability: float | None = None  # among the 24 keys (harmony reader)

    def __str__(self) -> str:
        return f"{PITCH_CLASSES[self.tonic]}:{self.mode}"

    @property
    def scale(self) -> frozenset[int]:
        """The key's seven pitch classes."""
        return frozenset((self.tonic + step) % 12 for step in _SCALES[self.mode])


def read_key(
    chroma: np.ndarray,
    rate_hz: float,
    track: str,
    *,
    sounding: np.ndarray | None = None,
    reader: HarmonyReader | None = None,
) -> Key | None:
    """The key that a track is in by what the harmony reader has learned; None where nothing sounds.

    chroma: [frames, 12] in 0..1, C first, at rate_hz, as the tokenizer reads it out of the codes of `track`
    ("vocal" or "accompaniment") or measures it. sounding: [frames]; the others do not count.
    """
    blocks = average_blocks(chroma, rate_hz)
    heard = np.ptp(blocks, axis=1) > 1e-6 if len(blocks) else np.zeros(0, dtype=bool)
    if sounding is not None and len(blocks):
        heard &= average_blocks(sounding, rate_hz) >= 0.5
    if not heard.any():
        return None
    reader = reader or default_reader()
    evidence = reader.key_evidence(torch.from_numpy(blocks[heard]).float(), track)
    with torch.no_grad():
        probabilities = reader.key_logits(evidence[None], track)[0].softmax(dim=0)
    best = int(probabilities.argmax())
    return Key(tonic=best % 12, mode=("maj", "min")[best // 12], probability=float(probabilities[best]))


def estimate_key(chroma: np.ndarray) -> Key | None:
    """The key whose Krumhansl profile correlates best with the mean chroma; None where there is no pitch.

    chroma: [frames, 12] or [12], non-negative, C first.
    """
    mean = np.asarray(chroma, dtype=np.float64).reshape(-1, 12).mean(axis=0)
    if not np.isfinite(mean).all() or mean.std() < 1e-9:
        return None
    centred = (mean - mean.mean()) / mean.std()
    best: Key | None = None
    for mode, profile in _PROFILES.items():
        shape = np.asarray(profile)
        shape = (shape - shape.mean()) / shape.std()
        for tonic in range(12):
            correlation = float(np.mean(np.roll(shape, tonic) * centred))
            if best is None or correlation > best.correlation:
                best = Key(tonic=tonic, mode=mode, correlation=correlation)
    return best
