"""What `generate` tells about its result: tempo, keys, chords, coherence, levels."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from duotok.recipes.accompany.mix import Mixdown
from duotok.recipes.accompany.wishes import describe_sheet, find_beats, find_rests
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import (
    ACTIVITY_RATE_HZ,
    CHROMA_RATE_HZ,
    active_segments,
    at_chroma_rate,
    correlate_chroma,
    estimate_activity,
    measure_chroma,
)
from duotok.tokenizer.music.harmony import Key, estimate_chords, read_key
from duotok.tokenizer.music.pitch import Coherence, measure_coherence, sung_pitch
from duotok.tokenizer.music.tempo import estimate_tempo, onset_envelope, track_beats


def describe_music(
    *,
    vocal: Tensor,
    mixdown: Mixdown,
    read_outs: Mapping[str, ReadOut],
    sheet: Tensor | None = None,
) -> dict[str, Any]:
    """The musical part of report.json.

    vocal: [2, samples]; read_outs: what the codes of "vocal" and "accompaniment" say, each a batch of one.
    sheet [frames, COLUMNS]: what the band played from. Tempo and beats are those of its bars; where there are
    none, what the accompaniment sounds like. Chords are spelled as in the key of the accompaniment.
    """
    heard = measure_chroma(mixdown.accompaniment)
    coherence = measure_coherence(heard, sung_pitch(vocal))
    chromas = {track: told.chroma[0].cpu().double().numpy() for track, told in read_outs.items()}
    activity = {track: estimate_activity(told.mel[0]) for track, told in read_outs.items()}
    if sheet is not None:
        activity["accompaniment"] &= ~find_rests(sheet)
    sounding = {track: at_chroma_rate(active) for track, active in activity.items()}
    accompaniment_chroma = chromas["accompaniment"]
    keys = {
        track: read_key(chroma, CHROMA_RATE_HZ, track, sounding=sounding[track])
        for track, chroma in chromas.items()
    }
    key = keys["accompaniment"] or keys["vocal"]
    fifths = 0 if key is None else key.fifths
    chords = estimate_chords(
        accompaniment_chroma, CHROMA_RATE_HZ, sounding=sounding["accompaniment"], fifths=fifths
    )
    lead_sheet = describe_sheet(sheet, ACTIVITY_RATE_HZ, fifths)
    beats = find_beats(sheet) / ACTIVITY_RATE_HZ
    tempo_bpm = lead_sheet["tempo_bpm"] if lead_sheet is not None else None
    if tempo_bpm is None:
        envelope = onset_envelope(mixdown.accompaniment)
        tempo_bpm = estimate_tempo(envelope)
        beats = track_beats(envelope, tempo_bpm) if tempo_bpm is not None else beats
    return {
        "seconds": round(vocal.shape[-1] / SAMPLE_RATE_HZ, 6),
        "samples": vocal.shape[-1],
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "tempo_bpm": _rounded(tempo_bpm, 2),
        "beats_seconds": [round(float(beat), 3) for beat in beats],
        **{f"{track}_key": _name(key) for track, key in keys.items()},
        **{f"{track}_key_probability": _probability(key) for track, key in keys.items()},
        "chords": [[round(start, 3), round(end, 3), name] for start, end, name in chords],
        "activity": {track: _describe_activity(active) for track, active in activity.items()},
        "coherence": {
            **_describe_coherence(coherence),
            "tokens_to_sound_chroma_correlation": _rounded(correlate_chroma(accompaniment_chroma, heard), 4),
        },
        "levels": {
            "vocal_lufs": _rounded(mixdown.vocal_lufs, 2),
            "accompaniment_lufs": _rounded(mixdown.accompaniment_lufs, 2),
            "mix_gain_db": _rounded(mixdown.mix_gain_db, 2),
        },
        "lead_sheet": lead_sheet,
    }


def _describe_coherence(coherence: Coherence) -> dict[str, float | None]:
    return {
        "score": _rounded(coherence.score, 4),
        "harmony": _rounded(coherence.harmony, 4),
        "in_key": _rounded(coherence.in_key, 4),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    """JSON knows no infinity: a level of silence becomes null."""
    return round(value, digits) if value is not None and math.isfinite(value) else None


def _describe_activity(active: np.ndarray) -> dict[str, Any]:
    segments = active_segments(active)
    return {
        "share": round(float(np.mean(active)), 4) if len(active) else 0.0,
        "segments_seconds": [[round(start, 3), round(end, 3)] for start, end in segments],
    }


def _name(key: Key | None) -> str | None:
    return None if key is None else str(key)


def _probability(key: Key | None) -> float | None:
    return None if key is None else _rounded(key.probability, 4)
