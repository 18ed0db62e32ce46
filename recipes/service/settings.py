"""What a client may ask for: the fields of Request that name no files, checked one by one.

SongSettings is made out of Request itself, so that a new field of the one is a field of the other. No text
that a client sends is ever taken for a path: chords are the chart itself, and recordings come as uploads.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator
from pydantic_core.core_schema import ValidationInfo

from duotok.recipes.accompany.request import Request
from duotok.recipes.accompany.wishes import parse_chart
from duotok.tokenizer.common.audio import audio_seconds
from duotok.tokenizer.common.errors import AudioError, ConfigError, DuoTokError
from duotok.tokenizer.common.files import shown_name

RECORDINGS = ("vocal", "mix", "prefix")  # the fields of Request that are uploads
CHART = "the chart"
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
    "seed": "another number, another accompaniment",
    "variations": "how many accompaniments, ranked by fit, best first",
    "keep": "how many of the variations are rendered",
    "accompaniment_db": "loudness of the accompaniment over the vocal's, in dB",
}


class TooLongError(AudioError):
    """A recording has more seconds than the service takes."""


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
        try:
            make_request({**{k: v for k, v in info.data.items() if k not in RECORDINGS}, name: value})
        except DuoTokError as error:
            raise ValueError(str(error)) from error
        return value


def _describe_fields() -> dict[str, Any]:
    described = {}
    for each in fields(Request):
        kind = str | None if each.name == "chords" else each.type
        if "Path" in str(kind):  # a text would be taken for one; RECORDINGS are uploads
            continue
        limits: dict[str, Any] = {"le": _MOST[each.name]} if each.name in _MOST else {}
        if kind in (str, str | None):
            limits["max_length"] = _LONGEST_CHART if each.name == "chords" else _LONGEST_TEXT
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
    """Return the request of a song with its recordings read; files, names: as SongQueue keeps them."""
    takes = [path for stored, path in files.items() if stored.startswith("vocal")]
    field, source = ("vocal", takes) if takes else ("mix", files["mix-1"])
    request = make_request(settings, **{field: source, "prefix": files.get("prefix-1")}).read()
    called = {path: names[stored] for stored, path in files.items()}
    song = replace(
        request.song,
        name=" + ".join(shown_name(names[stored]) for stored in files if stored != "prefix-1"),
        warnings=tuple(name_recordings(warning, called) for warning in request.song.warnings),
    )
    return replace(request, **{field: song})


def name_recordings(text: str, called: Mapping[Path, str]) -> str:
    """A message without where our files lie; called: where a recording is -> what its singer calls it."""
    names = {}
    for path, name in called.items():
        names |= dict.fromkeys((shown_name(path), str(path), path.name), shown_name(name))
    written = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w-])({written})(?![\w-])", lambda found: names[found[1]], text)
