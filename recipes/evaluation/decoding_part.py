"""Figures of decoding: its speed, what guidance does, what ranking candidates by their codes gains.

Fit is measured against the notes that are truly sung: in the chroma that the accompaniment's codes stand for
and, with `settings.sound`, in what is rendered of them. Ranking sees neither the notes nor the sound.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.coherence import (
    FRAME_RATE_HZ,
    Coherence,
    Singing,
    listen_to,
    measure_coherence,
    measure_harmony,
    measure_in_key,
    pair_with_others,
)
from duotok.recipes.evaluation.decoding_speed import CANDIDATES, time_decoding
from duotok.recipes.evaluation.excerpts import Excerpt, choose_excerpts, read_test_items
from duotok.recipes.evaluation.generate_part import join_vocals, listen_to_singer
from duotok.recipes.evaluation.readout_part import compare_keys
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.research.decoding_plot import draw_guidance
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity
from duotok.tokenizer.music.harmony import read_key

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0)
_ITEMS, _SECONDS = 24, 20.0
_SPEED_SECONDS = 30.0
_MEASURES = ("in_key", "harmony")  # of tokens and of sound


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one excerpt; the candidates have the seeds first_seed, first_seed + 1, ..."""

    tokens: Sequence[dict[str, float]]  # measures of each candidate, best ranked first
    sound_first: Coherence | None  # of the candidate with the first seed: a single draw
    sound_best: Coherence | None  # of the one ranked first


def measure_decoding(settings: Settings) -> dict[str, float]:
    """Seconds of computing, fit by guidance, the gain of ranking; settings.plots gets guidance.png."""
    accompanist = Accompanist.from_pretrained(settings.bundle)
    items = read_test_items(settings.corpus)
    excerpts = choose_excerpts(
        items, count=settings.items or _ITEMS, seconds=settings.seconds or _SECONDS, seed=settings.seed
    )
    singings = [listen_to_singer(excerpt) for excerpt in excerpts]
    own = accompanist.defaults.guidance
    figures: dict[str, float] = {
        "excerpts": len(excerpts),
        "excerpt_seconds": excerpts[0].seconds,
        "candidates": CANDIDATES,
        "guidance": own,
    }
    references = measure_references(accompanist, excerpts, singings)
    figures |= references
    runs = [(strength, number) for strength in sorted({*GUIDANCES, own}) for number in range(len(excerpts))]
    outcomes: dict[float, list[Outcome]] = {}
    for strength, number in tqdm(runs, desc="decoding: candidates", disable=None):
        outcome = accompany(
            accompanist,
            excerpts[number],
            singings[number],
            strength,
            first_seed=settings.seed + CANDIDATES * number,
            sound=settings.sound,
            sound_of_best=settings.sound and strength == own,
        )
        outcomes.setdefault(strength, []).append(outcome)
    curves = draw_curves(outcomes)
    figures |= describe_curves(curves) | describe_ranking(outcomes[own])
    if settings.plots is not None:
        title = f"Guidance ({len(excerpts)} excerpts of {excerpts[0].seconds:g} s; bars: standard error)"
        draw_guidance(
            curves, {m: references[f"{m}_real"] for m in _MEASURES}, title, settings.plots / "guidance.png"
        )
    if settings.speed:
        wave = join_vocals(items, _SPEED_SECONDS)
        tokenizer = accompanist.bundle.tokenizer
        codes = tokenizer.encode(wave[None], "vocal")[0]
        figures |= time_decoding(accompanist.bundle.lm, codes, tokenizer.frame_rate_hz, own)
    return figures


def accompany(
    accompanist: Accompanist,
    excerpt: Excerpt,
    singing: Singing,
    guidance: float,
    *,
    first_seed: int,
    sound: bool,
    sound_of_best: bool,
) -> Outcome:
    """Compose and rank the candidates of one excerpt; render the first seed's and the best if asked."""
    vocal = excerpt.read("vocal")
    sketches = accompanist.compose(vocal, seed=first_seed, candidates=CANDIDATES, guidance=guidance)
    heard: dict[int, Coherence] = {}
    best = sketches.ranked[0].seed
    for composition in sketches.ranked:
        if (composition.seed == first_seed and sound) or (composition.seed == best and sound_of_best):
            result = accompanist.perform(sketches, composition)
            heard[composition.seed] = measure_coherence(singing, listen_to(result.accompaniment))
    return Outcome(
        tokens=[measure_tokens(composition.told, singing, excerpt) for composition in sketches.ranked],
        sound_first=heard.get(first_seed),
        sound_best=heard[best] if sound_of_best else None,
    )


def measure_references(
    accompanist: Accompanist, excerpts: Sequence[Excerpt], singings: Sequence[Singing]
) -> dict[str, float]:
    """The measures of the codes of the corpus' own accompaniments, with their singer and with another's."""
    partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
    tokenizer = accompanist.bundle.tokenizer
    rows: dict[str, list[dict[str, float]]] = {"real": [], "real_mismatched": []}
    for excerpt, partner, singing in zip(excerpts, partners, singings, strict=True):
        codes = tokenizer.encode(excerpt.read("accompaniment")[None], "accompaniment")
        told = tokenizer.read_out(codes, "accompaniment")
        rows["real"].append(measure_tokens(told, singing, excerpt))
        rows["real_mismatched"].append(measure_tokens(told, singings[partner], excerpts[partner]))
    return {
        f"{measure}_{name}": _mean([row[measure] for row in found])
        for name, found in rows.items()
        for measure in _shared(found)
    }


def measure_tokens(told: ReadOut, singing: Singing, excerpt: Excerpt) -> dict[str, float]:
    """In-key share and harmony of what accompaniment codes say, and whether their key is the labelled one.

    told: a batch of one. The key is read as `generate` reads it; the relative key counts as right. Without
    a label there is no such figure.
    """
    sounding = at_chroma_rate(estimate_activity(told.mel[0]))
    chroma = told.chroma[0].cpu().double().numpy()
    energy = np.square(chroma) * sounding[:, None]
    frames = (np.arange(len(singing.pitches)) * CHROMA_RATE_HZ / FRAME_RATE_HZ).astype(int)
    energy = energy[frames[frames < len(energy)]]
    measures = {
        "in_key": measure_in_key(energy, singing.pitches),
        "harmony": measure_harmony(energy, singing.pitches),
    }
    if excerpt.item.key:
        key = read_key(chroma, CHROMA_RATE_HZ, "accompaniment", sounding=sounding)
        measures["key_right"] = float(compare_keys(None if key is None else str(key), excerpt.item.key)[1])
    return measures


def draw_curves(
    outcomes: dict[float, list[Outcome]],
) -> dict[tuple[str, str], dict[float, tuple[float, float]]]:
    """(measure, "tokens" | "sound") -> guidance -> mean and standard error over excerpts.

    Of tokens all candidates count, of sound the first of every excerpt.
    """
    curves: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for strength, found in outcomes.items():
        for measure in _MEASURES:
            values = [_mean([row[measure] for row in outcome.tokens]) for outcome in found]
            curves.setdefault((measure, "tokens"), {})[strength] = (_mean(values), _error(values))
            heard = [getattr(o.sound_first, measure) for o in found if o.sound_first is not None]
            if heard:
                curves.setdefault((measure, "sound"), {})[strength] = (_mean(heard), _error(heard))
    return curves


def describe_curves(
    curves: dict[tuple[str, str], dict[float, tuple[float, float]]],
) -> dict[str, float]:
    """Every point of the curves, and the guidance with the highest in-key share."""
    figures: dict[str, float] = {}
    for (measure, source), curve in curves.items():
        ending = "" if source == "tokens" else "_sound"
        for strength, (mean, _) in curve.items():
            figures[f"{measure}{ending}_guidance_{strength:g}".replace(".", "_")] = mean
        if measure == "in_key":
            best = max(curve, key=lambda strength: curve[strength][0])
            figures[f"best_guidance{ending}"] = best
            figures[f"in_key{ending}_best_guidance"] = curve[best][0]
    return figures


def describe_ranking(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What ranking is worth: each measure of a single draw (…_single: the mean of all candidates), of the
    one ranked first (…_ranked) and of the truly best, which no ranking surpasses (…_oracle); the standard
    error of the gain (…_ranking_error). Of sound, the single draw is the first seed's."""
    figures: dict[str, float] = {}
    for measure in _shared([row for outcome in outcomes for row in outcome.tokens]):
        rows = np.array([[row[measure] for row in outcome.tokens] for outcome in outcomes])
        figures |= _compare(measure, rows.mean(axis=1).tolist(), rows[:, 0].tolist())
        figures[f"{measure}_oracle"] = float(rows.max(axis=1).mean())
    pairs = [(o.sound_first, o.sound_best) for o in outcomes if o.sound_first and o.sound_best]
    for measure in (*_MEASURES, "beat_f") if pairs else ():
        single, ranked = ([getattr(pair[place], measure) for pair in pairs] for place in (0, 1))
        figures |= _compare(f"{measure}_sound", single, ranked)
    return figures


def _shared(rows: Sequence[dict[str, float]]) -> list[str]:
    """The measures that every row has."""
    return [measure for measure in rows[0] if all(measure in row for row in rows)]


def _compare(name: str, single: Sequence[float], ranked: Sequence[float]) -> dict[str, float]:
    gains = [best - one for one, best in zip(single, ranked, strict=True)]
    return {
        f"{name}_single": _mean(single),
        f"{name}_ranked": _mean(ranked),
        f"{name}_ranking_error": _error(gains),
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
