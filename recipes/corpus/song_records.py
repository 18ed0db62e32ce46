"""What is known of every song of a corpus of recordings: one small file each, from which manifests are made.

OUT/songs/KEY.json holds a song's items or the reason why it has none. A run reads them to go on where
another one stopped; any number of processes and machines can write them side by side.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from duotok.recipes.corpus.manifest import SPLITS, Item, item_from_line, item_to_line, write_manifest
from duotok.recipes.corpus.song_files import SongFile
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import write_json, write_text

SETTINGS_FILE = "settings.json"
LEFT_OUT_FILE = "left_out.jsonl"


@dataclass(frozen=True, kw_only=True)
class SongRecord:
    """The result of one song."""

    song: str
    signature: dict[str, int]  # names and sizes of the files it was made from
    items: list[Item] = field(default_factory=list)
    reason: str = ""  # why there are no items
    is_final: bool = True  # False: it may go better next time, as after a lack of memory
    notes: list[tuple[str, str]] = field(default_factory=list)  # other files left out, with the reason


def split_of(song: SongFile, validation_share: float, test_share: float) -> str:
    """The split of a song by a hash of its name, the same on every machine and in every run."""
    fraction = song.fraction("split")
    if fraction < test_share:
        return "test"
    return "validation" if fraction < test_share + validation_share else "train"


def in_shard(song: SongFile, shard: tuple[int, int]) -> bool:
    """Whether a song belongs to shard (number from 1, of how many)."""
    number, count = shard
    return int(song.fraction("shard") * count) == number - 1


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Remember the settings of a corpus folder; another run must have the same."""
    path = out / SETTINGS_FILE
    if path.exists():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} is damaged; delete it if you know that the settings are the same"
            ) from error
        if stored != settings:
            changed = [
                key for key in settings if not isinstance(stored, dict) or stored.get(key) != settings[key]
            ]
            raise ConfigError(
                f"{out} was made with other settings ({', '.join(changed)}); use the same or another --out"
            )
        return
    write_json(path, settings)


def read_record(out: Path, song: SongFile) -> SongRecord | None:
    """The record of a song; None if it is to be made: new, changed, damaged, or not left out for good."""
    record = _read(_path(out, song.key), out)
    if record is not None and record.signature == song.signature and record.is_final:
        return record
    if record is not None:
        for item in record.items:
            shutil.rmtree(item.path("mix").parent, ignore_errors=True)
    return None


def write_record(out: Path, song: SongFile, record: SongRecord) -> None:
    """Store a record; it appears under its name when it is whole."""
    values = {
        "song": record.song,
        "signature": record.signature,
        "reason": record.reason,
        "is_final": record.is_final,
        "notes": record.notes,
        "items": [json.loads(item_to_line(item)) for item in record.items],
    }
    write_text(_path(out, song.key), json.dumps(values, ensure_ascii=False))


def read_records(out: Path, keys: Sequence[str] | None = None) -> list[SongRecord]:
    """The records of some songs or of all, in the order of their names."""
    paths = sorted((out / "songs").glob("*.json")) if keys is None else [_path(out, key) for key in keys]
    records = [record for path in paths if (record := _read(path, out)) is not None]
    return sorted(records, key=lambda record: record.song)


def write_manifests(out: Path, records: Sequence[SongRecord], ending: str = "") -> None:
    """Write OUT/SPLIT<ending>.jsonl of every split and OUT/left_out<ending>.jsonl anew."""
    for split in SPLITS:
        items = [item for record in records for item in record.items if item.split == split]
        path = out / f"{split}{ending}.jsonl"
        if items or path.exists():
            write_manifest(path, items)
    lines = [{"song": record.song, "reason": record.reason} for record in records if record.reason]
    lines += [
        {"song": record.song, "file": file, "reason": reason}
        for record in records
        for file, reason in record.notes
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out / LEFT_OUT_FILE.replace(".", f"{ending}.", 1), text)


def _path(out: Path, key: str) -> Path:
    return out / "songs" / f"{key}.json"


def _read(path: Path, out: Path) -> SongRecord | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return SongRecord(
            song=values["song"],
            signature=values["signature"],
            reason=values["reason"],
            is_final=values["is_final"],
            notes=[(file, reason) for file, reason in values["notes"]],
            items=[item_from_line(json.dumps(item), out) for item in values["items"]],
        )
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None  # missing or damaged: the song is made again
