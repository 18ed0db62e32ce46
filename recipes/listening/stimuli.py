"""The sounds of a listening test: one folder per system, the same clips in each, all equally loud."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from duotok.recipes.accompany.mix import PEAK_LIMIT, measure_loudness
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import AudioError, DataError

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TARGET_LUFS = -23.0  # EBU R 128; lower where a clip's peaks leave no room
_FADE_SECONDS = 0.01
_SHORTEST_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Stimulus:
    """One sound that is rated."""

    system: str  # what made it; never shown to a listener
    clip: str  # which excerpt it is
    path: Path


def find_stimuli(folder: Path) -> list[Stimulus]:
    """The sounds FOLDER/SYSTEM/CLIP.wav (or FLAC, OGG, MP3), by system and clip.

    Raises DataError unless there are two systems or more, each with every clip.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; give one with a folder of clips per system")
    clips: dict[str, dict[str, Path]] = {}
    for system in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = sorted(path for path in system.iterdir() if path.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"{system} has no clips ({', '.join(SUFFIXES)})")
        clips[system.name] = {}
        for path in files:
            if path.stem in clips[system.name]:
                raise DataError(f"{system} has two clips of the name {path.stem}")
            clips[system.name][path.stem] = path
    if len(clips) < 2:
        raise DataError(f"{folder} has {len(clips)} system folders; there must be at least 2 to compare")
    names = sorted(set().union(*clips.values()))
    for system, found in clips.items():
        missing = [name for name in names if name not in found]
        if missing:
            raise DataError(f"{folder / system} has no clip {missing[0]}, which another system has")
    return [
        Stimulus(system=system, clip=name, path=found[name])
        for system, found in clips.items()
        for name in names
    ]


def choose_loudness(stimuli: Sequence[Stimulus], seconds: float) -> float:
    """The loudness in LUFS that every stimulus can have without exceeding full scale, TARGET_LUFS at most.

    seconds: only so much of each clip counts. Raises AudioError for a clip that is unreadable, silent or
    shorter than half a second.
    """
    target = TARGET_LUFS
    for stimulus in stimuli:
        wave = read_clip(stimulus.path, seconds)
        room_db = 20 * math.log10(PEAK_LIMIT / float(wave.abs().max()))
        target = min(target, measure_loudness(wave) + room_db)
    return target


def read_clip(path: Path, seconds: float) -> Tensor:
    """The first seconds of a clip, with short fades at its ends: [2, samples] at 48 kHz."""
    wave = read_audio(path, seconds=seconds)
    if wave.shape[-1] < _SHORTEST_SECONDS * SAMPLE_RATE_HZ:
        raise AudioError(
            f"{path} has {wave.shape[-1] / SAMPLE_RATE_HZ:.2f} s; clips need {_SHORTEST_SECONDS:g} s or more"
        )
    if math.isinf(measure_loudness(wave)):
        raise AudioError(f"{path} is silent; every clip must be heard")
    fade = torch.linspace(0, 1, round(_FADE_SECONDS * SAMPLE_RATE_HZ))
    wave[:, : len(fade)] *= fade
    wave[:, -len(fade) :] *= fade.flip(0)
    return wave


def encode_clip(wave: Tensor, loudness_lufs: float) -> bytes:
    """wave [2, samples] at 48 kHz -> FLAC of 16 bits at that loudness."""
    gain_db = loudness_lufs - measure_loudness(wave)
    file = io.BytesIO()
    samples = (wave * 10 ** (gain_db / 20)).clamp(-1, 1).numpy().T
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()
