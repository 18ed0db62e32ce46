"""Pictures of the diagnostics, one PNG file each; dashed lines are the paper's numbers."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duotok.recipes.evaluation.lm_part import PAPER, RANKS, ContextScaling, Predictability
from duotok.recipes.evaluation.quality_report import COLORS, save_figure
from duotok.recipes.research.diagnosis import SCOPES, CodeUsage, Corruption
from duotok.recipes.research.probe import MAJORITY, ProbeResult
from duotok.recipes.research.probe_training import INPUTS
from duotok.tokenizer.model import TRACKS

PAPER_MISMATCH_PERCENT = 17.3  # P 6.1, whole windows
# P table 11: DuoTok's utilization and normalized entropy.
PAPER_USAGE = {"vocal": (0.9996, 0.9188), "accompaniment": (0.9995, 0.9494)}
SCOPE_NAMES = {"whole": "whole window after a 2 s prefix", "first_5s": "first 5 s, no prefix"}
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


def draw_predictability(found: Predictability, path: Path) -> None:
    """cnBPT and enBPT, Acc@k, and the rates per second, by mode."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    bits, accuracy, rates = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    values = found.figures()
    series = [name.removeprefix("cnbpt_") for name in values if name.removeprefix("cnbpt_") in COLORS]
    for offset, kind, hatch in ((-0.2, "cnbpt", ""), (0.2, "enbpt", "//")):
        style: dict[str, Any] = {"hatch": hatch, "edgecolor": "white"}
        places = np.arange(len(series)) + offset
        heights = [values[f"{kind}_{name}"] for name in series]
        bars = bits.bar(places, heights, 0.38, color=[COLORS[name] for name in series], **style)
        bits.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        bits.bar([0], [0], color="gray", label=kind.replace("bpt", "BPT"), **style)
        for place, name in zip(places, series, strict=True):
            if f"{kind}_{name}" in PAPER:
                bits.hlines(PAPER[f"{kind}_{name}"], place - 0.19, place + 0.19, **_PAPER_STYLE)
    bits.plot([], [], "k--", linewidth=1.2, label="paper")
    bits.axhline(1, color="gray", linewidth=0.8)
    names = [name.replace("_to_", " to\n").replace("_", "\n") for name in series]
    bits.set_xticks(np.arange(len(series)), names, fontsize=8)
    bits.set_ylim(0, 1.25)
    _label(bits, "Predictability, lower is better", y="bits per token, normalized (1 = a uniform guess)")
    bits.legend(fontsize=8, loc="upper right", ncols=3)
    for name in series:
        curve = [values[f"acc_at_{k}_{name}"] for k in RANKS]
        accuracy.plot(RANKS, curve, marker="o", color=COLORS[name], label=name.replace("_", " "))
        known = {k: PAPER[key] for k in RANKS if (key := f"acc_at_{k}_{name}") in PAPER}
        accuracy.plot(list(known), list(known.values()), "x--", color=COLORS[name], linewidth=1)
    accuracy.plot([], [], "kx--", linewidth=1, label="paper")
    accuracy.set_xscale("log")
    accuracy.set_xticks(RANKS, [str(k) for k in RANKS])
    accuracy.minorticks_off()
    _label(accuracy, "The right code among the k likeliest", "k", "Acc@k")
    accuracy.legend(fontsize=8)
    kbps = [values["index_kbps"], values["model_kbps_unconditional"]]
    bars = rates.bar(["fixed-length\nindices", "under the\nmodel"], kbps, color=["#999999", "#1f6f8b"])
    rates.bar_label(bars, fmt="%.3f", padding=2)
    title = f"{values['token_rate_hz']:g} tokens/s, cnBPS {values['cnbps_unconditional']:.1f}"
    _label(rates, title, y="kbit per second, both tracks")
    figure.suptitle(f"How predictable the codes are ({found.windows} windows of {found.seconds:g} s)")
    save_figure(figure, path)


def draw_corruption(found: Corruption, path: Path) -> None:
    """Cost by shift, by share hidden, and of another song's vocal."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    shift, mask, mismatch = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    mask.sharey(shift)  # the paper's mismatch, drawn beside them, would flatten these two
    for scope in SCOPES:
        style: dict[str, Any] = {
            "color": COLORS[scope],
            "label": SCOPE_NAMES[scope],
            "marker": "o",
            "capsize": 3,
        }
        for axes, curve, scale in ((shift, found.shifts, 1.0), (mask, found.masks, 100.0)):
            amounts = sorted(curve)
            errors = [curve[amount][scope].error_percent for amount in amounts]
            percents = [curve[amount][scope].percent for amount in amounts]
            axes.errorbar(scale * np.array(amounts), percents, yerr=errors, **style)
    shift.set_xscale("log")
    shift.set_xticks(sorted(found.shifts), [f"{seconds:g}" for seconds in sorted(found.shifts)])
    shift.minorticks_off()
    costs = [found.mismatch[scope] for scope in SCOPES]
    bars = mismatch.bar(
        ["whole,\n2 s prefix", "first 5 s,\nno prefix"],
        [cost.percent for cost in costs],
        yerr=[cost.error_percent for cost in costs],
        capsize=4,
        color=[COLORS[scope] for scope in SCOPES],
    )
    mismatch.bar_label(bars, [f"{cost.percent:.1f} %" for cost in costs], padding=3)
    paper = f"paper: {PAPER_MISMATCH_PERCENT} %"
    mismatch.axhline(PAPER_MISMATCH_PERCENT, linestyle="--", linewidth=1.2, color="black", label=paper)
    _label(shift, "Shifted in time", "vocal moved by (s)", "cost: rise of the loss (%)")
    _label(mask, "Hidden in part", "vocal frames hidden (%)")
    _label(mismatch, "Another song's vocal", y="cost (%)")
    for axes in (shift, mask, mismatch):
        axes.axhline(0, color="black", linewidth=0.8)
    shift.legend(loc="best", fontsize=8)
    mismatch.legend(loc="best", fontsize=8)
    figure.suptitle(
        f"What a damaged vocal costs the accompaniment's prediction "
        f"({found.windows} windows of {found.seconds:g} s; bars: standard error)"
    )
    save_figure(figure, path)


def draw_context(found: ContextScaling, path: Path) -> None:
    """cnBPT by context, over whole windows and over the same frames."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    whole, last = figure.subplots(1, 2)
    for axes, curves in ((whole, found.whole), (last, found.last)):
        for name, curve in curves.items():
            lengths = sorted(curve)
            values = [curve[length] for length in lengths]
            axes.plot(lengths, values, marker="o", color=COLORS[name], label=name.replace("_", " "))
            axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    for name in ("unconditional_vocal", "unconditional_accompaniment", "vocal_to_accompaniment"):
        value = PAPER[f"cnbpt_{name}"]
        label = f"paper, 30 s, {name.replace('_', ' ')}: {value}"
        whole.axhline(value, linestyle="--", linewidth=1, color=COLORS[name], label=label)
    measure = "cnBPT (bits per token / log2 of the codebook size)"
    _label(whole, "Whole windows of that length", "context (s)", measure)
    title = f"The same frames: the last {found.last_seconds:g} s of the window"
    _label(last, title, "context (s)", measure)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"Predictability by length of context ({found.windows} windows; lower is better)")
    save_figure(figure, path)


def draw_codes(found: Mapping[str, CodeUsage], path: Path) -> None:
    """Histogram of how often codes occur, sorted usage, utilization and normalized entropy by track."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    histogram, usage, shares = figure.subplots(1, 3)
    most = max(int(found[track].counts.max()) for track in TRACKS)
    edges = [0, *(2**power for power in range(most.bit_length() + 1))]  # 0, 1, 2-3, 4-7, ...
    for offset, track in zip((-0.2, 0.2), TRACKS, strict=True):
        style: dict[str, Any] = {"color": COLORS[track], "label": track}
        counts, figures = found[track].counts.numpy(), found[track].figures()
        codes, _ = np.histogram(counts, edges)
        histogram.bar(np.arange(len(codes)) + offset, codes, 0.4, **style)
        ordered = found[track].sorted_shares() * len(counts)
        ranks = 100 * (np.arange(len(counts)) + 1) / len(counts)
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
    figure.suptitle(f"Codes of the test items ({found['vocal'].tokens:,} tokens per track)")
    save_figure(figure, path)


def draw_probe(found: ProbeResult, path: Path) -> None:
    """Accuracy and macro ROC-AUC of every label by what the probe sees."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.subplots(2, len(INPUTS), sharex=True, sharey="row", squeeze=False)
    places, tables = np.arange(len(found.labels)), [found.scores[label.name] for label in found.labels]
    for column, seen in enumerate(INPUTS):
        keys = [MAJORITY, *((seen, method) for method in METHODS)]
        keys = [key for key in keys if key in tables[0]]
        width = 0.86 / len(keys)
        for number, key in enumerate(keys):
            name, color = METHODS[key[1]]
            style: dict[str, Any] = {"capsize": 2, "color": color, "label": name}
            at = places + (number - (len(keys) - 1) / 2) * width
            share = np.array([table[key].accuracy for table in tables])
            errors = np.sqrt(share * (1 - share) / [table[key].recordings for table in tables])
            areas = [table[key].roc_auc for table in tables]
            for axes, values, error in ((grid[0, column], share, errors), (grid[1, column], areas, None)):
                bars = axes.bar(at, values, width, yerr=error, **style)
                axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        grid[0, column].set_title(f"seen: {'both tracks' if seen == 'both' else seen}")
        names = [
            f"{label.name}\n{len(label.classes)} classes,\n{table[MAJORITY].recordings} items"
            for label, table in zip(found.labels, tables, strict=True)
        ]
        grid[1, column].set_xticks(places, names, fontsize=8)
        grid[1, column].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    grid[0, 0].set_ylabel("accuracy (0 to 1; bars: standard error)")
    grid[1, 0].set_ylabel("macro ROC-AUC (0.5 = chance)")
    for axes in grid.flat:
        axes.set_ylim(0, 1.12)
        axes.grid(axis="y", alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"What frozen codes say about the music: learned from {found.train_recordings} training items, "
        f"tested on {found.test_recordings} items of other songs"
    )
    save_figure(figure, path)
