"""Figures of real singers: how bands generated for recordings of them fit and sound, beside other systems.

The folder `settings.recordings` holds vocal/NAME.wav, what was really played as accompaniment/NAME.wav, and
what other systems played as SYSTEM/NAME.wav, in any format that `generate` reads.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.mix import load_vocal, match_level
from duotok.recipes.evaluation.distances import DRAWS, MusicFeatures, drawn_distance, kernel_distance
from duotok.recipes.evaluation.excerpts import Settings
from duotok.recipes.evaluation.generate_part import compare_pairs
from duotok.recipes.evaluation.heard_coherence import Singing, listen_to, pitches_of_wave, track_beats
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import DataError

VOCAL, REAL = "vocal", "accompaniment"
_FEWEST_PATCHES = 4  # of 3 s that are cut into halves


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Names of recordings, and where each part and system has them."""

    names: list[str]
    parts: dict[str, dict[str, Path]]  # folder -> name -> file

    @property
    def systems(self) -> list[str]:
        """Those to compare with."""
        return [part for part in self.parts if part not in (VOCAL, REAL)]

    def read(self, part: str, name: str) -> Tensor:
        """Wave [2, samples] at 48 kHz."""
        path = self.parts[part][name]
        return load_vocal(path).wave if part == VOCAL else read_audio(path, channels=2)


def find_recordings(folder: Path | None) -> Recordings:
    """What a folder holds; DataError where a part is missing or has not what the others have."""
    if folder is None:
        raise DataError("singers needs recordings: give --recordings FOLDER with vocal/ and accompaniment/")
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with vocal/NAME.wav and accompaniment/NAME.wav")
    parts = {
        part.name: {
            path.stem: path for path in sorted(part.iterdir()) if path.is_file() and path.name[0] != "."
        }
        for part in sorted(folder.iterdir())
        if part.is_dir()
    }
    if not all(parts.get(part) for part in (VOCAL, REAL)):
        raise DataError(f"{folder} has no recordings in {VOCAL}/ and {REAL}/; put NAME.wav into both")
    names = list(parts[VOCAL])
    if len(names) < 2:
        raise DataError(f"{folder / VOCAL} has one recording; give at least two, for mismatched pairs")
    for part, files in parts.items():
        missing = [name for name in names if name not in files]
        if missing:
            raise DataError(f"{folder / part} has no {missing[0]}, which is in {VOCAL}/; add it there")
    return Recordings(names=names, parts=parts)


def measure_singers(settings: Settings) -> dict[str, float]:
    """Coherence with the right singer and with another, and distances from what was really played.

    "harmony", "in_key" and "beat_f" of the band that is generated, "…_real" of what was really played,
    "…_SYSTEM" of each other system, each with "…_mismatched"; "kernel_distance" and "frechet" alike, but for
    "kernel_distance_real", which is between random halves. Beats are those heard in what was really played.
    """
    from duotok.recipes.accompany.pipeline import Accompanist

    found = find_recordings(settings.recordings)
    accompanist, music = Accompanist.from_pretrained(settings.bundle), MusicFeatures.from_pretrained()
    names = found.names[: settings.items]
    vocals = {name: found.read(VOCAL, name) for name in names}
    real = {name: found.read(REAL, name) for name in names}
    singings = [
        Singing(pitches=pitches_of_wave(vocals[name]), beats_seconds=track_beats(real[name]))
        for name in tqdm(names, desc="singers: what is sung", disable=None)
    ]
    systems: dict[str, Callable[[str], Tensor]] = {
        "": lambda name: accompanist.accompany(vocals[name], seed=settings.seed).accompaniment,
        **{f"_{_figure_name(part)}": partial(found.read, part) for part in found.systems},
        "_real": real.__getitem__,
    }
    figures = {
        "recordings": float(len(names)),
        "seconds": sum(wave.shape[-1] for wave in vocals.values()) / SAMPLE_RATE_HZ,
    }
    played = np.concatenate([music.of_wave(real[name]).double().numpy() for name in names])
    for suffix, make in systems.items():
        backings, features = [], []
        for name in tqdm(names, desc=f"singers: {suffix.strip('_') or 'generated'}", disable=None):
            wave = make(name)
            backings.append(listen_to(wave))
            if suffix != "_real":
                features.append(music.of_wave(match_level(wave, real[name])).double().numpy())
        figures |= compare_pairs(singings, backings, names, suffix)
        if features:
            patches = np.concatenate(features)
            figures[f"kernel_distance{suffix}"] = kernel_distance(played, patches)
            figures[f"frechet{suffix}"] = drawn_distance(
                played, patches, patches=min(len(played), len(patches)), seed=settings.seed
            )
    if len(played) >= _FEWEST_PATCHES:
        rng = np.random.default_rng(settings.seed)
        halves = [np.array_split(rng.permutation(played), 2) for _ in range(DRAWS)]
        figures["kernel_distance_real"] = float(np.mean([kernel_distance(*each) for each in halves]))
    return figures


def _figure_name(part: str) -> str:
    return re.sub(r"\W+", "_", part.lower()).strip("_")
