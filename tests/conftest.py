"""Fixtures that many tests share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from duotok.recipes.corpus.manifest import Item, write_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

STEM_LEVELS = {"vocal": 0.05, "drums": 0.03, "bass": 0.05, "other": 0.03}


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of synthetic items (8 s each): harmonic 'singing' over a drone, with clicks as drums."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 4), ("test", 3)):
        items = [_synthetic_item(root, split, number) for number in range(count)]
        write_manifest(root / f"{split}.jsonl", items)
    return root


def _synthetic_item(root: Path, split: str, number: int, seconds: float = 8.0) -> Item:
    rng = np.random.default_rng((number, len(split)))
    times = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    scale = np.array([0, 2, 4, 5, 7, 9, 11])
    notes, vocal = [], np.zeros_like(times)
    for start in np.arange(0.5, seconds - 1, 0.5):
        pitch = int(60 + number + rng.choice(scale))
        sung = (times >= start) & (times < start + 0.45)
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        vocal[sung] = sum(np.sin(2 * np.pi * k * frequency * times[sung]) / k for k in range(1, 6))
        notes.append((float(start), float(start + 0.45), pitch, "la"))
    root_hz = 440 * 2 ** ((48 + number - 69) / 12)
    waves = {
        "vocal": vocal,
        "drums": rng.normal(size=times.size) * (times % 0.5 < 0.03),
        "bass": np.sin(2 * np.pi * root_hz * times),
        "other": sum(np.sin(2 * np.pi * 2 * root_hz * ratio * times) for ratio in (1, 1.26, 1.5)),
    }
    folder = root / "audio" / split / str(number)
    folder.mkdir(parents=True)
    total = torch.zeros(2, times.size)
    for stem, wave in waves.items():
        stereo = torch.from_numpy(np.stack([wave, wave]) * STEM_LEVELS[stem]).float()
        total += stereo
        write_audio(folder / f"{stem}.wav", stereo)
    write_audio(folder / "mix.wav", total)
    name = folder.relative_to(root).as_posix()
    return Item(
        id=f"{split}-{number}",
        split=split,
        source="synthetic",
        song=f"song-{split}-{number}",
        seconds=seconds,
        sample_rate_hz=SAMPLE_RATE_HZ,
        stems={stem: f"{name}/{stem}.wav" for stem in waves},
        mix=f"{name}/mix.wav",
        tempo_bpm=120.0,
        beats_seconds=[float(beat) for beat in np.arange(0, seconds, 0.5)],
        downbeats_seconds=[float(beat) for beat in np.arange(0, seconds, 2.0)],
        chords=[(0.0, seconds, "C:maj")],
        key="C:maj",
        notes=notes,
        voice="sine",
        style="drone",
        root=root,
    )
