"""One recording to its items: stems, voice, sentences, cuts, files."""

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import soundfile
import torch

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.corpus.recognition import WhisperRecognizer
from duotok.recipes.corpus.segments import Segment, SegmentConfig, plan_segments, unheard
from duotok.recipes.corpus.song_files import SongFile
from duotok.recipes.corpus.song_records import SongRecord, split_of
from duotok.recipes.corpus.song_stems import PARTS, SongStems, make_stems
from duotok.recipes.corpus.transcripts import Sentence, fit_sentences, read_transcript
from duotok.recipes.corpus.voice_activity import FLOOR_DB, Spans, frame_levels, loud_level, open_detector
from duotok.recipes.separation.adapters import open_separator
from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import whole_folder
from duotok.tokenizer.heads import STEMS

PEAK_LIMIT = 0.98


@dataclass(frozen=True, kw_only=True)
class SongsConfig:
    """How recordings become items; a corpus folder is made with one such setting."""

    separator: str = "mask-head"
    checkpoint: str | None = None  # of the separator; None = its default
    voice: str = "auto"  # detector of singing
    whisper: str | None = None  # folder of a faster-whisper model, for songs without a transcript
    language: str | None = None  # of the lyrics, for whisper; None = heard
    validation_share: float = 0.05
    test_share: float = 0.05
    segments: SegmentConfig = field(default_factory=SegmentConfig)

    def __post_init__(self) -> None:
        shares = (self.validation_share, self.test_share)
        if min(shares) < 0 or sum(shares) > 1:
            raise ConfigError(f"validation_share and test_share must be shares of 1, got {shares}")

    def stored(self) -> dict[str, object]:
        """The settings as JSON holds them."""
        return asdict(self)


class SongMaker:
    """Makes the items of songs, one song after the other; the models are loaded once."""

    def __init__(self, config: SongsConfig, out: Path, device: str = "cpu") -> None:
        self.config, self.out, self.device = config, out, device
        self.detector = open_detector(config.voice)
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
