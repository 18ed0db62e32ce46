"""What a client may ask for: the fields of Request that name no files, checked one by one.

SongSettings is made out of Request itself, so that a new field of the one is a field of the other. No text
that a client sends is ever taken for a path: chords are the chart itself, recordings come as uploads, and an
original is a song of the queue, by its id.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic_core.core_schema import ValidationInfo

from duotok.recipes.accompany.original import Found, find_original
from duotok.recipes.accompany.output import REPORT
from duotok.recipes.accompany.request import Request
from duotok.recipes.accompany.wishes import parse_chart
from duotok.recipes.service.queue import ORIGINAL, SongQueue, UnknownSongError
from duotok.tokenizer.common.audio import audio_seconds
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError, DuoTokError
from duotok.tokenizer.common.files import shown_name

RECORDINGS = ("vocal", "mix", "prefix")  # the fields of Request that are uploads
CHART = "the chart"
_THE_ORIGINAL = "the original"  # as messages call it
_TEXTS = ("chords", "repaint", "original")  # fields whose values may be something else in Request
_LONGEST_TEXT, _LONGEST_CHART = 100, 100_000  # characters
# What one song may cost a service that others wait for.
_MOST = {"variations": 9, "candidates": 16, "steps": 100}
_WORDS = {
    "separator": "takes the vocal out of a mix, and the accompaniment apart into stems",
    "format": "wav, wav24, float, flac or mp3",
    "stems": "drums, bass and the rest of the accompaniment as well",
    "export": "any of midi, musicxml, lab, click; repeated, or with commas between",
    "tempo_bpm": "beats per minute; as it is sung where it is left out",
    "downbeat_seconds": "where a bar begins",
    "key": "such as C, Am or Eb:min",
    "chords": "a chart: a line '0.0 2.4 C:maj' for each chord",
    "tuning": "cents of the singer over A = 440 Hz, auto or off",
    "style": "one of GET /styles",
    "without": "what does not play: any of drums, bass, chords",
    "meter": "2/4, 3/4, 4/4 or 6/8",
    "intro": "bars before the singer's first that the band begins",
    "repaint": "seconds of mix.wav to make anew, as 32.0-48.0; chords, style and without hold for these",
    "original": "the song of which, without a recording: its id, or ID/accompaniment-2.wav",
    "seed": "another number, another accompaniment",
    "variations": "how many accompaniments, ranked by fit, best first",
    "keep": "how many of the variations are rendered",
    "accompaniment_db": "loudness of the accompaniment over the vocal's, in dB",
}


class TooLongError(AudioError):
    """A recording has more seconds than the service takes."""


class NotDoneError(DuoTokError):
    """A song is not made, so that no stretch of it can be made anew."""


class _Checked(BaseModel):
    """Whatever Request says of a value is said of the field that has it."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("export", "without", mode="before", check_fields=False)
    @classmethod
    def _split(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts):
            return tuple(
                dict.fromkeys(name.strip() for text in texts for name in text.split(",") if name.strip())
            )
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _ask_request(cls, value: Any, info: ValidationInfo) -> Any:
        name = info.field_name or ""
        if name in RECORDINGS:
            return value
        known = {**{k: v for k, v in info.data.items() if k not in RECORDINGS}, name: value}
        if name == "repaint" and value is not None:
            known["original"] = ""  # comes next
        elif name == "original" and "repaint" not in known:
            return value  # that was wrong
        try:
            make_request(known)
        except DuoTokError as error:
            raise ValueError(str(error)) from error
        return value


def _describe_fields() -> dict[str, Any]:
    described = {}
    for each in fields(Request):
        kind = str | None if each.name in _TEXTS else each.type
        if "Path" in str(kind):  # a text would be taken for one; RECORDINGS are uploads
            continue
        limits: dict[str, Any] = {"le": _MOST[each.name]} if each.name in _MOST else {}
        if kind in (str, str | None):
            limits["max_length"] = _LONGEST_CHART if each.name == "chords" else _LONGEST_TEXT
        limits |= {"validate_default": True} if each.name == "original" else {}  # missing beside a stretch
        described[each.name] = (kind, Field(each.default, description=_WORDS.get(each.name), **limits))
    return described


SongSettings: Any = create_model("SongSettings", __base__=_Checked, **_describe_fields())


def check_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a song, ready for SongQueue.submit; ConfigError in one line names the field."""
    try:
        return SongSettings(**values).model_dump(exclude_unset=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: {first['msg'].removeprefix('Value error, ')}") from error


def make_request(settings: Mapping[str, Any], **recordings: Any) -> Request:
    """Return the request of checked settings; recordings: `vocal` or `mix`, and `prefix`, as of Request."""
    known = {**settings, **recordings}
    if known.get("chords") is not None:
        known["chords"] = parse_chart(known["chords"], CHART)
    if not recordings:
        known["vocal"] = CHART  # is not looked at
    for name in ("export", "without"):
        known[name] = tuple(known.get(name) or ())
    return Request(**known)


def check_recording(path: Path, name: str, most_seconds: float) -> float:
    """Return the seconds of a recording that a client calls so; raises AudioError or its TooLongError."""
    try:
        seconds = audio_seconds(path, most_seconds=most_seconds)
    except AudioError as error:
        raise AudioError(name_recordings(str(error), {path: name})) from error
    if seconds > most_seconds:
        raise TooLongError(f"{shown_name(name)} is too long; this service takes up to {most_seconds:g} s")
    return seconds


def read_request(settings: Mapping[str, Any], files: Mapping[str, Path], names: Mapping[str, str]) -> Request:
    """Return the request of a song with its files read; files, names: as SongQueue keeps them."""
    takes = [path for stored, path in files.items() if stored.startswith("vocal")]
    field, source = ("vocal", takes) if takes else ("mix", files["mix-1"])
    given: dict[str, Any] = {field: source, "prefix": files.get("prefix-1"), "original": None}
    if ORIGINAL in files:
        (path,) = files[ORIGINAL].glob("accompaniment*")
        given["original"] = find_original(path, _THE_ORIGINAL).read()
    request = make_request(settings, **given).read()
    called = {files[stored]: name for stored, name in names.items()}
    song = replace(
        request.song,
        name=" + ".join(shown_name(names[stored]) for stored in find_takes(names)),
        warnings=tuple(name_recordings(warning, called) for warning in request.song.warnings),
    )
    return replace(request, **{field: song})


def find_takes(stored: Iterable[str]) -> list[str]:
    """Of the stored names of what was given for a song, those of its singer or mix."""
    return [name for name in stored if name.startswith(("vocal", "mix"))]


def submit_stretch(queue: SongQueue, settings: Mapping[str, Any], model: str | None) -> str:
    """Put a stretch of a song that is done into the queue, with the recordings of that; return the new id.

    settings: checked, with `repaint` and `original`; model: fingerprint of the one that will make it. Raises
    UnknownSongError, NotDoneError, ConfigError, and CheckpointError where another model made it.
    """
    song_id, _, name = str(settings["original"]).partition("/")
    song = queue.look(song_id)
    if song.state != "done":
        raise NotDoneError(f"the original is {song.state}; a stretch can be made anew once it is done")
    try:
        found = _find_accompaniment(queue, song_id, name)
    except DataError as error:
        queue.look(song_id)  # raises where it was deleted meanwhile
        raise ConfigError(str(error)) from error
    stretch = make_request(settings).repaint
    assert isinstance(stretch, tuple)
    found.require_wish(stretch, settings.get("format"), model)
    given, takes = queue.given(song), find_takes(song.names)
    return queue.submit(
        settings,
        [given[stored] for stored in takes],
        is_mix="mix-1" in takes,
        original=list(found.files.values()),
        names=[song.names[stored] for stored in takes],
    )


def _find_accompaniment(queue: SongQueue, song_id: str, name: str) -> Found:
    """An accompaniment of a song that is done, by its name in the report; the best one without a name."""
    path = queue.open_file(song_id, name or REPORT)
    if name and not name.startswith("accompaniment"):
        raise UnknownSongError
    return find_original(path if name else path.parent, _THE_ORIGINAL)


def name_recordings(text: str, called: Mapping[Path, str]) -> str:
    """A message without where our files lie; called: where a recording is -> what its singer calls it."""
    names = {}
    for path, name in called.items():
        names |= dict.fromkeys((shown_name(path), str(path), path.name), shown_name(name))
    written = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w-])({written})(?![\w-])", lambda found: names[found[1]], text)
