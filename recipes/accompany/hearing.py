"""What is heard in a finished accompaniment: the musical part of report.json."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from duotok.lm.sheet.plan import SongPlan
from duotok.recipes.accompany.mix import Mixdown
from duotok.recipes.accompany.wishes import describe_plan, find_beats, find_rests
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import (
    CHROMA_RATE_HZ,
    active_segments,
    at_chroma_rate,
    correlate_chroma,
    estimate_activity,
    measure_chroma,
)
from duotok.tokenizer.music.harmony import estimate_chords, read_key
from duotok.tokenizer.music.pitch import measure_coherence
from duotok.tokenizer.music.tempo import estimate_tempo, onset_envelope, track_beats


def describe_music(
    *,
    vocal: Tensor,
    mixdown: Mixdown,
    read_outs: Mapping[str, ReadOut],
    pitches: np.ndarray,
    plan: SongPlan | None = None,
) -> dict[str, Any]:
    """The musical part of report.json.

    vocal: [2, samples]; read_outs: what the codes of "vocal" and "accompaniment" say, each a batch of one.
    pitches: sung MIDI pitch. Tempo and beats are those of the plan; without one, what is heard.
    """
    heard = measure_chroma(mixdown.accompaniment)
    coherence = measure_coherence(heard, pitches)
    chromas = {track: told.chroma[0].cpu().double().numpy() for track, told in read_outs.items()}
    activity = {track: estimate_activity(told.mel[0]) for track, told in read_outs.items()}
    if plan is not None:
        activity["accompaniment"] &= ~find_rests(plan.sheet)
    sounding = {track: at_chroma_rate(active) for track, active in activity.items()}
    played = chromas["accompaniment"]
    keys = {t: read_key(chroma, CHROMA_RATE_HZ, t, sounding=sounding[t]) for t, chroma in chromas.items()}
    if plan is not None and not plan.has_singer:
        keys["vocal"] = None
    key = keys["accompaniment"] or keys["vocal"]
    fifths = 0 if key is None else key.fifths
    chords = estimate_chords(played, CHROMA_RATE_HZ, sounding=sounding["accompaniment"], fifths=fifths)
    lead_sheet, beats = describe_plan(plan, fifths), find_beats(plan)
    tempo_bpm = lead_sheet["tempo_bpm"] if lead_sheet is not None else None
    if tempo_bpm is None:
        envelope = onset_envelope(mixdown.accompaniment)
        tempo_bpm = estimate_tempo(envelope)
        beats = track_beats(envelope, tempo_bpm) if tempo_bpm is not None else beats
    return {
        **describe_length(vocal),
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "tempo_bpm": rounded(tempo_bpm, 2),
        "beats_seconds": [round(float(beat), 3) for beat in beats],
        **{f"{track}_key": key and str(key) for track, key in keys.items()},
        **{f"{track}_key_probability": key and rounded(key.probability, 4) for track, key in keys.items()},
        "chords": [[round(start, 3), round(end, 3), name] for start, end, name in chords],
        "activity": {track: _describe_activity(active) for track, active in activity.items()},
        "coherence": {
            **{name: rounded(getattr(coherence, name), 4) for name in ("score", "harmony", "in_key")},
            "tokens_to_sound_chroma_correlation": rounded(correlate_chroma(played, heard), 4),
        },
        "levels": {
            name: rounded(getattr(mixdown, name), 2)
            for name in ("vocal_lufs", "accompaniment_lufs", "mix_gain_db")
        },
        "lead_sheet": lead_sheet,
    }


def describe_length(wave: Tensor) -> dict[str, Any]:
    """Return seconds and samples of a wave [2, samples]."""
    return {"seconds": round(wave.shape[-1] / SAMPLE_RATE_HZ, 6), "samples": wave.shape[-1]}


def rounded(value: float | None, digits: int) -> float | None:
    """Return a number for a report, or null. JSON knows no infinity: a level of silence becomes null."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _describe_activity(active: np.ndarray) -> dict[str, Any]:
    segments = active_segments(active)
    return {
        "share": round(float(np.mean(active)), 4) if len(active) else 0.0,
        "segments_seconds": [[round(start, 3), round(end, 3)] for start, end in segments],
    }
