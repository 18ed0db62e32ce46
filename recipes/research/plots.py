"""Pictures of the diagnostics, one PNG file each; dashed lines are the paper's numbers."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from duotok.lm.metrics import normalized_entropy, utilization
from duotok.recipes.evaluation.lm_part import PAPER, RANKS, ContextScaling, Predictability
from duotok.recipes.evaluation.quality_report import COLORS, save_figure
from duotok.recipes.research.code_usage import PAPER_USAGE, CodeUsage
from duotok.recipes.research.corruption import PAPER_MISMATCH_PERCENT, SCOPES, Corruption
from duotok.recipes.research.probe import MAJORITY, METHODS, ProbeResult
from duotok.recipes.research.probe_data import INPUTS, ProbeScores
from duotok.tokenizer.model import TRACKS

SCOPE_NAMES = {"whole": "whole window after a 2 s prefix", "first_5s": "first 5 s, no prefix"}
METHOD_NAMES = {
    "majority": "no input (training shares)",
    "mel_linear": "mel statistics, linear",
    "codes_linear": "code vectors, linear",
    "codes_conformer": "code vectors, Conformer",
}
METHOD_COLORS = {
    "majority": "#bbbbbb",
    "mel_linear": "#e0b04a",
    "codes_linear": "#7fb3c8",
    "codes_conformer": "#1f6f8b",
}


def draw_predictability(found: Predictability, path: Path) -> None:
    """cnBPT and enBPT, Acc@k, and the rates per second, by mode."""
    figure = Figure(figsize=(14, 4.8), layout="constrained")
    bits, accuracy, rates = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    values = found.figures()
    series = [name.removeprefix("cnbpt_") for name in values if name.removeprefix("cnbpt_") in COLORS]
    names = [name.replace("_to_", " to\n").replace("_", "\n") for name in series]
    for offset, kind, hatch in ((-0.2, "cnbpt", ""), (0.2, "enbpt", "//")):
        places = np.arange(len(series)) + offset
        heights = [values[f"{kind}_{name}"] for name in series]
        colors = [COLORS[name] for name in series]
        bars = bits.bar(places, heights, 0.38, color=colors, hatch=hatch, edgecolor="white")
        bits.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
        bits.bar([0], [0], color="gray", hatch=hatch, edgecolor="white", label=kind.replace("bpt", "BPT"))
        for place, name in zip(places, series, strict=True):
            if f"{kind}_{name}" in PAPER:
                paper = PAPER[f"{kind}_{name}"]
                bits.hlines(paper, place - 0.19, place + 0.19, colors="black", linestyles="--", linewidth=1.2)
    bits.plot([], [], "k--", linewidth=1.2, label="paper")
    bits.axhline(1, color="gray", linewidth=0.8)
    bits.set_xticks(np.arange(len(series)), names, fontsize=8)
    bits.set_ylabel("bits per token, normalized (1 = a uniform guess)")
    bits.set_title("Predictability, lower is better")
    for name in series:
        curve = [values[f"acc_at_{k}_{name}"] for k in RANKS]
        accuracy.plot(RANKS, curve, marker="o", color=COLORS[name], label=name.replace("_", " "))
        known = {k: PAPER[key] for k in RANKS if (key := f"acc_at_{k}_{name}") in PAPER}
        accuracy.plot(list(known), list(known.values()), "x--", color=COLORS[name], linewidth=1)
    accuracy.plot([], [], "kx--", linewidth=1, label="paper")
    accuracy.set_xscale("log")
    accuracy.set_xticks(RANKS, [str(k) for k in RANKS])
    accuracy.minorticks_off()
    accuracy.set_xlabel("k")
    accuracy.set_ylabel("Acc@k")
    accuracy.set_title("The right code among the k likeliest")
    kbps = [values["index_kbps"], values["model_kbps_unconditional"]]
    bars = rates.bar(["fixed-length\nindices", "under the\nmodel"], kbps, color=["#999999", "#1f6f8b"])
    rates.bar_label(bars, fmt="%.3f", padding=2)
    rates.set_ylabel("kbit per second, both tracks")
    rates.set_title(f"{values['token_rate_hz']:g} tokens/s, cnBPS {values['cnbps_unconditional']:.1f}")
    for axes in (bits, accuracy, rates):
        axes.grid(alpha=0.3)
    bits.set_ylim(0, 1.25)
    bits.legend(fontsize=8, loc="upper right", ncols=3)
    accuracy.legend(fontsize=8)
    figure.suptitle(f"How predictable the codes are ({found.windows} windows of {found.seconds:g} s)")
    save_figure(figure, path)


def draw_corruption(found: Corruption, path: Path) -> None:
    """Cost by shift, by share hidden, and of another song's vocal."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    shift, mask, mismatch = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    mask.sharey(shift)  # the paper's mismatch, drawn beside them, would flatten these two
    for scope in SCOPES:
        for axes, curve, scale in ((shift, found.shifts, 1.0), (mask, found.masks, 100.0)):
            amounts = np.array(sorted(curve))
            axes.errorbar(
                scale * amounts,
                [curve[amount][scope].percent for amount in amounts],
                yerr=[curve[amount][scope].error_percent for amount in amounts],
                marker="o",
                capsize=3,
                color=COLORS[scope],
                label=SCOPE_NAMES[scope],
            )
    shift.set_xscale("log")
    shift.set_xticks(sorted(found.shifts), [f"{seconds:g}" for seconds in sorted(found.shifts)])
    shift.minorticks_off()
    shift.set_xlabel("vocal moved by (s)")
    shift.set_ylabel("cost: rise of the loss (%)")
    shift.set_title("Shifted in time")
    mask.set_xlabel("vocal frames hidden (%)")
    mask.set_title("Hidden in part")
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
    mismatch.legend(loc="best", fontsize=8)
    mismatch.set_ylabel("cost (%)")
    mismatch.set_title("Another song's vocal")
    for axes in (shift, mask, mismatch):
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(alpha=0.3)
    shift.legend(loc="best", fontsize=8)
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
        lengths: list[float] = []
        for name, curve in curves.items():
            lengths = sorted(curve)
            axes.plot(
                lengths,
                [curve[length] for length in lengths],
                marker="o",
                color=COLORS[name],
                label=name.replace("_", " "),
            )
        axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
        axes.set_xlabel("context (s)")
        axes.set_ylabel("cnBPT (bits per token / log2 of the codebook size)")
        axes.grid(alpha=0.3)
    for name in ("unconditional_vocal", "unconditional_accompaniment", "vocal_to_accompaniment"):
        value = PAPER[f"cnbpt_{name}"]
        label = f"paper, 30 s, {name.replace('_', ' ')}: {value}"
        whole.axhline(value, linestyle="--", linewidth=1, color=COLORS[name], label=label)
    whole.set_title("Whole windows of that length")
    last.set_title(f"The same frames: the last {found.last_seconds:g} s of the window")
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
        counts = found[track].counts.numpy()
        codes, _ = np.histogram(counts, edges)
        histogram.bar(np.arange(len(codes)) + offset, codes, 0.4, color=COLORS[track], label=track)
        ordered = found[track].sorted_shares() * len(counts)
        ranks = 100 * (np.arange(len(counts)) + 1) / len(counts)
        usage.plot(
            ranks, np.where(ordered > 0, ordered, np.nan), color=COLORS[track], linewidth=2, label=track
        )
    names = [f"{low}" if high - low == 1 else f"{low}-{high - 1}" for low, high in pairwise(edges)]
    histogram.set_xticks(np.arange(len(names)), names, rotation=45, ha="right", fontsize=8)
    histogram.set_xlabel("occurrences of a code")
    histogram.set_ylabel("codes")
    histogram.set_title("How often codes occur")
    usage.axhline(1, color="gray", linewidth=1, label="all codes alike")
    usage.set_yscale("log")
    usage.set_xlabel("codes, most used first (% of the codebook)")
    usage.set_ylabel("use (1 = a uniform share of the tokens)")
    usage.set_title("Sorted usage")
    values = {track: (utilization(c := found[track].counts), normalized_entropy(c)) for track in TRACKS}
    for offset, track in zip((-0.2, 0.2), TRACKS, strict=True):
        places = np.arange(2) + offset
        bars = shares.bar(places, values[track], 0.36, color=COLORS[track], label=track)
        shares.bar_label(bars, fmt="%.3f", label_type="center", color="white", fontsize=9)
        for place, value in zip(places, PAPER_USAGE[track], strict=True):
            shares.hlines(value, place - 0.18, place + 0.18, colors="black", linestyles="--", linewidth=1.2)
    shares.plot([], [], "k--", linewidth=1.2, label="paper")
    shares.set_xticks((0, 1), ("utilization", "normalized entropy"))
    shares.set_ylim(0, 1.3)
    shares.set_ylabel("share (0 to 1)")
    shares.set_title("Use of the codebook")
    for axes in (histogram, usage, shares):
        axes.grid(alpha=0.3)
    for axes in (histogram, usage):
        axes.legend(fontsize=8)
    shares.legend(fontsize=8, loc="upper center", ncols=3)
    figure.suptitle(f"Codes of the test items ({found['vocal'].tokens:,} tokens per track)")
    save_figure(figure, path)


def draw_probe(found: ProbeResult, path: Path) -> None:
    """Accuracy and macro ROC-AUC of every label by what the probe sees."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.subplots(2, len(INPUTS), sharex=True, sharey="row", squeeze=False)
    places = np.arange(len(found.labels))
    for column, seen in enumerate(INPUTS):
        keys = [MAJORITY, *((seen, method) for method in METHODS)]
        keys = [key for key in keys if any(key in found.scores[label.name] for label in found.labels)]
        width = 0.86 / len(keys)
        for number, key in enumerate(keys):
            scores = [found.scores[label.name][key] for label in found.labels]
            for axes, values, errors in (
                (grid[0, column], *_accuracies(scores)),
                (grid[1, column], [score.roc_auc for score in scores], None),
            ):
                bars = axes.bar(
                    places + (number - (len(keys) - 1) / 2) * width,
                    values,
                    width,
                    yerr=errors,
                    capsize=2,
                    color=METHOD_COLORS[key[1]],
                    label=METHOD_NAMES[key[1]],
                )
                axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        grid[0, column].set_title(f"seen: {'both tracks' if seen == 'both' else seen}")
        counts = [found.scores[label.name][MAJORITY].recordings for label in found.labels]
        names = [
            f"{label.name}\n{len(label.classes)} classes,\n{count} items"
            for label, count in zip(found.labels, counts, strict=True)
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


def _accuracies(scores: list[ProbeScores]) -> tuple[list[float], list[float]]:
    """Accuracies and their binomial standard errors."""
    values = [score.accuracy for score in scores]
    errors = [float(np.sqrt(score.accuracy * (1 - score.accuracy) / score.recordings)) for score in scores]
    return values, errors
