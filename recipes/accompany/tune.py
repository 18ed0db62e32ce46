"""The singer's tuning as a request knows it: found or given, and what is said in seconds on both clocks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from duotok.recipes.accompany.wishes import TEMPO_RANGE_BPM, SheetWishes
from duotok.tokenizer.music.tuning import LEAST_CONFIDENCE, PitchClock, estimate_tuning

_LEAST_CENTS = 3.0  # hardly anybody hears less, and what is not resampled stays as it is
# Of the report: rows that begin with times; so is all in "…_seconds".
_TIMED = ("chords", "keys", "sections", "levels")


def find_pitch_clock(
    pitches: np.ndarray, seconds: float, asked: str | float
) -> tuple[PitchClock | None, dict[str, Any]]:
    """Return the clock on which a vocal of so many seconds is at A = 440 Hz, and what report.json says of it.

    pitches: as `sung_pitch` gives them. asked: "auto", "off", or the singer's cents. None: the vocal is left
    as it is, for it is at pitch already, or nobody can say how it is tuned, or nobody wants it.
    """
    told: dict[str, Any] = {"cents": None, "drift_cents": None, "confidence": None, "applied": False}
    if asked == "off":
        return None, told
    if not isinstance(asked, str):
        told |= {"cents": float(asked), "drift_cents": 0.0, "applied": asked != 0}
        return (PitchClock(float(asked), seconds) if asked else None), told
    tuning = estimate_tuning(pitches)
    if tuning is None:
        return None, told
    told |= {"confidence": round(tuning.confidence, 3)}
    if tuning.confidence < LEAST_CONFIDENCE:
        return None, told
    told |= {"cents": round(tuning.cents, 2), "drift_cents": round(tuning.drift_cents, 2)}
    if abs(tuning.cents) < _LEAST_CENTS and tuning.drift_cents == 0:
        return None, told
    return PitchClock(tuning.curve if tuning.drift_cents else tuning.cents, seconds), told | {"applied": True}


def bring_to_pitch(wishes: SheetWishes, clock: PitchClock) -> SheetWishes:
    """Wishes of a song, its tempo and its times, as they are when it is at pitch."""
    chart = wishes.chart and [
        (*(float(time) for time in clock.to_pitched(np.array([start, end]))), label)
        for start, end, label in wishes.chart
    ]
    tempo_bpm = wishes.tempo_bpm
    if tempo_bpm is not None:
        tempo_bpm = min(max(tempo_bpm / clock.mean_speed, TEMPO_RANGE_BPM[0]), TEMPO_RANGE_BPM[1])
    downbeat = wishes.downbeat_seconds
    if downbeat is not None:
        downbeat = float(clock.to_pitched(np.array([downbeat]))[0])
    return replace(wishes, tempo_bpm=tempo_bpm, downbeat_seconds=downbeat, chart=chart)


def bring_back(music: Any, clock: PitchClock, *, timed: bool = False) -> Any:
    """The musical part of report.json, written of a song at pitch, with its times as they are in the song.

    timed: whether a number in it is a time.
    """
    if isinstance(music, Mapping):
        found = {
            name: bring_back(value, clock, timed=name in _TIMED or name.endswith("_seconds"))
            for name, value in music.items()
        }
        if music.get("tempo_bpm") is not None:
            found["tempo_bpm"] = round(music["tempo_bpm"] * clock.mean_speed, 2)
        return found
    if isinstance(music, list):
        return [bring_back(value, clock, timed=timed) for value in music]
    return round(float(clock.to_song(music)), 3) if timed and isinstance(music, float) else music
