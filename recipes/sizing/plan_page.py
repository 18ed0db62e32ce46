"""The plan of a full run as a Markdown page."""

from duotok.recipes.sizing.run_plan import GIGA, RunPlan

CORPUS_HOURS = (10_000, 100_000)


def render_plan(plan: RunPlan, command: str, *, mfu_source: str) -> str:
    """The page: what to run, what it takes, and what was assumed."""
    cluster = plan.cluster
    title = plan.recipe.removesuffix(".yaml")
    lines = [
        f"# A full run of `{title}`",
        "",
        "Computed from the recipe, not by hand, by",
        "",
        f"    {command}",
        "",
        *_table(
            "model",
            [(f"parameters of {name}", f"{count:,}") for name, count in plan.parts.items()]
            + [
                ("parameters", f"**{plan.parameters:,}**"),
                ("FLOPs per token, forward and backward", f"{plan.flops_per_token:.3g}"),
                ("the same over parameters", f"{plan.flops_per_token / plan.parameters:.2f}"),
            ],
        ),
        *_table(
            "run",
            [
                (
                    f"devices of {cluster.device_gb:g} GB and {cluster.peak_tflops:g} TFLOP/s",
                    f"{cluster.devices} in {cluster.nodes} nodes",
                ),
                (f"windows of {plan.windows}, per device and micro-batch", f"{plan.micro_batch}"),
                ("micro-batches per step", f"{plan.accumulate}"),
                ("tokens per step", f"{plan.tokens_per_step:,.0f}"),
                ("steps", f"{plan.steps:,} (the recipe has {plan.recipe_steps:,})"),
                ("tokens", f"{plan.tokens:.4g} ({plan.tokens / plan.parameters:.1f} per parameter)"),
                ("seconds per step", f"{plan.step_seconds:.3f}"),
                ("tokens per second", f"{plan.tokens_per_second:,.0f}"),
                (
                    "sent by a device per step, and received",
                    f"{plan.traffic_gb:.2f} GB ({plan.traffic_gb / plan.step_seconds:.1f} GB/s)",
                ),
                ("**days**", f"**{plan.days:.2f}**"),
                ("device hours", f"{24 * plan.days * cluster.devices:,.0f}"),
            ],
        ),
        *_table(
            f"music at {plan.rate_hz:g} Hz x 2",
            [
                ("hours that the run sees, repetitions included", f"{plan.hours_of_music:,.0f}"),
                *(
                    (f"passes over a corpus of {hours:,} h", f"{plan.hours_of_music / hours:,.1f}")
                    for hours in CORPUS_HOURS
                ),
                ("token shards of as much as it sees", f"{plan.shard_gb:,.1f} GB"),
            ],
        ),
        *_memory_table(plan),
        *_table(
            "on disk",
            [
                ("checkpoint to resume from, all devices", f"{plan.checkpoint_gb:.1f} GB"),
                (
                    f"written every {plan.checkpoint_minutes:g} min, so often in all",
                    f"{24 * 60 * plan.days / max(plan.checkpoint_minutes, 1e-9):,.0f} times",
                ),
                ("the exported model", f"{plan.export_gb:.1f} GB"),
            ],
        ),
        "To train it so: "
        f"`--set train.batch_size={plan.micro_batch} --set train.accumulate={plan.accumulate} "
        f"--set train.steps={plan.steps}`"
        + (f" and `--deepspeed recipes/lm/deepspeed/zero{cluster.zero}.json`." if cluster.zero else "."),
        "",
        "## Assumptions",
        "",
        *(f"- {text}" for text in _assumptions(plan, mfu_source)),
        "",
    ]
    return "\n".join(lines)


def _table(name: str, rows: list[tuple[str, str]]) -> list[str]:
    return [f"| {name} | |", "|---|---:|", *(f"| {label} | {value} |" for label, value in rows), ""]


def _memory_table(plan: RunPlan) -> list[str]:
    lines = [
        "| GB per device | weights | gradients | optimizer | activations | in all |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    kept = plan.activations_gb + plan.fixed_gb
    for zero, state in plan.states.items():
        mark = "**" if zero == plan.cluster.zero else ""
        figures = (state.weights, state.gradients, state.optimizer + state.average)
        cells = [f"{value / GIGA:.2f}" for value in figures]
        whole = f"{mark}{state.total / GIGA + kept:.2f}{mark}"
        lines.append(f"| {mark}ZeRO {zero}{mark} | {' | '.join(cells)} | {kept:.2f} | {whole} |")
    return [*lines, ""]


def _assumptions(plan: RunPlan, mfu_source: str) -> list[str]:
    cluster = plan.cluster
    share = f"{100 * cluster.reserved_share:g} %"
    speed = (
        f"Speed: model-FLOPs utilization {cluster.mfu:.3g} ({mfu_source}) of {cluster.peak_tflops:g} TFLOP/s "
        "per device; seconds per step = FLOPs of the step / (utilization x peak). Communication is inside "
        "the utilization; saving, validation, restarts and lost nodes are not."
    )
    flops = (
        "FLOPs: 2abc for a product [a, b] x [b, c], forward once, backward once for each side with a "
        "gradient; attention over all pairs of steps; recomputation counts once (recipes/sizing/flops.py, "
        "tested against torch's FlopCounterMode); mean over the recipe's modes and window lengths."
    )
    tokens = (
        "A token is one code of one track; a window counts once, also where the vocal comes first as a "
        "prompt and the model sees twice as many steps."
    )
    activations = (
        "Activations: measured on this model at full width, one and two blocks deep, on short noise, and "
        f"scaled to its depth, length and micro-batch; {share} of a device stay free for temporaries, "
        "communication and gaps. The micro-batch is the largest divisor of the recipe's batch per device and "
        "step that fits."
    )
    return [
        speed,
        flops,
        tokens,
        "Weights, gradients and AdamW: ZeRO's formulas in 10^9 bytes (recipes/sizing/memory.py).",
        activations,
        "Traffic: one value per weight for each of adding up gradients, sharing new weights and, under ZeRO "
        "3, gathering weights; most of it can run beside the computing.",
    ]
