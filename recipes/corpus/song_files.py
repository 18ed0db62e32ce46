"""The recordings of a folder or a list, with the stems and the transcript that lie next to each."""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.heads import STEMS

AUDIO_ENDINGS = (
    ".wav",
    ".flac",
    ".ogg",
    ".oga",
    ".opus",
    ".mp3",
    ".aif",
    ".aiff",
    ".au",
    ".caf",
    ".w64",
    ".rf64",
)
TRANSCRIPT_ENDINGS = (".lrc", ".srt", ".vtt", ".json")
STEM_NAMES = {
    "vocal": ("vocal", "vocals"),
    "drums": ("drums",),
    "bass": ("bass",),
    "other": ("other", "no_vocals", "accompaniment"),
}
MIX_NAMES = ("mix", "mixture")
STEM_FOLDER_ENDINGS = ("", ".stems", "_stems", "-stems")


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
