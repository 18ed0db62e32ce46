"""The fine-tuned model on disk: an ordinary bundle, and finetune.json that says how it was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.accompany.bundle import assemble_bundle, read_bundle_description
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json

REPORT = "finetune.json"


def require_free(out: Path) -> None:
    """Raise ConfigError when there is something in the place of the new model."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists already; give the name of a new folder by --out")


def is_half(component: Path) -> bool:
    """Whether the weights of a component folder are stored in 16 bits."""
    path = next(iter(sorted(component.glob("*.safetensors"))))
    with safe_open(path, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    return "F32" not in kinds


def write_model(
    out: Path, *, source: Path, lm: DualTrackLM, work: Path, name: str, provenance: Mapping[str, Any]
) -> Path:
    """Write the bundle `source` with another language model to `out`; lm's config.json has the provenance."""
    description = read_bundle_description(source)
    folder = work / "lm"
    lm.save_pretrained(folder, extra={"finetuned": dict(provenance)})
    vocal_decoder, separator = source / "renderer" / "vocal", source / "separator"
    return assemble_bundle(
        out,
        tokenizer=source / "tokenizer",
        lm=folder,
        vae=source / "renderer" / "vae",
        accompaniment=source / "renderer" / "accompaniment",
        vocal_decoder=vocal_decoder if vocal_decoder.is_dir() else None,
        separator=separator if separator.is_dir() else None,
        half=is_half(source / "lm"),
        name=name,
        defaults=description.get("defaults") or {},
    )


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write finetune.json into the model's folder."""
    write_json(out / REPORT, dict(report))
