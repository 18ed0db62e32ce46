"""Pictures of the diagnostics' figures, one PNG file each; dashed lines are the paper's numbers."""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from duotok.recipes.evaluation.lm_part import PREFIX_SECONDS, RANKS
from duotok.recipes.evaluation.quality_report import COLORS, save_figure
from duotok.recipes.research.probe import INPUTS
from duotok.tokenizer.model import TRACKS

# P tables 2, 3, 5 and 6: DuoTok of 2 x 32,768 codes under a model of 1B. Series -> cnBPT, enBPT, Acc@k.
PAPER = {
    "unconditional_vocal": (0.461, 0.501, {1: 0.14, 10: 0.43, 50: 0.67}),
    "unconditional_accompaniment": (0.506, 0.533, {1: 0.11, 10: 0.36, 50: 0.61}),
    "vocal_to_accompaniment": (0.464, 0.489, {1: 0.13, 10: 0.41, 50: 0.66}),
}
PAPER_MISMATCH_PERCENT = 17.3  # P 6.1, whole windows
# P table 11: DuoTok's utilization and normalized entropy.
PAPER_USAGE = {"vocal": (0.9996, 0.9188), "accompaniment": (0.9995, 0.9494)}
SERIES = (*PAPER, "accompaniment_to_vocal")
# How the figures of a cost end -> its color and name.
SCOPES = {
    "": (COLORS["whole"], "whole window after a 2 s prefix"),
    "_first_5s": (COLORS["first_5s"], "first 5 s, no prefix"),
}
# What the probe is given -> its name and color.
METHODS = {
    "majority": ("no input (training shares)", "#bbbbbb"),
    "mel_linear": ("mel statistics, linear", "#e0b04a"),
    "codes_linear": ("code vectors, linear", "#7fb3c8"),
    "codes_conformer": ("code vectors, Conformer", "#1f6f8b"),
}
_PAPER_STYLE: dict[str, Any] = {"colors": "black", "linestyles": "--", "linewidth": 1.2}


def _label(axes: Axes, title: str, x: str | None = None, y: str | None = None) -> None:
    axes.set(title=title, **({"xlabel": x} if x else {}), **({"ylabel": y} if y else {}))
    axes.grid(alpha=0.3)


def _windows(figures: Mapping[str, float]) -> str:
    return f"{figures['windows']} windows of {figures['window_seconds']:g} s"


def draw_predictability(figures: Mapping[str, float], path: Path) -> None:
    """cnBPT and enBPT, Acc@k, and the rates per second, by mode."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    bits, accuracy, rates = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    for number, (kind, hatch) in enumerate((("cnbpt", ""), ("enbpt", "//"))):
        style: dict[str, Any] = {"hatch": hatch, "edgecolor": "white"}
        places = np.arange(len(SERIES)) + 0.4 * number - 0.2
        heights = [figures[f"{kind}_{name}"] for name in SERIES]
        bars = bits.bar(places, heights, 0.38, color=[COLORS[name] for name in SERIES], **style)
        bits.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        bits.bar([0], [0], color="gray", label=kind.replace("bpt", "BPT"), **style)
        for place, paper in zip(places, PAPER.values(), strict=False):
            bits.hlines(paper[number], place - 0.19, place + 0.19, **_PAPER_STYLE)
    bits.plot([], [], "k--", linewidth=1.2, label="paper")
    bits.axhline(1, color="gray", linewidth=0.8)
    names = [name.replace("_to_", " to\n").replace("_", "\n") for name in SERIES]
    bits.set_xticks(np.arange(len(SERIES)), names, fontsize=8)
    bits.set_ylim(0, 1.25)
    _label(bits, "Predictability, lower is better", y="bits per token, normalized (1 = a uniform guess)")
    bits.legend(fontsize=8, loc="upper right", ncols=3)
    for name in SERIES:
        curve = [figures[f"acc_at_{k}_{name}"] for k in RANKS]
        accuracy.plot(RANKS, curve, marker="o", color=COLORS[name], label=name.replace("_", " "))
    for name, (*_, known) in PAPER.items():
        accuracy.plot(list(known), list(known.values()), "x--", color=COLORS[name], linewidth=1)
    accuracy.plot([], [], "kx--", linewidth=1, label="paper")
    accuracy.set_xscale("log")
    accuracy.set_xticks(RANKS, [str(k) for k in RANKS])
    accuracy.minorticks_off()
    _label(accuracy, "The right code among the k likeliest", "k", "Acc@k")
    accuracy.legend(fontsize=8)
    kbps = [figures["index_kbps"], figures["model_kbps_unconditional"]]
    bars = rates.bar(["fixed-length\nindices", "under the\nmodel"], kbps, color=["#999999", "#1f6f8b"])
    rates.bar_label(bars, fmt="%.3f", padding=2)
    title = f"{figures['token_rate_hz']:g} tokens/s, cnBPS {figures['cnbps_unconditional']:.1f}"
    _label(rates, title, y="kbit per second, both tracks")
    figure.suptitle(f"How predictable the codes are ({_windows(figures)})")
    save_figure(figure, path)


def draw_corruption(figures: Mapping[str, float], path: Path) -> None:
    """Cost by shift, by share hidden, and of another song's vocal."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    shift, mask, mismatch = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    mask.sharey(shift)  # the paper's mismatch, drawn beside them, would flatten these two
    for axes, pattern, scale in (
        (shift, r"shift_(\d+)ms_cost_percent", 1000),
        (mask, r"mask_(\d+)_cost_percent", 1),
    ):
        amounts = sorted(int(match[1]) for name in figures if (match := re.fullmatch(pattern, name)))
        names = [pattern.replace(r"(\d+)", str(amount)).removesuffix("_percent") for amount in amounts]
        for ending, (color, label) in SCOPES.items():
            axes.errorbar(
                np.array(amounts) / scale,
                [figures[f"{name}{ending}_percent"] for name in names],
                yerr=[figures[f"{name}{ending}_error_percent"] for name in names],
                color=color, label=label, marker="o", capsize=3,
            )  # fmt: skip
        axes.set_xticks(np.array(amounts) / scale, [f"{amount / scale:g}" for amount in amounts])
    shift.set_xscale("log")
    shift.minorticks_off()
    costs = [figures[f"mismatch_cost{ending}_percent"] for ending in SCOPES]
    errors = [figures[f"mismatch_cost{ending}_error_percent"] for ending in SCOPES]
    names = ["whole,\n2 s prefix", "first 5 s,\nno prefix"]
    bars = mismatch.bar(names, costs, yerr=errors, capsize=4, color=[color for color, _ in SCOPES.values()])
    mismatch.bar_label(bars, fmt="%.1f %%", padding=3)
    paper = f"paper: {PAPER_MISMATCH_PERCENT} %"
    mismatch.axhline(PAPER_MISMATCH_PERCENT, linestyle="--", linewidth=1.2, color="black", label=paper)
    _label(shift, "Shifted in time", "vocal moved by (s)", "cost: rise of the loss (%)")
    _label(mask, "Hidden in part", "vocal frames hidden (%)")
    _label(mismatch, "Another song's vocal", y="cost (%)")
    for axes in (shift, mask, mismatch):
        axes.axhline(0, color="black", linewidth=0.8)
    shift.legend(loc="best", fontsize=8)
    mismatch.legend(loc="best", fontsize=8)
    title = "What a damaged vocal costs the accompaniment's prediction"
    figure.suptitle(f"{title} ({_windows(figures)}; bars: standard error)")
    save_figure(figure, path)


def draw_context(figures: Mapping[str, float], path: Path) -> None:
    """cnBPT by context, over whole windows and over the same frames."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    whole, last = figure.subplots(1, 2)
    found = (re.fullmatch(rf"cnbpt_{SERIES[0]}_([\d.]+)s", name) for name in figures)
    lengths = sorted((match[1] for match in found if match), key=float)
    for axes, ending in ((whole, ""), (last, "_same_frames")):
        for name in SERIES:
            curve = [figures[f"cnbpt_{name}{ending}_{length}s"] for length in lengths]
            label = name.replace("_", " ")
            axes.plot([*map(float, lengths)], curve, marker="o", color=COLORS[name], label=label)
        axes.set_xticks([*map(float, lengths)], lengths)
    for name, (cnbpt, *_) in PAPER.items():
        label = f"paper, 30 s, {name.replace('_', ' ')}: {cnbpt}"
        whole.axhline(cnbpt, linestyle="--", linewidth=1, color=COLORS[name], label=label)
    measure = "cnBPT (bits per token / log2 of the codebook size)"
    _label(whole, "Whole windows of that length", "context (s)", measure)
    title = f"The same frames: the last {float(lengths[0]) - PREFIX_SECONDS:g} s of the window"
    _label(last, title, "context (s)", measure)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"Predictability by length of context ({figures['windows']} windows; lower is better)")
    save_figure(figure, path)


def draw_codes(figures: Mapping[str, float], counts: Mapping[str, Tensor], path: Path) -> None:
    """Histogram of how often codes occur, sorted usage, utilization and normalized entropy by track."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    histogram, usage, shares = figure.subplots(1, 3)
    most = max(int(counts[track].max()) for track in TRACKS)
    edges = [0, *(2**power for power in range(most.bit_length() + 1))]  # 0, 1, 2-3, 4-7, ...
    for offset, track in zip((-0.2, 0.2), TRACKS, strict=True):
        style: dict[str, Any] = {"color": COLORS[track], "label": track}
        own = np.sort(counts[track].numpy())[::-1]
        codes, _ = np.histogram(own, edges)
        histogram.bar(np.arange(len(codes)) + offset, codes, 0.4, **style)
        ordered = own * len(own) / max(own.sum(), 1)
        ranks = 100 * (np.arange(len(own)) + 1) / len(own)
        usage.plot(ranks, np.where(ordered > 0, ordered, np.nan), linewidth=2, **style)
        values = [figures[f"{track}_{name}"] for name in ("utilization", "normalized_entropy")]
        places = np.arange(2) + offset
        bars = shares.bar(places, values, 0.36, **style)
        shares.bar_label(bars, fmt="%.3f", label_type="center", color="white", fontsize=9)
        shares.hlines(PAPER_USAGE[track], places - 0.18, places + 0.18, **_PAPER_STYLE)
    names = [f"{low}" if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    histogram.set_xticks(np.arange(len(names)), names, rotation=45, ha="right", fontsize=8)
    _label(histogram, "How often codes occur", "occurrences of a code", "codes")
    usage.axhline(1, color="gray", linewidth=1, label="all codes alike")
    usage.set_yscale("log")
    measure = "use (1 = a uniform share of the tokens)"
    _label(usage, "Sorted usage", "codes, most used first (% of the codebook)", measure)
    shares.plot([], [], "k--", linewidth=1.2, label="paper")
    shares.set_xticks((0, 1), ("utilization", "normalized entropy"))
    shares.set_ylim(0, 1.3)
    _label(shares, "Use of the codebook", y="share (0 to 1)")
    histogram.legend(fontsize=8)
    usage.legend(fontsize=8)
    shares.legend(fontsize=8, loc="upper center", ncols=3)
    figure.suptitle(f"Codes of the test items ({figures['vocal_tokens']:,} tokens per track)")
    save_figure(figure, path)


def draw_probe(figures: Mapping[str, float], path: Path) -> None:
    """Accuracy and macro ROC-AUC of every label by what the probe sees."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.subplots(2, len(INPUTS), sharex=True, sharey="row", squeeze=False)
    labels = [name.removesuffix("_classes") for name in figures if name.endswith("_classes")]
    tested = np.array([figures[f"{label}_test_recordings"] for label in labels])
    told = zip(labels, tested, strict=True)
    names = [f"{name}\n{figures[f'{name}_classes']} classes,\n{items} items" for name, items in told]
    for (share_axes, area_axes), seen in zip(grid.T, INPUTS, strict=True):
        keys = {method if method == "majority" else f"{seen}_{method}": method for method in METHODS}
        keys = {key: method for key, method in keys.items() if f"{labels[0]}_{key}_accuracy" in figures}
        width = 0.86 / len(keys)
        for number, (key, method) in enumerate(keys.items()):
            name, color = METHODS[method]
            at = np.arange(len(labels)) + (number - (len(keys) - 1) / 2) * width
            shares = np.array([figures[f"{label}_{key}_accuracy"] for label in labels])
            areas = [figures[f"{label}_{key}_macro_auc"] for label in labels]
            errors = np.sqrt(shares * (1 - shares) / tested)
            for axes, values, error in ((share_axes, shares, errors), (area_axes, areas, None)):
                bars = axes.bar(at, values, width, yerr=error, capsize=2, color=color, label=name)
                axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        share_axes.set_title(f"seen: {'both tracks' if seen == 'both' else seen}")
        area_axes.set_xticks(np.arange(len(labels)), names, fontsize=8)
        area_axes.axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    grid[0, 0].set_ylabel("accuracy (0 to 1; bars: standard error)")
    grid[1, 0].set_ylabel("macro ROC-AUC (0.5 = chance)")
    for axes in grid.flat:
        axes.set_ylim(0, 1.12)
        axes.grid(axis="y", alpha=0.3)
    handles, shown = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, shown, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"What frozen codes say about the music: learned from {figures['train_recordings']} training items, "
        f"tested on {figures['test_recordings']} items of other songs"
    )
    save_figure(figure, path)
