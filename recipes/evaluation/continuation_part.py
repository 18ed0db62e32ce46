"""Figures of a band that goes on from a given start: the start itself, the joint, and what comes after it."""

import math
from dataclasses import replace

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.audio_metrics import loudness_difference_lu
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of
from duotok.recipes.evaluation.heard_coherence import measure_beat_f, track_beats
from duotok.recipes.evaluation.tokenizer_part import compare_keys, read_out_key
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.model import DuoTokenizer

_PREFIX_SECONDS, _AFTER_SECONDS = 2.0, 10.0
_BESIDE_SECONDS = 1.0  # of sound whose level is compared across the joint


def measure_continuation(settings: Settings) -> dict[str, float]:
    """What follows 2 s of the corpus' own band, for 10 s: key, beat, and loudness beside the true band's.

    …_none: of bands that were given no start, …_real: of the corpus' own. The step of the level at the joint
    is what the given start adds to the step that the same band, rendered from its first note on, has there.
    """
    accompanist = Accompanist.from_pretrained(settings.bundle)
    excerpts = excerpts_of(settings, items=12)
    found: dict[str, list[dict[str, float]]] = {}
    correlations, steps = [], []
    for number, excerpt in enumerate(tqdm(excerpts, desc="continuation: songs", disable=None)):
        vocal, real = excerpt.read("vocal"), excerpt.read("accompaniment")
        prefix = real[:, : round(_PREFIX_SECONDS * SAMPLE_RATE_HZ)]
        sketches = accompanist.compose(vocal, seed=settings.seed + number, prefix=prefix)
        joined, rendered = (
            accompanist.perform(each, each.ranked[0]).accompaniment
            for each in (sketches, replace(sketches, request=replace(sketches.request, prefix=None)))
        )
        free = accompanist.accompany(vocal, seed=settings.seed + number).accompaniment
        for ending, band in {"": joined, "_none": free, "_real": real}.items():
            heard = hear_after(accompanist.bundle.tokenizer, band, real, excerpt)
            found.setdefault(ending, []).append(heard)
        inside = np.corrcoef(joined[:, : prefix.shape[-1]].flatten(), prefix.flatten())[0, 1]
        correlations.append(inside if math.isfinite(inside) else 0.0)  # of silence
        steps.append(level_step(joined, prefix.shape[-1]) - level_step(rendered, prefix.shape[-1]))
    figures: dict[str, float] = {
        "excerpts": len(excerpts),
        "prefix_correlation": min(correlations),
        "level_step_db": float(np.mean(np.abs(steps))),
        "level_step_worst_db": float(np.max(np.abs(steps))),
    }
    for ending, hearings in found.items():
        figures |= {
            f"{name}{ending}": float(np.mean([each[name] for each in hearings])) for name in hearings[0]
        }
    return figures


def hear_after(tokenizer: DuoTokenizer, band: Tensor, real: Tensor, excerpt: Excerpt) -> dict[str, float]:
    """Key, beat and loudness of the first 10 s after the joint of a band [2, samples]."""
    start, end = (round(s * SAMPLE_RATE_HZ) for s in (_PREFIX_SECONDS, _PREFIX_SECONDS + _AFTER_SECONDS))
    after, wanted = band[:, start:end], real[:, start:end]
    key = read_out_key(tokenizer.targets(after[None]), "accompaniment")
    seconds = after.shape[-1] / SAMPLE_RATE_HZ
    beats = excerpt.beats_seconds - _PREFIX_SECONDS
    return {
        "key": float(compare_keys(key, excerpt.item.key)[1]),
        "beat_f": measure_beat_f(track_beats(after), beats, seconds),
        "loudness_difference_lu": abs(loudness_difference_lu(after, wanted)),
    }


def level_step(wave: Tensor, place: int) -> float:
    """How much louder 1 s after a place of wave [2, samples] is than 1 s before it, in LU; 0 of silence."""
    size = round(_BESIDE_SECONDS * SAMPLE_RATE_HZ)
    step = measure_loudness(wave[:, place : place + size]) - measure_loudness(wave[:, place - size : place])
    return step if math.isfinite(step) else 0.0
