"""The card of a model: what it is, what it learned from and whose that is, figures, use."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import read_json

# What this project's corpora are made of, and whose they are.
DATA = {
    "pop909": "scores of POP909 (MIT)",
    "openewld": "scores of OpenEWLD (MIT, public domain)",
    "lieder": "scores of OpenScore Lieder (CC0)",
    "groove": "drummers of the Groove MIDI dataset (Gillick et al. 2019, CC BY 4.0)",
    "musescore-general": "a General MIDI band by the sound font MuseScore General (MIT)",
    "kokoro": "singing synthesized from Kokoro voices (Apache-2.0)",
    "espeak": "singing synthesized from espeak-ng voices",
}
_PARTS = {
    "tokenizer": "DuoTok (arXiv 2511.20224): one code per 40 ms and track",
    "lm": "dual-track language model: reads the vocal, composes the accompaniment",
    "renderer": "autoencoder and diffusion decoder: codes to 48 kHz stereo",
    "separator": "takes a song apart into vocal, drums, bass and other",
    "score_reader": "reads the notes of the band for `generate --export midi`",
}
# Key of results.json, what it tells, how it is written.
_FIGURES = (
    ("generate.harmony", "harmony of singing and band (1.0 is chance)", "{:.2f}"),
    ("generate.harmony_mismatched", "the same with another song's singing", "{:.2f}"),
    ("generate.in_key", "share of the band's notes in the singer's key", "{:.2f}"),
    ("generate.beat_f", "beats of band and singer, F measure", "{:.2f}"),
    ("renderer.round_trip_chroma_correlation", "codes to sound: chroma correlation", "{:.2f}"),
    ("generate.rtf_30s", "computing per second of audio, 30 s song", "{:.2f} s"),
    ("generate.peak_memory_gb", "peak memory", "{:.2f} GB"),
)


_CARD = """\
---
{licence_line}library_name: duotok
pipeline_tag: audio-to-audio
tags: [music, accompaniment-generation, singing, audio-tokenizer, flow-matching]
---

# DuoTok {name}

Give it a sung vocal; it plays the band: 48 kHz stereo, as long as the song to the sample.

| folder | what it is |
|---|---|
{parts}

Fingerprint `{fingerprint}`; `bundle.json` lists every file with its SHA-256.

## Use

With DuoTok installed, and the name of this model on the hub:

    generate --vocal song.wav --model OWNER/NAME

{use}
## What it learned from

{learned}

{measured}## What may be done with it

{licence} The vocal stays its singer's; have the right to use the recording that you give it.
"""
_MEASURED = """\
## Measured

| on the test songs of its corpus | value |
|---|---|
{rows}

"""


def model_card(
    description: Mapping[str, Any],
    *,
    styles: Sequence[str] = (),
    data: Sequence[str] = (),
    figures: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """Return the card of a model as Markdown with the hub's YAML header.

    description: its bundle.json; data: what it learned from, names of DATA or texts with a licence in them;
    figures: rows of read_figures; licence: the hub's name of one. What is not given is not claimed.
    """
    rooms = {name.partition("/")[0] for name in description["components"]}
    defaults = ", ".join(f"{name} {value}" for name, value in description["defaults"].items())
    use = [f"Styles, by `--style`: {', '.join(map(_plain, styles))}.\n"] if styles else []
    use += [f"Settings it works best with: {_plain(defaults)}.\n"] if defaults else []
    learned = [f"- {_plain(DATA.get(each, each))}" for each in data]
    measured = _MEASURED.format(rows="\n".join(figures)) if figures else ""
    return _CARD.format(
        licence_line="" if licence is None else f"license: {json.dumps(licence)}\n",
        name=_plain(description["name"]),
        parts="\n".join(f"| `{room}/` | {told} |" for room, told in _PARTS.items() if room in rooms),
        fingerprint=_plain(description["fingerprint"]),
        use="\n".join([*use, ""]) if use else "",
        learned="\n".join(learned) or "Its maker does not say.",
        measured=measured,
        licence="Its maker names no licence." if licence is None else f"Weights: {_plain(licence)}.",
    )


def read_figures(path: str | Path) -> list[str]:
    """Return the rows of a card for the results.json of `evaluation.score`; DataError if it has none."""
    found: Any = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path} holds no results; give the results.json of `evaluation.score`")
    rows = [
        (told, form, found[key]) for key, told, form in _FIGURES if isinstance(found.get(key), (int, float))
    ]
    if not rows:
        raise DataError(
            f"{path} has none of the figures of a card; give the results.json of `evaluation.score`"
        )
    return [f"| {told} | {form.format(value)} |" for told, form, value in rows]


def _plain(text: str) -> str:
    """A text of others within one line of Markdown: no breaks, no table cells, no HTML."""
    return " ".join(text.translate({ord(c): " " for c in "|<>`"}).split())
