"""What `generate` tells about its result: tempo, keys, chords, coherence, levels."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from duotok.recipes.loudness import Mixdown
from duotok.recipes.music.chords import estimate_chords
from duotok.recipes.music.chroma import CHROMA_RATE_HZ, correlate_chroma, measure_chroma
from duotok.recipes.music.coherence import Coherence, estimate_chroma_key, measure_coherence
from duotok.recipes.music.pitch import sung_pitch
from duotok.recipes.music.tempo import estimate_tempo, onset_envelope, track_beats
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ


def describe_music(
    *, vocal: Tensor, mixdown: Mixdown, vocal_chroma: np.ndarray, accompaniment_chroma: np.ndarray
) -> dict[str, Any]:
    """The musical part of report.json.

    vocal: [2, samples]; the chromas: [frames, 12] at 50 Hz, read out of the two tracks' codes.
    """
    envelope = onset_envelope(mixdown.accompaniment)
    tempo_bpm = estimate_tempo(envelope)
    beats = track_beats(envelope, tempo_bpm) if tempo_bpm is not None else np.zeros(0)
    heard = measure_chroma(mixdown.accompaniment)
    coherence = measure_coherence(heard, sung_pitch(vocal))
    keys = {"vocal_key": vocal_chroma, "accompaniment_key": accompaniment_chroma}
    return {
        "seconds": round(vocal.shape[-1] / SAMPLE_RATE_HZ, 6),
        "samples": vocal.shape[-1],
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "tempo_bpm": _rounded(tempo_bpm, 2),
        "beats_seconds": [round(float(beat), 3) for beat in beats],
        **{name: _name(estimate_chroma_key(chroma)) for name, chroma in keys.items()},
        "chords": [
            [round(start, 3), round(end, 3), name]
            for start, end, name in estimate_chords(accompaniment_chroma, CHROMA_RATE_HZ)
        ],
        "coherence": {
            **_describe_coherence(coherence),
            "tokens_to_sound_chroma_correlation": _rounded(correlate_chroma(accompaniment_chroma, heard), 4),
        },
        "levels": {
            "vocal_lufs": _rounded(mixdown.vocal_lufs, 2),
            "accompaniment_lufs": _rounded(mixdown.accompaniment_lufs, 2),
            "mix_gain_db": _rounded(mixdown.mix_gain_db, 2),
        },
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


def _name(key: object | None) -> str | None:
    return None if key is None else str(key)
