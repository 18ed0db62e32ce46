"""One recording to its items (stems, voice, sentences, cuts, files), and the record of what became of it.

OUT/songs/KEY.json holds a song's items or the reason why it has none. A run reads them to go on where
another one stopped; any number of processes and machines can write them side by side.
"""

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from duotok.recipes.corpus.manifest import SPLITS, Item, item_from_line, item_to_line, write_manifest
from duotok.recipes.corpus.songs.recordings import PARTS, SongFile, SongStems, make_stems
from duotok.recipes.corpus.songs.segments import (
    FLOOR_DB,
    HarmonicDetector,
    Segment,
    SegmentConfig,
    Spans,
    frame_levels,
    loud_level,
    plan_segments,
    unheard,
)
from duotok.recipes.corpus.songs.transcripts import (
    Sentence,
    WhisperRecognizer,
    fit_sentences,
    read_transcript,
)
from duotok.recipes.separation.adapters import open_separator
from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError, DuoTokError
from duotok.tokenizer.common.files import whole_folder, write_json, write_text
from duotok.tokenizer.heads import STEMS

SETTINGS_FILE = "settings.json"
LEFT_OUT_FILE = "left_out.jsonl"
PEAK_LIMIT = 0.98


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
        changed = [
            key for key in settings if not isinstance(stored, dict) or stored.get(key) != settings[key]
        ]
        if changed:
            raise ConfigError(
                f"{out} was made with other settings ({', '.join(changed)}); use the same or another --out"
            )
        return
    write_json(path, settings)


def read_record(out: Path, song: SongFile) -> SongRecord | None:
    """The record of a song; None if it is to be made: new, changed, damaged, or not left out for good."""
    record = _read_record(_record_path(out, song.key), out)
    if record is not None and record.signature == song.signature and record.is_final:
        return record
    if record is not None:
        for item in record.items:
            shutil.rmtree(item.path("mix").parent, ignore_errors=True)
    return None


def write_record(out: Path, song: SongFile, record: SongRecord) -> None:
    """Store a record; it appears under its name when it is whole."""
    values = asdict(record) | {"items": [json.loads(item_to_line(item)) for item in record.items]}
    write_text(_record_path(out, song.key), json.dumps(values, ensure_ascii=False))


def read_records(out: Path) -> list[SongRecord]:
    """The records of all songs, in the order of their names."""
    paths = sorted((out / "songs").glob("*.json"))
    records = [record for path in paths if (record := _read_record(path, out)) is not None]
    return sorted(records, key=lambda record: record.song)


def write_manifests(out: Path, records: Sequence[SongRecord]) -> None:
    """Write OUT/SPLIT.jsonl of every split and OUT/left_out.jsonl anew."""
    for split in SPLITS:
        items = [item for record in records for item in record.items if item.split == split]
        path = out / f"{split}.jsonl"
        if items or path.exists():
            write_manifest(path, items)
    lines = [{"song": record.song, "reason": record.reason} for record in records if record.reason]
    lines += [
        {"song": record.song, "file": file, "reason": reason}
        for record in records
        for file, reason in record.notes
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(out / LEFT_OUT_FILE, text)


def _record_path(out: Path, key: str) -> Path:
    return out / "songs" / f"{key}.json"


def _read_record(path: Path, out: Path) -> SongRecord | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        notes = [(file, reason) for file, reason in values["notes"]]
        items = [item_from_line(json.dumps(item), out) for item in values["items"]]
        return SongRecord(**(values | {"notes": notes, "items": items}))
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None  # missing or damaged: the song is made again


@dataclass(frozen=True, kw_only=True)
class SongsConfig:
    """How recordings become items; a corpus folder is made with one such setting."""

    separator: str = "mask-head"
    checkpoint: str | None = None  # of the separator; None = its default
    whisper: str | None = None  # folder of a faster-whisper model, for songs without a transcript
    language: str | None = None  # of the lyrics, for whisper; None = heard
    validation_share: float = 0.05
    test_share: float = 0.05
    segments: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        shares = (self.validation_share, self.test_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(f"validation_share and test_share must be shares of 1, got {shares}")


class SongMaker:
    """Makes the items of songs, one song after the other; the models are loaded once."""

    def __init__(self, config: SongsConfig, out: Path, device: str = "cpu") -> None:
        self.config, self.out, self.device = config, out, device
        self.detector = HarmonicDetector()
        whisper = config.whisper
        self.recognizer = WhisperRecognizer(whisper, device, config.language) if whisper else None
        self._separator: Separator | None = None

    def separator(self) -> Separator:
        """The separator, opened when the first song needs it."""
        if self._separator is None:
            self._separator = open_separator(self.config.separator, self.config.checkpoint, self.device)
        return self._separator

    def make(self, song: SongFile) -> SongRecord:
        """Write the cuts of a song and return its record; raises DuoTokError if there is none."""
        work = self.out / ".work" / song.key
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            stems = make_stems(song, work, self.separator)
            shortest = self.config.segments.shortest_seconds
            if stems.seconds < shortest:
                raise DataError(
                    f"{song.mix or song.name} lasts {stems.seconds:.1f} s, {shortest:g} s are needed"
                )
            voice = self.detector.find(stems.blocks("vocal"), stems.mix_db)
            sentences, notes = self._sentences(song, stems, voice)
            segments = plan_segments(stems.seconds, sentences, voice, self.config.segments)
            items = [
                item
                for number, segment in enumerate(segments)
                if (item := self._write_item(song, stems, segment, number)) is not None
            ]
        finally:
            shutil.rmtree(work, ignore_errors=True)
        if not items:
            raise DataError(f"{song.mix or song.name} has no stretch of {shortest:g} s for a cut")
        return SongRecord(song=song.name, signature=song.signature, items=items, notes=notes)

    def _sentences(
        self, song: SongFile, stems: SongStems, voice: Spans
    ) -> tuple[list[Sentence], list[tuple[str, str]]]:
        """Sentences of the transcript, or those recognized, or none; and (file, what was wrong with it)."""
        path, notes = song.transcript, []
        if path is not None:
            try:
                sentences, left_out = fit_sentences(read_transcript(path), stems.seconds)
                if left_out:
                    reason = (
                        f"{left_out} sentences lie past the end at {stems.seconds:.1f} s or are too short"
                    )
                    notes.append((str(path), f"{path}: {reason}"))
                silent = unheard(sentences, voice)
                if len(silent) > len(sentences) / 2:
                    reason = f"no voice is heard in {len(silent)} of its {len(sentences)} sentences"
                    notes.append((str(path), f"{path}: {reason}"))
                return sentences, notes
            except DataError as error:
                named = str(error) if str(path) in str(error) else f"{path}: {error}"
                notes.append((str(path), f"{named}; the song is cut at the pauses of the voice instead"))
        if self.recognizer is not None:
            return fit_sentences(self.recognizer.transcribe(stems, voice), stems.seconds)[0], notes
        return [], notes

    def _write_item(self, song: SongFile, stems: SongStems, segment: Segment, number: int) -> Item | None:
        """Write the five files of a cut; None when nothing is heard in it."""
        waves = stems.read(segment.start, segment.end)
        if loud_level(frame_levels(waves[-1])) <= FLOOR_DB:
            return None
        if not segment.lines:
            # Nobody sings here: what a separator left in the vocal stem belongs to the band.
            waves[STEMS.index("other")] += waves[STEMS.index("vocal")]
            waves[STEMS.index("vocal")] = 0
        waves *= min(1.0, PEAK_LIMIT / max(float(waves.abs().max()), 1e-9))  # one gain keeps the sum
        split = split_of(song, self.config.validation_share, self.config.test_share)
        name = f"{split}-{song.key}-{number:04d}"
        folder = self.out / "audio" / split / name
        _write_folder(folder, waves)
        place = folder.relative_to(self.out).as_posix()
        return Item(
            id=name,
            split=split,
            source="songs",
            song=song.name,
            seconds=waves.shape[-1] / SAMPLE_RATE_HZ,
            sample_rate_hz=SAMPLE_RATE_HZ,
            stems={stem: f"{place}/{stem}.flac" for stem in STEMS},
            mix=f"{place}/mix.flac",
            tempo_bpm=None,
            beats_seconds=[],
            downbeats_seconds=[],
            chords=[],
            key=None,
            notes=[],
            voice="unknown",
            style="unknown",
            lyrics=[
                (round(line.start - segment.start, 3), round(line.end - segment.start, 3), line.text)
                for line in segment.lines
            ],
            root=self.out,
        )


def _write_folder(folder: Path, waves: torch.Tensor) -> None:
    """waves [5, 2, samples] as FLAC files of 16 bits; the folder appears under its name when it is whole."""
    with whole_folder(folder) as temporary:
        for part, wave in zip(PARTS, waves, strict=True):
            data = np.ascontiguousarray(wave.numpy().T)
            path = str(temporary / f"{part}.flac")
            soundfile.write(path, data, SAMPLE_RATE_HZ, subtype="PCM_16", format="FLAC")


_maker: SongMaker | None = None  # one per worker process


def start_worker(config: SongsConfig, out: Path, device: str, threads: int) -> None:
    """Make this process ready for `make_song`."""
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: nothing half-made is ever listed
    torch.set_num_threads(threads)
    _maker = SongMaker(config, out, device)


def make_song(song: SongFile) -> SongRecord:
    """Make and store the record of a song; a song that gives nothing has its reason in the record."""
    assert _maker is not None
    try:
        record = _maker.make(song)
    except DuoTokError as error:
        record = SongRecord(song=song.name, signature=song.signature, reason=str(error))
    write_record(_maker.out, song, record)
    return record
