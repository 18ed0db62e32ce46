"""The manifest: one JSON line per item of a corpus, with stems, score and labels."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.lm.sheet.columns import METERS
from duotok.tokenizer.common.audio import change_speed, read_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import whole_file
from duotok.tokenizer.heads import STEMS

ACCOMPANIMENT_STEMS = ("drums", "bass", "other")
PARTS = (*STEMS, "mix", "accompaniment")
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One excerpt of a song: its stems on disk and everything known about its music."""

    id: str
    split: str  # train, validation or test
    source: str  # where the song comes from, e.g. "pop909"
    song: str  # name of the song inside the source
    seconds: float
    sample_rate_hz: int
    stems: dict[str, str]  # vocal, drums, bass, other -> path relative to root
    mix: str  # path relative to root; "": only tokens and score were kept, there is no audio
    tempo_bpm: float | None  # None where nobody has measured it, as in recordings found elsewhere
    beats_seconds: list[float]
    downbeats_seconds: list[float]
    chords: list[tuple[float, float, str]]  # start, end, Harte label: "C:maj", "A:min7", "N"
    key: str | None  # "C:maj" or "A:min"; None = unknown
    notes: list[tuple[float, float, int, str]]  # start, end, MIDI pitch, syllable (IPA; "-" = melisma)
    voice: str
    style: str
    # start, end, text: the sung sentences of a recording without a score; "" = sung, the words are unknown
    lyrics: list[tuple[float, float, str]] = field(default_factory=list)
    keys: list[tuple[float, float, str]] = field(default_factory=list)  # of a song that leaves its key
    # The files are played faster (above 0) or slower, to sound so many semitones higher; all that is said of
    # the music, its times among it, is said of what is then heard. See `transpose`.
    semitones: int = 0
    # What the band plays: drums, bass, other -> [program, is_drums, [[start, end, pitch, velocity], ...]] of
    # each instrument (General MIDI, seconds); empty where nobody knows.
    band: dict[str, list[list]] = field(default_factory=dict)
    beats_per_bar: int = 4  # of most bars; one of METERS
    root: Path  # folder of the manifest; not stored

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise DataError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if sorted(self.stems) != sorted(STEMS):
            raise DataError(f"stems must be {', '.join(STEMS)}, got {', '.join(sorted(self.stems))}")
        if self.seconds <= 0 or self.sample_rate_hz <= 0:
            raise DataError(f"seconds and sample_rate_hz must be positive in item {self.id!r}")
        if not isinstance(self.semitones, int) or abs(self.semitones) > 12:
            raise DataError(f"semitones must be a whole number in -12..12 in item {self.id!r}")
        if self.beats_per_bar not in METERS or isinstance(self.beats_per_bar, (bool, float)):
            raise DataError(f"beats_per_bar must be one of {METERS} in item {self.id!r}")

    @property
    def speed(self) -> float:
        """By how much faster the files are played."""
        return 2.0 ** (self.semitones / 12)

    def sung_between(self, start: float, end: float) -> float:
        """Seconds of singing inside a stretch, by the notes or, without notes, by the lyrics."""
        spans = [(note[0], note[1]) for note in self.notes] or [(line[0], line[1]) for line in self.lyrics]
        return sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in spans)

    def lines_between(self, start: float, end: float) -> list[tuple[float, float, str]]:
        """What is sung inside a stretch, as start, end and text: whole sentences, else whole syllables.

        "-" (melisma) is left out.
        """
        slack = 1e-3  # seconds; times in a manifest are rounded
        syllables = ((begin, stop, text if text != "-" else "") for begin, stop, _, text in self.notes)
        for lines in (self.lyrics, syllables):
            inside = [
                (begin, stop, text)
                for begin, stop, text in lines
                if text and start - slack <= begin and stop <= end + slack
            ]
            if inside:
                return inside
        return []

    def text_between(self, start: float, end: float) -> str:
        """The text of `lines_between`, joined by spaces: notes do not tell where words begin."""
        return " ".join(text for _, _, text in self.lines_between(start, end))

    def path(self, part: str) -> Path:
        """The file of a stem or of the mix."""
        if not self.mix:
            raise DataError(f"item {self.id} was kept as tokens and score, without audio")
        if part == "mix":
            return self.root / self.mix
        if part not in self.stems:
            raise DataError(f"item {self.id} has no file for {part!r}; choose one of {', '.join(STEMS)}, mix")
        return self.root / self.stems[part]

    def read(
        self, part: str, *, start_seconds: float = 0.0, seconds: float | None = None, channels: int | None = 2
    ) -> Tensor:
        """Audio of a part at 48 kHz, float32 [channels, samples]; accompaniment = drums + bass + other."""
        if part not in PARTS:
            raise DataError(f"unknown part {part!r}; choose one of {', '.join(PARTS)}")
        names: tuple[str, ...] = (part,)
        if part == "accompaniment":
            names = ACCOMPANIMENT_STEMS
            channels = channels or 2  # stems may differ on disk; stereo is what they sum in by default
        length = None if seconds is None else seconds * self.speed
        waves = [self._read_file(name, start_seconds * self.speed, length, channels) for name in names]
        wave = waves[0] if len(waves) == 1 else torch.stack(waves).sum(dim=0)
        return change_speed(wave, self.speed)

    def _read_file(self, name: str, start: float, seconds: float | None, channels: int | None) -> Tensor:
        return read_audio(self.path(name), channels=channels, start_seconds=start, seconds=seconds)


STORED_FIELDS = tuple(each.name for each in fields(Item) if each.name != "root")
OPTIONAL_FIELDS = tuple(
    each.name for each in fields(Item) if each.default is not MISSING or each.default_factory is not MISSING
)


def item_to_line(item: Item) -> str:
    """The item as one line of JSON without the line end."""
    values = asdict(item)
    values = {name: values[name] for name in STORED_FIELDS if name not in OPTIONAL_FIELDS or values[name]}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def _check_band(band: object) -> None:
    """Raise ValueError unless it is what `Item.band` says."""
    if not isinstance(band, dict) or not set(band) <= set(ACCOMPANIMENT_STEMS):
        raise ValueError(f"band must give instruments of {', '.join(ACCOMPANIMENT_STEMS)}")
    for program, is_drums, notes in (part for parts in band.values() for part in parts):
        rows = np.array(notes or np.empty((0, 4)))  # ragged ones are a ValueError
        if not (type(program) is int and 0 <= program < 128 and isinstance(is_drums, bool)):
            raise ValueError(f"band: program {program!r:.40}, is_drums {is_drums!r:.40}")
        if rows.dtype.kind not in "if" or rows.ndim != 2 or rows.shape[1] != 4:
            raise ValueError("band: a note must be start, end, pitch, velocity")
        start, end, pitch_velocity = rows[:, 0], rows[:, 1], rows[:, 2:]
        # What is compared with NaN is false.
        if not ((start >= 0) & (end >= start) & (end < np.inf)).all():
            raise ValueError("band: a note must end after its start, not before 0 s")
        if not ((pitch_velocity % 1 == 0) & (pitch_velocity >= 0) & (pitch_velocity < 128)).all():
            raise ValueError("band: pitch and velocity must be whole numbers in 0..127")


def item_from_line(line: str, root: Path) -> Item:
    """The item of one manifest line; raises DataError with the reason."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise DataError("not a JSON object")
    missing = [name for name in STORED_FIELDS if name not in values and name not in OPTIONAL_FIELDS]
    unknown = [name for name in values if name not in STORED_FIELDS]
    if missing or unknown:
        raise DataError(f"missing fields: {missing}; unknown fields: {unknown}")
    try:
        values["chords"] = [(float(start), float(end), str(label)) for start, end, label in values["chords"]]
        values["notes"] = [
            (float(start), float(end), int(pitch), str(syllable))
            for start, end, pitch, syllable in values["notes"]
        ]
        for name in ("lyrics", "keys"):
            values[name] = [
                (float(start), float(end), str(text)) for start, end, text in values.get(name, [])
            ]
        _check_band(values.get("band", {}))
        return Item(root=root, **values)
    except (TypeError, ValueError) as error:
        raise DataError(f"bad value: {error}") from error


def read_manifest(path: str | Path) -> list[Item]:
    """All items of a manifest; a bad line is a DataError that names its number."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"cannot read the manifest {path}: {error.strerror or error}; check the path"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"the manifest {path} is not UTF-8 text: {error}") from error
    items = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            items.append(item_from_line(line, path.parent))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    return items


def refuse_duplicates(items: Iterable[Item], where: object) -> None:
    """Raise DataError where an id is there twice, for of what is made of items one would hide the other."""
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise DataError(f"{where} has two items called {item.id!r}; leave one out, or give it another id")
        seen.add(item.id)


def append_items(path: str | Path, items: Iterable[Item]) -> None:
    """Append items to a manifest, creating it and its folder when needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for item in items:
            file.write(item_to_line(item) + "\n")


def write_manifest(path: str | Path, items: Sequence[Item]) -> None:
    """Write a manifest anew, as a whole file."""
    with whole_file(path) as temporary:
        append_items(temporary, items)
