"""The recordings of a folder or a list, with their stems and transcripts; one song's stems at 48 kHz."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.corpus.songs.segments import frame_levels, loud_level
from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.audio import AUDIO_ENDINGS, SAMPLE_RATE_HZ, stream_audio
from duotok.tokenizer.common.errors import AudioError, DataError
from duotok.tokenizer.heads import STEMS

TRANSCRIPT_ENDINGS = (".lrc", ".srt", ".vtt", ".json")
STEM_NAMES = {
    "vocal": ("vocal", "vocals"),
    "drums": ("drums",),
    "bass": ("bass",),
    "other": ("other", "no_vocals", "accompaniment"),
}
MIX_NAMES = ("mix", "mixture")
STEM_FOLDER_ENDINGS = ("", ".stems", "_stems", "-stems")
PARTS = (*STEMS, "mix")
BLOCK_SECONDS = 30
OVERLAP_SECONDS = 2  # of neighbouring blocks in the separator, cross-faded
HEADROOM = 0.5  # files hold half the amplitude, so that stems above full scale do not clip
SILENT_PEAK = 1e-4
MOST_UNEQUAL_SECONDS = 1.0  # by which stems may differ in length from their mix


@dataclass(frozen=True, kw_only=True)
class SongFile:
    """One recording and what is known next to it."""

    name: str  # path below the folder of songs without the ending, "/" between folders: the song's identity
    mix: Path | None  # None: the sum of the stems
    stems: dict[str, Path]  # empty: to be separated; else vocal and other, and drums and bass if they exist
    transcript: Path | None

    @property
    def key(self) -> str:
        """Short name made of letters and digits, the same on every machine."""
        return sha256(self.name.encode()).hexdigest()[:12]

    @property
    def signature(self) -> dict[str, int]:
        """Sizes in bytes of its files: another signature is another recording."""
        files = [self.mix, self.transcript, *self.stems.values()]
        return {path.name: path.stat().st_size if path.exists() else -1 for path in files if path is not None}

    def fraction(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the song's name only; splits and shards go by it."""
        return int(sha256(f"{purpose}:{self.name}".encode()).hexdigest()[:12], 16) / 16**12


def find_songs(source: str | Path) -> list[SongFile]:
    """All songs below a folder, or those that a text list names (one path a line, "#" begins a comment).

    A folder that holds files named vocal or vocals and other (drums and bass too) is a song's stems: of the
    file mix or mixture inside it, or of the recording next to it with the folder's name.
    """
    source = Path(source)
    if source.is_dir():
        root, paths = source, sorted(path for path in source.rglob("*") if _is_audio(path))
    elif source.is_file():
        root, paths = source.parent, _read_list(source)
    else:
        raise DataError(
            f"{source} does not exist; give a folder of recordings or a text file that lists them"
        )
    songs: dict[str, SongFile] = {}
    parts: dict[Path, dict[str, Path]] = {}
    for folder in sorted({path.parent for path in paths}):
        if stems := find_stems(folder):
            parts[folder] = stems
    claimed = set()
    for path in paths:
        folder_stems = parts.get(path.parent, {})
        if path in folder_stems.values():
            continue
        is_mix = bool(folder_stems) and path.stem.lower() in MIX_NAMES
        folder = path.parent if is_mix else _stem_folder(path)
        if folder is not None:
            claimed.add(folder)
        name = _name(folder if is_mix and folder is not None else path.with_suffix(""), root)
        stems = find_stems(folder) if folder is not None else {}
        # The same recording as .wav and .mp3 is one song; the first in the order of names is taken.
        songs.setdefault(
            name, SongFile(name=name, mix=path, stems=stems, transcript=_transcript(path, folder))
        )
    for folder, stems in parts.items():
        if folder not in claimed:
            name = _name(folder, root)
            songs.setdefault(
                name,
                SongFile(name=name, mix=None, stems=stems, transcript=_transcript(folder / "mix", folder)),
            )
    if not songs:
        raise DataError(f"{source} has no recordings; known endings are {', '.join(AUDIO_ENDINGS)}")
    return [songs[name] for name in sorted(songs)]


def find_stems(folder: Path) -> dict[str, Path]:
    """The stems that a folder holds; empty unless it has at least the vocal and the rest of the band."""
    if not folder.is_dir():
        return {}
    files = {path.stem.lower(): path for path in sorted(folder.iterdir(), reverse=True) if _is_audio(path)}
    stems = {}
    for stem in STEMS:
        for name in STEM_NAMES[stem]:
            if name in files:
                stems.setdefault(stem, files[name])
    return stems if {"vocal", "other"} <= set(stems) else {}


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_ENDINGS and not path.name.startswith(".") and path.is_file()


def _read_list(path: Path) -> list[Path]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}; it must be UTF-8 text") from error
    names = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    return sorted({path.parent / name for name in names})  # a missing file is found out when it is read


def _stem_folder(path: Path) -> Path | None:
    for ending in STEM_FOLDER_ENDINGS:
        folder = path.with_name(path.stem + ending)
        if find_stems(folder):
            return folder
    return None


def _transcript(path: Path, folder: Path | None) -> Path | None:
    """The transcript of a recording: its name with another ending, or any one name in its own stem folder."""
    names = [path.with_suffix(""), path]
    if folder is not None:
        names += [folder, folder / folder.name, folder / "lyrics", folder / "transcript"]
    for name in names:
        for ending in TRANSCRIPT_ENDINGS:
            if (found := name.with_name(name.name + ending)).is_file():
                return found
    return None


def _name(path: Path, root: Path) -> str:
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return path.resolve().as_posix().lstrip("/")


class SongStems:
    """The five files of one song in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = 0
        self.mix_db = 0.0  # level of the loud parts of the mix

    @property
    def seconds(self) -> float:
        """Length of the song."""
        return self.samples / SAMPLE_RATE_HZ

    def path(self, part: str) -> Path:
        """The file of a part."""
        return self.folder / f"{part}.w64"  # no limit of 4 GB

    def read(self, start: float, end: float) -> Tensor:
        """A stretch between two times in seconds as [5, 2, samples]: vocal, drums, bass, other, mix."""
        first, last = round(start * SAMPLE_RATE_HZ), round(end * SAMPLE_RATE_HZ)
        waves = []
        for part in PARTS:
            data, _ = soundfile.read(
                str(self.path(part)),
                start=first,
                stop=min(last, self.samples),
                dtype="float32",
                always_2d=True,
            )
            waves.append(torch.from_numpy(data.T / HEADROOM))
        return torch.stack(waves)

    def blocks(self, part: str) -> Iterator[Tensor]:
        """The whole of a part in blocks [2, samples]."""
        return (wave / HEADROOM for wave in stream_audio(self.path(part), BLOCK_SECONDS * SAMPLE_RATE_HZ))


def make_stems(song: SongFile, folder: Path, separator: Callable[[], Separator]) -> SongStems:
    """Write the stems of a song into a folder: those given next to it, else those of the separator.

    Raises AudioError when the recording is unreadable, empty or silent, or when its stems do not fit it.
    """
    stems = SongStems(folder)
    blocks = _given_blocks(song) if song.stems else _separated_blocks(song, separator())
    levels, peak = [np.zeros(0)], 0.0
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(
                soundfile.SoundFile(str(stems.path(part)), "w", SAMPLE_RATE_HZ, 2, "PCM_16", format="W64")
            )
            for part in PARTS
        }
        for block in blocks:
            peak = max(peak, float(block[-1].abs().max()) if block.shape[-1] else 0.0)
            levels.append(frame_levels(block[-1]))
            stems.samples += block.shape[-1]
            for part, wave in zip(PARTS, block, strict=True):
                files[part].write((wave * HEADROOM).numpy().T)
    if peak < SILENT_PEAK:
        raise AudioError(f"{song.mix or song.name} is silent")
    stems.mix_db = loud_level(np.concatenate(levels))
    return stems


def _separated_blocks(song: SongFile, separator: Separator) -> Iterator[Tensor]:
    """[5, 2, samples] per block; neighbouring blocks overlap in the separator and are cross-faded."""
    assert song.mix is not None
    overlap = OVERLAP_SECONDS * SAMPLE_RATE_HZ
    rise = (torch.arange(overlap) + 0.5) / overlap
    before, held = torch.zeros(2, 0), torch.zeros(len(STEMS), 2, 0)
    for wave in stream_audio(song.mix, BLOCK_SECONDS * SAMPLE_RATE_HZ):
        window = torch.cat([before, wave], dim=1)
        separated = separator.separate(window)
        stems = torch.stack([separated[stem] for stem in STEMS])
        shared = held.shape[-1]
        stems[..., :shared] = held * rise.flip(0)[:shared] + stems[..., :shared] * rise[:shared]
        yield _with_mix(stems[..., :-overlap])
        before, held = window[:, -overlap:], stems[..., -overlap:]
    yield _with_mix(held)


def _given_blocks(song: SongFile) -> Iterator[Tensor]:
    """[5, 2, samples] per block from the files next to a song; a mix that is not there is their sum."""
    paths = {**song.stems, **({"mix": song.mix} if song.mix is not None else {})}
    streams = {part: stream_audio(path, BLOCK_SECONDS * SAMPLE_RATE_HZ) for part, path in paths.items()}
    totals = dict.fromkeys(paths, 0)
    while True:
        waves = {part: next(stream, torch.zeros(2, 0)) for part, stream in streams.items()}
        length = max(wave.shape[-1] for wave in waves.values())
        if length == 0:
            break
        for part, wave in waves.items():
            totals[part] += wave.shape[-1]
        if max(totals.values()) - min(totals.values()) > MOST_UNEQUAL_SECONDS * SAMPLE_RATE_HZ:
            shown = ", ".join(f"{part} {total / SAMPLE_RATE_HZ:.1f} s" for part, total in totals.items())
            raise AudioError(f"the stems of {song.name} do not have one length: {shown}")
        padded = {part: functional.pad(wave, (0, length - wave.shape[-1])) for part, wave in waves.items()}
        silence = torch.zeros(2, length)
        stems = torch.stack([padded.get(stem, silence) for stem in STEMS])
        yield torch.cat([stems, padded["mix"][None]]) if "mix" in padded else _with_mix(stems)


def _with_mix(stems: Tensor) -> Tensor:
    return torch.cat([stems, stems.sum(dim=0, keepdim=True)])
