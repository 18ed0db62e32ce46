"""Sentence times of a song: from LRC, SRT, WebVTT, JSON of WhisperX and its kin, or faster-whisper."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from duotok.recipes.corpus.songs.recordings import SongStems
from duotok.recipes.corpus.songs.segments import Sentence, Spans
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError, DataError

SHORTEST_SECONDS = 0.2
WHISPER_RATE_HZ = 16_000
LONGEST_WINDOW_SECONDS = 28.0  # the model looks at 30 s
LONGEST_JOINED_GAP_SECONDS = 1.5
MARGIN_SECONDS = 0.2
MOST_SILENCE = 0.6  # sentences that the model takes for silence more than this are not kept
WHISPER_FILES = ("model.bin", "config.json")
_LRC_TIME = re.compile(r"\[(\d+):(\d{1,2}(?:[.:]\d+)?)\]")
_LRC_OFFSET = re.compile(r"\[offset:\s*([+-]?\d+)\s*\]", re.IGNORECASE)
_LRC_WORD_TIME = re.compile(r"<\d+:\d{1,2}(?:[.:]\d+)?>")
_CUE = re.compile(
    r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)\s*-->\s*(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)"
)
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


def read_transcript(path: str | Path) -> list[Sentence]:
    """The sentences of a transcript in order; raises DataError in one line when it cannot be used."""
    path = Path(path)
    text = _decode(path)
    readers = {".lrc": _read_lrc, ".srt": _read_cues, ".vtt": _read_cues, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown kind of transcript; known are {', '.join(readers)}")
    try:
        sentences = sorted(reader(text))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is not a {path.suffix[1:]} transcript: {error!r}") from error
    sentences = [Sentence(start, end, " ".join(words.split())) for start, end, words in sentences]
    sentences = [each for each in sentences if each.text and math.isfinite(each.start)]
    if not sentences:
        raise DataError(f"{path} holds no timed sentence")
    return sentences


def fit_sentences(sentences: Sequence[Sentence], seconds: float) -> tuple[list[Sentence], int]:
    """Sentences inside a recording, none overlapping the next, and the number of those left out.

    Raises DataError when more than half lie past the recording's end: they belong to another one.
    """
    inside = [each for each in sorted(sentences) if 0 <= each.start < seconds]
    left_out = len(sentences) - len(inside)
    if left_out > len(sentences) / 2:
        raise DataError(
            f"{left_out} of {len(sentences)} sentences lie past the recording's end at {seconds:.1f} s; "
            "the transcript belongs to another recording"
        )
    fitted = []
    for each, following in zip(inside, [*inside[1:], None], strict=True):
        end = min(each.end, seconds, following.start if following is not None else seconds)
        if end - each.start >= SHORTEST_SECONDS:
            fitted.append(each._replace(end=end))
        else:
            left_out += 1
    return fitted, left_out


def _decode(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is neither UTF-8 nor UTF-16 text; save it as UTF-8") from error


def _read_lrc(text: str) -> Iterable[Sentence]:
    """A line lasts until the next one begins; a line without words only ends the one before."""
    offset = _LRC_OFFSET.search(text)
    shift = int(offset.group(1)) / 1000 if offset else 0.0  # positive: the words come earlier
    lines = []
    for line in text.splitlines():
        words = _LRC_WORD_TIME.sub(" ", _LRC_TIME.sub("", line))
        for minutes, seconds in _LRC_TIME.findall(line):
            lines.append((60 * int(minutes) + float(seconds.replace(":", ".")) - shift, words))
    lines.sort(key=lambda line: line[0])
    ends = [start for start, _ in lines[1:]] + [math.inf]
    return [
        Sentence(max(0.0, start), end, words)
        for (start, words), end in zip(lines, ends, strict=False)
        if words.strip() and end > 0
    ]


def _read_cues(text: str) -> Iterable[Sentence]:
    sentences = []
    for block in re.split(r"\n\s*\n", text.replace("\r\n", "\n")):
        cue = _CUE.search(block)
        if cue is None:
            continue
        start, end = (
            3600 * int(hours or 0) + 60 * int(minutes) + float(seconds.replace(",", "."))
            for hours, minutes, seconds in (cue.groups()[:3], cue.groups()[3:])
        )
        words = block[cue.end() :].partition("\n")[2]
        sentences.append(Sentence(start, end, _MARKUP.sub("", words)))
    return sentences


def _read_json(text: str) -> Iterable[Sentence]:
    values = json.loads(text)
    segments = values["segments"] if isinstance(values, dict) else values
    return [Sentence(float(each["start"]), float(each["end"]), str(each["text"])) for each in segments]


class WhisperRecognizer:
    """Transcribes the sung stretches of a vocal stem."""

    def __init__(self, model: str, device: str = "cpu", language: str | None = None) -> None:
        folder = Path(model)
        missing = [name for name in WHISPER_FILES if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} is not a faster-whisper model ({missing[0]} is missing); give the folder of a "
                "model converted for CTranslate2 by --whisper"
            )
        try:
            from faster_whisper import WhisperModel  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                "--whisper needs the package faster-whisper: pip install faster-whisper"
            ) from error
        try:
            self.model = WhisperModel(
                str(folder),
                device=device,
                compute_type="int8" if device == "cpu" else "float16",
                cpu_threads=1,
                local_files_only=True,
            )
        except (RuntimeError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(f"cannot load the faster-whisper model in {folder}: {reason}") from error
        self.language = language

    def transcribe(self, stems: SongStems, voice: Spans) -> list[Sentence]:
        """Sentences in seconds of the song, in order; voice: where singing was found."""
        sentences, language = [], self.language
        for start, end in join_for_recognition(voice):
            start, end = max(0.0, start - MARGIN_SECONDS), min(stems.seconds, end + MARGIN_SECONDS)
            audio = resample(stems.read(start, end)[0].mean(dim=0), SAMPLE_RATE_HZ, WHISPER_RATE_HZ).numpy()
            found, info = self.model.transcribe(audio, language=language, condition_on_previous_text=False)
            for each in found:
                if each.no_speech_prob < MOST_SILENCE and each.text.strip():
                    stop = min(end, start + each.end)
                    sentences.append(Sentence(start + each.start, stop, " ".join(each.text.split())))
            language = language or info.language  # one language a song
        return [each for each in sentences if each.end > each.start]


def join_for_recognition(voice: Sequence[tuple[float, float]]) -> Spans:
    """Neighbouring spans joined as far as the model's window reaches; longer ones are parted evenly."""
    joined: Spans = []
    for start, end in voice:
        pieces = int((end - start) // LONGEST_WINDOW_SECONDS) + 1
        step = (end - start) / pieces
        for piece in range(pieces):
            begin, stop = start + piece * step, start + (piece + 1) * step
            near = bool(joined) and begin - joined[-1][1] <= LONGEST_JOINED_GAP_SECONDS
            if near and stop - joined[-1][0] <= LONGEST_WINDOW_SECONDS:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((begin, stop))
    return joined
