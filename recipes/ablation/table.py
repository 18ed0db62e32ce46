"""The ablations' figures next to the paper's tables 9 and 10 (P D), and what becomes of its claims.

Run: python -m duotok.recipes.ablation.table runs/ablation/table.json
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import read_json

TRACKS = ("vocal", "accompaniment")
RANKS = (1, 5, 10, 50)
ABSENT = "–"


def _paper_row(mel: str, vocal: str, accompaniment: str, average: str) -> dict[str, float]:
    row = {"average_cnbpt": float(average)}
    distances = iter(mel.split())
    for track, text in zip(TRACKS, (vocal, accompaniment), strict=True):
        row[f"{track}_mel_l1"], row[f"{track}_mel_l1_deviation"] = (
            float(next(distances)),
            float(next(distances)),
        )
        names = [*(f"{track}_acc_at_{k}" for k in RANKS), f"{track}_cnbpt"]
        row |= {name: float(value) for name, value in zip(names, text.split(), strict=True)}
    return row


# Mel distance and deviation per track (table 9); Acc@1, 5, 10, 50 and cnBPT per track, average (table 10).
PAPER = {
    "DuoTok": _paper_row(
        "0.240 0.026 0.219 0.030",
        "0.1433 0.3308 0.4345 0.6660 0.4607",
        "0.1077 0.2656 0.3596 0.6117 0.5057",
        "0.4832",
    ),
    "w/o MSS": _paper_row(
        "0.249 0.021 0.223 0.021",
        "0.1585 0.3553 0.4594 0.6853 0.4469",
        "0.1026 0.2546 0.3466 0.5988 0.5129",
        "0.4800",
    ),
    "w/o Noise": _paper_row(
        "0.248 0.018 0.219 0.020",
        "0.1087 0.2622 0.3530 0.5745 0.5148",
        "0.0794 0.2046 0.2838 0.5163 0.5599",
        "0.5374",
    ),
    "w/o Enc Freeze": _paper_row(
        "0.250 0.023 0.210 0.029",
        "0.0542 0.1552 0.2229 0.4342 0.6079",
        "0.0551 0.1555 0.2259 0.4502 0.5929",
        "0.6004",
    ),
}
# Codes of the paper's full recipe (table 11).
PAPER["DuoTok"] |= {
    "vocal_utilization": 0.9996,
    "vocal_normalized_entropy": 0.9188,
    "accompaniment_utilization": 0.9995,
    "accompaniment_normalized_entropy": 0.9494,
}


def describe(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return {"variants", "seed_spread_cnbpt", "claims"} of variants' figures, ready for JSON.

    A claim is the change of the average cnBPT against the full recipe of seed 0, paired over the same items,
    with its standard error over items, beside the paper's. The spread of the full recipe's seeds is what two
    equal recipes may differ by.
    """
    full = [row for row in rows if not any(row["variant"][part] for part in ("model", "stage2", "stage3"))]
    averages = [row["figures"]["average_cnbpt"] for row in full]
    spread = max(averages) - min(averages) if len(full) > 1 else None
    base = next((row for row in full if row["variant"]["seed"] == 0), None)
    claims = [_compare(row, base, spread) for row in rows if base is not None and row is not base]
    return {"variants": list(rows), "seed_spread_cnbpt": spread, "claims": claims}


def _compare(row: Mapping[str, Any], base: Mapping[str, Any], spread: float | None) -> dict[str, Any]:
    items = sorted(set(row["item_cnbpt"]) & set(base["item_cnbpt"]))
    changes = np.array([row["item_cnbpt"][item] - base["item_cnbpt"][item] for item in items])
    change = row["figures"]["average_cnbpt"] - base["figures"]["average_cnbpt"]
    error = float(changes.std(ddof=1) / len(changes) ** 0.5) if len(changes) > 1 else None
    claim = {"name": row["variant"]["name"], "change_cnbpt": change, "standard_error": error}
    paper = PAPER.get(row["variant"]["paper"] or "")
    if paper is None:
        return claim
    expected = paper["average_cnbpt"] - PAPER["DuoTok"]["average_cnbpt"]
    return claim | {
        "paper_change_cnbpt": round(expected, 4),
        "verdict": _judge(change, expected, error, spread),
    }


def _judge(change: float, expected: float, error: float | None, spread: float | None) -> str:
    noise = max(2 * (error or 0.0), spread or 0.0)
    if abs(change) <= noise:
        return "within the noise"
    return "as in the paper" if change * expected > 0 else "against the paper"


def render_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as Markdown, the paper's row under each variant that it has."""
    named: list[tuple[str, Mapping[str, float]]] = []
    for row in comparison["variants"]:
        named.append((row["variant"]["name"], row["figures"]))
        if row["variant"]["paper"] in PAPER:
            named.append((f"*paper: {row['variant']['paper']}*", PAPER[row["variant"]["paper"]]))
    heads = [f"{track} {name}" for track in TRACKS for name in (*(f"Acc@{k}" for k in RANKS), "cnBPT")]
    keys = [f"{track}_{name}" for track in TRACKS for name in (*(f"acc_at_{k}" for k in RANKS), "cnbpt")]
    codes = [f"{track}_{name}" for track in TRACKS for name in ("utilization", "normalized_entropy")]
    lines = ["Predictability: unconditional language model on held-out songs (P table 10).", ""]
    lines += _grid(named, [*heads, "average cnBPT"], [*keys, "average_cnbpt"], digits=4)
    lines += ["", "Reconstruction: log10-mel L1 read out of the codes, deviation over songs (P table 9).", ""]
    mel = [f"{track}_mel_l1{part}" for track in TRACKS for part in ("", "_deviation")]
    lines += _grid(named, ["vocal", "deviation", "accompaniment", "deviation"], mel, digits=3)
    lines += ["", "Use of the codes on held-out songs (P table 11).", ""]
    lines += _grid(named, [key.replace("_", " ") for key in codes], codes, digits=4)
    lines += ["", *_render_claims(comparison)]
    return "\n".join(lines)


def _render_claims(comparison: Mapping[str, Any]) -> list[str]:
    spread = comparison["seed_spread_cnbpt"]
    noise = "unknown: give the full recipe two seeds" if spread is None else f"{spread:.4f}"
    lines = [
        "Change of the average cnBPT against the full recipe, paired over songs; spread of the full recipe's "
        f"seeds {noise}.",
        "",
        "| variant | change | standard error | paper's change | |",
        "|---|---:|---:|---:|---|",
    ]
    for claim in comparison["claims"]:
        error = ABSENT if claim["standard_error"] is None else f"{claim['standard_error']:.4f}"
        expected = f"{claim['paper_change_cnbpt']:+.4f}" if "paper_change_cnbpt" in claim else ABSENT
        verdict = claim.get("verdict", "")
        lines.append(f"| {claim['name']} | {claim['change_cnbpt']:+.4f} | {error} | {expected} | {verdict} |")
    return lines


def _grid(
    rows: Sequence[tuple[str, Mapping[str, float]]], heads: Sequence[str], keys: Sequence[str], digits: int
) -> list[str]:
    """Markdown of the rows that have any of the figures."""
    lines = [f"| variant | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, figures in rows:
        if any(key in figures for key in keys):
            cells = [f"{figures[key]:.{digits}f}" if key in figures else ABSENT for key in keys]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Markdown of an ablation's table.json.")
    parser.add_argument("table", type=Path, help="table.json of duotok.recipes.ablation.run")
    arguments = parser.parse_args(argv)

    def show() -> None:
        comparison = read_json(arguments.table)
        if not isinstance(comparison, dict) or "variants" not in comparison:
            raise DataError(f"{arguments.table} is no table of ablations; give the one that run wrote")
        print(render_table(comparison))

    return guard(show)


if __name__ == "__main__":
    sys.exit(main())
