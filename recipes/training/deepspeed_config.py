"""A DeepSpeed config file beside a recipe: the recipe decides, and the file must not say otherwise."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.errors import ConfigError

if TYPE_CHECKING:
    from duotok.recipes.training.loop import TrainConfig

STAGES = (0, 1, 2, 3)
# What the loop does itself; the file may not bring its own.
OURS = {"optimizer": "the recipe's AdamW", "scheduler": "the recipe's warm-up and cosine"}
OTHER_PRECISIONS = ("fp16", "amp", "torch_autocast", "fp8")


def read_deepspeed_config(
    path: Path, config: "TrainConfig", *, precision: str, processes: int
) -> dict[str, Any]:
    """Return the settings of a file, completed from the recipe.

    What the recipe knows may be missing or "auto" in the file. Raises ConfigError in one line that names
    every contradiction. precision: accelerate's name, "bf16" or "no".
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path}: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"the DeepSpeed config {path} needs a section zero_optimization with a stage")
    stage = settings["zero_optimization"].get("stage")
    if stage not in STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    contradictions = [
        *_fill(settings, config, processes),
        *_fill_precision(settings, "bf16" if precision == "bf16" else "fp32"),
        *(f"remove {name}: training uses {ours}" for name, ours in OURS.items() if name in settings),
    ]
    if contradictions:
        raise ConfigError(f"the DeepSpeed config {path} contradicts the recipe: {'; '.join(contradictions)}")
    return settings


def _fill(settings: dict[str, Any], config: "TrainConfig", processes: int) -> list[str]:
    size = config.batch_size * config.accumulate
    recipe = {
        "train_micro_batch_size_per_gpu": ("train.batch_size", config.batch_size),
        "gradient_accumulation_steps": ("train.accumulate", config.accumulate),
        "gradient_clipping": ("train.gradient_clip", config.gradient_clip),
        "train_batch_size": ("train.batch_size x train.accumulate x processes", size * processes),
    }
    contradictions = []
    for key, (name, value) in recipe.items():
        if settings.get(key, "auto") not in ("auto", value):
            contradictions.append(f'{key} is {settings[key]!r}, {name} is {value} (write "auto")')
        settings[key] = value
    return contradictions


def _fill_precision(settings: dict[str, Any], precision: str) -> list[str]:
    contradictions = [
        f"{name} is on, train.precision is {precision}"
        for name in OTHER_PRECISIONS
        if _is_on(settings.get(name), precision="")
    ]
    wanted = precision == "bf16"
    if _is_on(settings.get("bf16", {"enabled": "auto"}), precision=precision) != wanted:
        told = settings["bf16"].get("enabled", False)
        contradictions.append(f'bf16.enabled is {told}, train.precision is {precision} (write "auto")')
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": wanted}
    return contradictions


def _is_on(section: dict[str, Any] | None, *, precision: str) -> bool:
    enabled = (section or {}).get("enabled", False)
    return precision == "bf16" if enabled == "auto" else bool(enabled)
