"""Figures of decoding: its speed, what guidance does, what ranking candidates by their codes gains.

Fit is measured against the notes that are truly sung: in the chroma that the accompaniment's codes stand for
and, with `settings.sound`, in what is rendered of them. Ranking sees neither the notes nor the sound.
"""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import DynamicCache, Qwen2Config, Qwen2Model

from duotok.lm.contract import LanguageModel, SamplingConfig
from duotok.lm.dual_track.layout import Layout
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.sampling import draw_uniform, pick_codes, threads
from duotok.lm.sheet.columns import commit
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, join_items, read_items
from duotok.recipes.evaluation.generate_part import listen_to_singer
from duotok.recipes.evaluation.heard_coherence import (
    FRAME_RATE_HZ,
    Coherence,
    Singing,
    listen_to,
    measure_coherence,
    measure_harmony,
    measure_in_key,
    pair_with_others,
)
from duotok.recipes.evaluation.quality_report import COLORS, save_figure
from duotok.recipes.evaluation.results import standard_error
from duotok.recipes.evaluation.speed import CORES, on_cores
from duotok.recipes.evaluation.tokenizer_part import compare_keys, read_out_key
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import ReadOut
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, at_chroma_rate, estimate_activity

CANDIDATES = 4
_ROUNDS = 2
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0)
_SPEED_SECONDS = 30.0
_UNITS = {"in_key": "sung frames in the band's key (0 to 1)", "harmony": "harmony (1 = chance)"}
_MEASURES = tuple(_UNITS)  # of tokens and of sound
_SOURCE_COLORS = {"tokens": COLORS["accompaniment"], "sound": COLORS["vocal"]}
# (measure, "tokens" | "sound") -> guidance -> mean and standard error over excerpts
Curves = Mapping[tuple[str, str], Mapping[float, tuple[float, float]]]


@torch.no_grad()
def generate_plainly(
    lm: DualTrackLM, backbone: Qwen2Model, vocal_codes: Tensor, seed: int, config: SamplingConfig
) -> Tensor:
    """Return accompaniment codes [frames] for vocal codes [frames]: those of `compose`, only later.

    backbone: of `as_transformers`.
    """
    frames = len(vocal_codes)
    if frames > config.window_frames:
        raise ConfigError(f"one window has {config.window_frames} frames, got {frames}")
    pad = lm.pads["accompaniment"]
    uniform = draw_uniform(seed, frames)
    drops = (False, True) if config.guidance != 1.0 else (False,)
    caches = [DynamicCache() for _ in drops]
    chosen = torch.full((frames,), pad)
    sheet = lm.read_sheet(vocal_codes[None])
    if sheet is not None:
        sheet = commit(sheet)
    for frame in range(frames):
        branches = []
        for drop, cache in zip(drops, caches, strict=True):
            layout = lm.lay_out(
                {"vocal": vocal_codes[None], "accompaniment": chosen[None]},
                "vocal_to_accompaniment",
                drop_source=torch.tensor([drop]),
                sheet=sheet,
            )
            # The prompt in one pass, then one step per frame; each at its own positions.
            if frame == 0:
                _advance(lm, backbone, layout, slice(0, frames), cache)
            hidden = _advance(lm, backbone, layout, slice(frames + frame, frames + frame + 1), cache)
            branches.append(lm.codes_of("accompaniment").logits(hidden[:, -1]))
        given, absent = branches[0], branches[-1]
        logits = absent + config.guidance * (given - absent) if len(branches) > 1 else given
        chosen[frame] = pick_codes(logits, uniform[frame : frame + 1], config)[0]
    return chosen


def as_transformers(lm: DualTrackLM) -> Qwen2Model:
    """The backbone of a model, with its weights, as transformers has it."""
    config = lm.config
    backbone = Qwen2Model(
        Qwen2Config(
            vocab_size=1,
            hidden_size=config.hidden_dim,
            intermediate_size=config.feed_forward_dim,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.key_value_heads,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    backbone.set_input_embeddings(torch.nn.Identity())  # the input comes embedded, from two tables
    backbone.load_state_dict(lm.backbone.state_dict())
    return backbone.eval()


def _advance(
    lm: DualTrackLM, backbone: Qwen2Model, layout: Layout, steps: slice, cache: DynamicCache
) -> Tensor:
    """States [1, steps, hidden_dim] of some steps of a layout, remembered in the cache."""
    parts = (layout.vocal, layout.accompaniment, layout.segment, layout.sheet)
    inputs = lm.embed(*(part[:, steps] for part in parts))
    output = backbone(
        inputs_embeds=inputs, position_ids=layout.position[:, steps], past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state


def time_decoding(
    lm: LanguageModel[Any], vocal_codes: Tensor, rate_hz: float, guidance: float
) -> dict[str, float]:
    """Seconds of computing per second of audio for 1 and 4 candidates, and by a plain loop; one run.

    vocal_codes: [frames], at most one window. Each is timed in turn and the fastest round counts, on two CPU
    cores at most. plain_loop_equal_codes: share of codes that the plain loop, by the same random numbers,
    chooses as well. share_of_bound: of what is reached with 1 candidate, see `bound_decoding`.
    """
    assert isinstance(lm, DualTrackLM), "the plain loop plays no other models"
    config = SamplingConfig(guidance=guidance)
    vocal_codes = vocal_codes[: config.window_frames]
    seconds = len(vocal_codes) / rate_hz
    found: dict[str, Tensor] = {}
    backbone = as_transformers(lm)

    def sample(count: int) -> Tensor:
        return lm.compose(vocal_codes, seeds=list(range(count)), sampling=config).codes

    runs: dict[str, Callable[[], Tensor]] = {
        "lm_seconds_per_second": lambda: sample(1),
        f"lm_seconds_per_second_{CANDIDATES}": lambda: sample(CANDIDATES),
        "plain_loop_seconds_per_second": lambda: generate_plainly(lm, backbone, vocal_codes, 0, config)[None],
    }
    figures = dict.fromkeys(runs, float("inf"))
    with on_cores(CORES):
        for name, run in [*runs.items()] * _ROUNDS:
            began = time.perf_counter()
            found[name] = run()
            figures[name] = min(figures[name], (time.perf_counter() - began) / seconds)
        bound = bound_decoding(lm, len(vocal_codes), rate_hz)
    one, several, plain = figures.values()
    ours, theirs = found["lm_seconds_per_second"][0], found["plain_loop_seconds_per_second"][0]
    return figures | {
        f"cost_of_{CANDIDATES}_candidates": several / one,
        "times_faster_than_plain_loop": plain / one,
        "plain_loop_equal_codes": float((ours == theirs).float().mean()),
        **bound,
        "share_of_bound": bound["bound_seconds_per_second"] / one,
    }


class _Operators(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def bound_decoding(lm: DualTrackLM, frames: int, rate_hz: float) -> dict[str, float]:
    """The least seconds of a core that 1 candidate without guidance takes per second of audio, and of what.

    For each frame all weights, and keys and values of the prompt and, on average, half the target are read
    once, as fast as this core sums so many bytes; and each operator takes as long as the addition of a single
    state. All of it is measured here. Arithmetic is not counted: that of one row hides behind the reading.
    """
    with threads(1):
        counts = []
        for length in (10, 20):
            with _Operators() as operators:
                lm.compose(torch.zeros(length).long(), seeds=[0], sampling=SamplingConfig(guidance=1.0))
            counts.append(operators.count)
        config, head = lm.config, lm.codes_of("accompaniment").codes
        weights = sum(weight.nbytes for weight in lm.backbone.parameters()) + 4 * head * config.hidden_dim
        groups = config.key_value_heads * config.hidden_dim // config.heads
        remembered = 4 * 2 * config.layers * groups * 1.5 * frames
        memory, state = torch.ones(int(weights + remembered) // 4), torch.ones(1, config.hidden_dim)
        reading = min(timeit.repeat(memory.sum, number=1, repeat=20))
        dispatch = min(timeit.repeat(lambda: state + state, number=100, repeat=20)) / 100
    operators = (counts[1] - counts[0]) / 10
    return {
        "bound_megabytes_per_frame": memory.nbytes / 1e6,
        "bound_gigabytes_per_second": memory.nbytes / reading / 1e9,
        "bound_operators_per_frame": operators,
        "bound_operator_microseconds": 1e6 * dispatch,
        "bound_seconds_per_second": rate_hz * (reading + operators * dispatch),
    }


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out for one excerpt; the candidates have the seeds first_seed, first_seed + 1, ..."""

    tokens: Sequence[dict[str, float]]  # measures of each candidate, best ranked first
    sound_first: Coherence | None  # of the candidate with the first seed: a single draw
    sound_best: Coherence | None  # of the one ranked first


def measure_decoding(settings: Settings) -> dict[str, float]:
    """Seconds of computing, fit by guidance, the gain of ranking; settings.plots gets guidance.png."""
    accompanist = Accompanist.from_pretrained(settings.bundle)
    items = read_items(settings)
    excerpts = excerpts_of(settings)
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
        wave = join_items(items, "vocal", _SPEED_SECONDS)
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
        measures["key_right"] = float(compare_keys(read_out_key(told, "accompaniment"), excerpt.item.key)[1])
    return measures


def draw_curves(outcomes: Mapping[float, Sequence[Outcome]]) -> Curves:
    """Fit by guidance: of tokens all candidates count, of sound the first of every excerpt."""
    curves: dict[tuple[str, str], dict[float, tuple[float, float]]] = {}
    for strength, found in outcomes.items():
        for measure in _MEASURES:
            values = [_mean([row[measure] for row in outcome.tokens]) for outcome in found]
            curves.setdefault((measure, "tokens"), {})[strength] = (_mean(values), standard_error(values))
            heard = [getattr(o.sound_first, measure) for o in found if o.sound_first is not None]
            if heard:
                curves.setdefault((measure, "sound"), {})[strength] = (_mean(heard), standard_error(heard))
    return curves


def draw_guidance(curves: Curves, references: Mapping[str, float], title: str, path: Path) -> None:
    """Draw in-key share and harmony by guidance.

    curves: (measure, source) -> curve, measure one of "in_key" and "harmony", source "tokens" or "sound";
    references: by measure what the corpus' own accompaniments reach, read from tokens.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (measure, unit) in zip(figure.subplots(1, 2), _UNITS.items(), strict=True):
        for (name, source), curve in curves.items():
            if name != measure:
                continue
            strengths = sorted(curve)
            axes.errorbar(
                strengths,
                [curve[strength][0] for strength in strengths],
                yerr=[curve[strength][1] for strength in strengths],
                marker="o",
                capsize=3,
                color=_SOURCE_COLORS[source],
                label=f"read from {source}",
            )
            axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
        label = "the corpus' own band, from tokens"
        axes.axhline(references[measure], linestyle="--", linewidth=1.2, color="black", label=label)
        axes.set_xlabel("guidance (1 = none)")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def describe_curves(curves: Curves) -> dict[str, float]:
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
    error = standard_error([best - one for one, best in zip(single, ranked, strict=True)])
    return {f"{name}_single": _mean(single), f"{name}_ranked": _mean(ranked), f"{name}_ranking_error": error}


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
