"""Sentence times of a song from a transcript file: LRC, SRT, WebVTT, or the JSON of WhisperX and its kin."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from duotok.tokenizer.common.errors import DataError

SHORTEST_SECONDS = 0.2
_LRC_TIME = re.compile(r"\[(\d+):(\d{1,2}(?:[.:]\d+)?)\]")
_LRC_OFFSET = re.compile(r"\[offset:\s*([+-]?\d+)\s*\]", re.IGNORECASE)
_LRC_WORD_TIME = re.compile(r"<\d+:\d{1,2}(?:[.:]\d+)?>")
_CUE = re.compile(
    r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)\s*-->\s*(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)"
)
_MARKUP = re.compile(r"<[^>]*>|\{\\[^}]*\}")


class Sentence(NamedTuple):
    """One sung line."""

    start: float  # seconds
    end: float  # seconds; infinite where the file does not say
    text: str  # "" = sung, the words are unknown


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
