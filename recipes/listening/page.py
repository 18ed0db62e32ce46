"""The page of a listening test: one HTML file with all of its sound, and the key that tells what was what.

The sounds are one folder per system, the same clips in each; the page plays them all equally loud and knows
them by numbers alone. Each listener hears them in an order of their own, drawn from the page's seed and the
listener's code.
"""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.mix import PEAK_LIMIT
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, audio_seconds, read_audio
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError
from duotok.tokenizer.common.files import read_json, whole_file, write_json
from duotok.tokenizer.common.loudness import measure_loudness

SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
TARGET_LUFS = -23.0  # EBU R 128; lower where a clip's peaks leave no room
_FADE_SECONDS = 0.01
_SHORTEST_SECONDS = 0.5
FORMAT = 1
LARGEST_BYTES = 250_000_000
# P B.4.
QUESTION = "How good does this clip sound?"
SCALE = (
    (5, "Excellent", "Imperceptible difference from natural recordings."),
    (4, "Good", "Minor artifacts that are perceptible but not intrusive."),
    (3, "Fair", "Noticeable artifacts that degrade the listening experience but remain acceptable."),
    (2, "Poor", "Intrusive artifacts or discontinuities that are unpleasant to listen to."),
    (1, "Bad", "Dominated by severe artifacts or noise."),
)
COLUMNS = ("page", "rater", "position", "stimulus", "rating", "plays")


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
    return [Stimulus(system=s, clip=name, path=found[name]) for s, found in clips.items() for name in names]


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
    gain, file = 10 ** ((loudness_lufs - measure_loudness(wave)) / 20), io.BytesIO()
    samples = (wave * gain).clamp(-1, 1).numpy().T
    soundfile.write(file, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """How a page is made."""

    title: str = "Listening test"
    seconds: float = 10.0  # longest part of a clip that is played
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.5 <= self.seconds <= 60:
            raise ConfigError(f"--seconds must be from 0.5 to 60, got {self.seconds:g}")
        if self.seed < 0:
            raise ConfigError(f"--seed must not be negative, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class Key:
    """What the stimuli of a page are."""

    page: str  # also in the page and in every ratings file
    loudness_lufs: float
    stimuli: dict[str, tuple[str, str]]  # stimulus -> system and clip

    @property
    def systems(self) -> list[str]:
        """All systems by name."""
        return sorted({system for system, _ in self.stimuli.values()})


def write_page(sounds: Path, out: Path, settings: PageSettings) -> Key:
    """Write the page `out` and beside it its key (see key_path); return the key.

    sounds: one folder per system, the same clips in each. Raises DataError and AudioError where that is not
    so or a clip cannot be used, ConfigError where the page would be larger than a browser likes.
    """
    stimuli = find_stimuli(sounds)
    seconds = sum(min(audio_seconds(stimulus.path), settings.seconds) for stimulus in stimuli)
    expected = seconds * SAMPLE_RATE_HZ * 4 * 4 / 3  # as 16 bits of stereo in base64; FLAC needs less
    if expected > LARGEST_BYTES:
        raise ConfigError(
            f"{len(stimuli)} clips of {seconds:.0f} s in all make a page of {expected / 1e6:.0f} MB, "
            f"more than {LARGEST_BYTES / 1e6:.0f} MB; give fewer clips or a smaller --seconds"
        )
    loudness = choose_loudness(stimuli, settings.seconds)
    order = np.random.default_rng(settings.seed).permutation(len(stimuli))
    names = [f"S{number:03d}" for number in range(1, len(stimuli) + 1)]
    template = files("duotok.recipes.listening").joinpath("page.html").read_text(encoding="utf-8")
    before, after = template.split("<!-- sounds -->")
    digest = sha256(f"{FORMAT} {settings.seed}".encode())
    with whole_file(out) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(before.replace("<!-- title -->", html.escape(settings.title, quote=False)))
        for name, index in zip(tqdm(names, desc="clips", disable=None), order, strict=True):
            sound = encode_clip(read_clip(stimuli[index].path, settings.seconds), loudness)
            digest.update(sound)
            file.write(f'<script type="text/plain" id="{name}">{base64.b64encode(sound).decode()}</script>\n')
        page = digest.hexdigest()[:12]
        shown = {"page": page, "title": settings.title, "seed": settings.seed, "question": QUESTION}
        shown |= {"scale": SCALE, "columns": COLUMNS, "stimuli": names}
        # "</" would end the script element.
        file.write(after.replace("/* page */", json.dumps(shown).replace("</", "<\\/")))
        chosen = {name: stimuli[index] for name, index in zip(names, order, strict=True)}
        rated = {name: (stimulus.system, stimulus.clip) for name, stimulus in chosen.items()}
        key = Key(page=page, loudness_lufs=round(loudness, 2), stimuli=rated)
        write_json(key_path(out), {"format": FORMAT, **asdict(key)})
    return key


def key_path(page: Path) -> Path:
    """The key's file of a page: listen.html -> listen.key.json."""
    return page.with_name(f"{page.stem}.key.json")


def read_key(path: Path) -> Key:
    """The key of a page; raises DataError where it is none."""
    values: Any = read_json(path)
    try:
        if values["format"] != FORMAT:
            raise DataError(f"{path} has format {values['format']!r}, this version reads {FORMAT}")
        stimuli = {str(name): (str(system), str(clip)) for name, (system, clip) in values["stimuli"].items()}
        return Key(page=str(values["page"]), loudness_lufs=float(values["loudness_lufs"]), stimuli=stimuli)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is not the key of a listening page; give the .key.json beside it") from error
