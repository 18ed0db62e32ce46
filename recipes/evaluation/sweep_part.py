"""Generated sets by the settings they are made with: one picture to choose a bundle's defaults by sight.

One setting at a time is moved away from the bundle's own. Every point is a JSON file in `settings.folder`, so
that a run that was interrupted goes on where it stopped; sweep.png shows all that are there. Choose on
validation songs.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.distances import MusicFeatures, compare_codes, compare_sets
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, read_items
from duotok.recipes.evaluation.generate_part import listen_to_singer
from duotok.recipes.evaluation.heard_coherence import energy_chroma, measure_harmony
from duotok.recipes.evaluation.quality_report import COLORS, save_figure
from duotok.recipes.evaluation.renderer_part import rebuild_from_codes
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json

AXES: Mapping[str, tuple[float, ...]] = {
    "guidance": (1.0, 1.25, 1.5, 2.0, 3.0),
    "playing_guidance": (1.0, 1.5, 2.0, 3.0),
    "temperature": (0.8, 0.9, 0.95, 1.0, 1.05),
    "top_p": (0.8, 0.9, 0.95, 0.98, 1.0),
    "top_k": (20, 50, 100, 300, 0),  # 0 = all
    "candidates": (1, 2, 4, 8),
}
_MEASURES = {
    "kernel_distance": "kernel distance x 1000 (0 is best)",
    "spread": "spread over the true one",
    "entropy": "entropy of codes over the true one",
    "harmony": "harmony (1 = chance)",
}
ROUND_TRIP = "round-trip"  # the point of the true codes


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came out for one excerpt."""

    features: np.ndarray  # [patches, 200]
    codes: Tensor  # [frames]
    harmony: float


def measure_sweep(settings: Settings) -> dict[str, float]:
    """Number of points and excerpts; the points themselves lie in settings.folder, beside sweep.png."""
    folder = settings.folder
    if folder is None:
        raise ConfigError("a sweep needs --folder for its points")
    accompanist = Accompanist.from_pretrained(settings.bundle)
    excerpts = excerpts_of(settings, 12, 10.0)
    parts, music = accompanist.bundle, MusicFeatures.from_pretrained()
    chosen = {name: getattr(accompanist.defaults, name) for name in AXES}
    made_with = {
        "bundle": parts.fingerprint,
        "excerpts": [[each.item.id, each.start_seconds, each.seconds] for each in excerpts],
        "seed": settings.seed,
    }
    bands: list[np.ndarray] = []
    true: list[Played] = []

    def hear(excerpt: Excerpt, wave: Tensor, codes: Tensor) -> Played:
        wave, pitches = match_level(wave, excerpt.read("accompaniment")), listen_to_singer(excerpt).pitches
        return Played(
            features=music.of_wave(wave).double().numpy(),
            codes=codes,
            harmony=measure_harmony(energy_chroma(wave), pitches),
        )

    def measure(name: str, play: Callable[[Excerpt, int], Played]) -> dict[str, Any]:
        path = folder / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if found.get("made_with") == made_with:
            return found
        if not bands:  # of a run that measures something
            bands.extend(
                music.of_wave(i.read("accompaniment")).double().numpy() for i in read_items(settings)
            )
            for excerpt in excerpts:
                wave = excerpt.read("accompaniment")
                true.append(hear(excerpt, wave, parts.tokenizer.encode(wave[None], "accompaniment")[0]))
        songs = [
            play(excerpt, number)
            for number, excerpt in enumerate(tqdm(excerpts, desc=f"sweep: {name}", disable=None))
        ]
        found = {"made_with": made_with, **judge_songs(np.concatenate(bands), true, songs, settings.seed)}
        write_json(path, found)
        return found

    def rebuild(excerpt: Excerpt, number: int) -> Played:
        wave = excerpt.read("accompaniment")
        again = rebuild_from_codes(
            parts.tokenizer, parts.renderer, wave, "accompaniment", accompanist.defaults, settings.seed
        )
        return hear(excerpt, again, true[number].codes)

    def generate(asked: Mapping[str, Any]) -> Callable[[Excerpt, int], Played]:
        def play(excerpt: Excerpt, number: int) -> Played:
            made = accompanist.accompany(excerpt.read("vocal"), seed=settings.seed + 100 * number, **asked)
            return hear(excerpt, made.accompaniment, made.codes)

        return play

    reference = measure(ROUND_TRIP, rebuild)
    points: dict[str, dict[float, dict[str, Any]]] = {}
    names: set[str] = set()
    for axis, values in AXES.items():
        for value in sorted({*values, chosen[axis]}):
            asked = chosen | {axis: value}
            name = "_".join(f"{key}-{number:g}" for key, number in asked.items())
            names.add(name)
            points.setdefault(axis, {})[value] = measure(name, generate(asked))
    title = f"{len(excerpts)} excerpts of {excerpts[0].seconds:g} s, one setting moved at a time"
    draw_sweep(points, chosen, reference, title, folder / "sweep.png")
    print(f"{folder}: sweep.png")
    return {"points": float(len(names)), "excerpts": float(len(excerpts))}


def judge_songs(
    bands: np.ndarray, true: Sequence[Played], songs: Sequence[Played], seed: int
) -> dict[str, dict[str, float]]:
    """The figures of a set and their standard errors, by leaving out each song in turn (jackknife)."""

    def judge(kept: Sequence[int]) -> dict[str, float]:
        own, made = [true[k] for k in kept], [songs[k] for k in kept]
        return {
            **compare_sets(bands, [s.features for s in own], [s.features for s in made], seed=seed),
            **compare_codes([song.codes for song in own], [song.codes for song in made]),
            "harmony": float(np.mean([song.harmony for song in made])),
        }

    count = len(songs)
    figures = judge(range(count))
    # Of two songs one remains, which has no spread.
    without = [judge([k for k in range(count) if k != left_out]) for left_out in range(count) if count > 2]
    errors = {
        name: math.sqrt((count - 1) * np.var([some[name] for some in without])) if without else 0.0
        for name in figures
    }
    return {"figures": figures, "errors": errors}


def draw_sweep(
    points: Mapping[str, Mapping[float, Mapping[str, Any]]],
    chosen: Mapping[str, float],
    reference: Mapping[str, Any],
    title: str,
    path: Path,
) -> None:
    """Draw the measures (rows) by each setting (columns); points: setting -> value -> point."""
    figure = Figure(figsize=(3.2 * len(points), 2.6 * len(_MEASURES)), layout="constrained")
    grid = figure.subplots(len(_MEASURES), len(points), squeeze=False, sharey="row")
    for column, (axis, found) in enumerate(points.items()):
        # Off is the far end of a truncation.
        values = sorted(
            found, key=lambda value, axis=axis: math.inf if axis == "top_k" and not value else value
        )
        for axes, (measure, unit) in zip(grid[:, column], _MEASURES.items(), strict=True):
            axes.errorbar(
                range(len(values)),
                [found[value]["figures"][measure] for value in values],
                yerr=[found[value]["errors"][measure] for value in values],
                marker="o",
                capsize=3,
                color=COLORS["accompaniment"],
            )
            axes.axhline(reference["figures"][measure], linestyle="--", linewidth=1, color="black")
            axes.axvline(values.index(chosen[axis]), linestyle=":", linewidth=1, color=COLORS["vocal"])
            labels = ["off" if axis == "top_k" and not value else f"{value:g}" for value in values]
            axes.set_xticks(range(len(values)), labels)
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(unit, fontsize=8)
        grid[-1, column].set_xlabel(axis.replace("_", " "))
    figure.suptitle(f"{title}\nbars: standard error; dashed: true codes to sound; dotted: the default")
    save_figure(figure, path)
