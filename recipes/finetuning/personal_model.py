"""From the tokens of songs to the new model: an ordinary bundle, and finetune.json on how it was made."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.accompany.bundle import Bundle, assemble_bundle, read_bundle_description
from duotok.recipes.corpus.songs.maker import check_settings
from duotok.recipes.finetuning.finetune_settings import FinetuneSettings
from duotok.recipes.finetuning.learning import (
    LossMeter,
    add_adapters,
    choose_held_out,
    learn,
    merge_adapters,
    open_windows,
)
from duotok.recipes.finetuning.song_tokens import Listened
from duotok.recipes.lm.tokens import TokenShards, TokenSong
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_json, write_json

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


def train_model(
    bundle: Bundle,
    source: Path,
    listened: Listened,
    settings: FinetuneSettings,
    *,
    run: Path,
    out: Path,
    name: str,
    device: torch.device,
) -> dict[str, Any]:
    """Teach the bundle's language model the songs, write the new bundle to `out`, return its report.

    source: folder of the bundle; run: folder of what a later call goes on from, removed at the end.
    """
    if not listened.parts:
        reasons = "; ".join(f"{record.song}: {record.reason}" for record in listened.left_out[:3])
        raise DataError(f"none of the {len(listened.left_out)} songs can be learned: {reasons}")
    shards = TokenShards(listened.tokens)
    away = choose_held_out([part.song for part in listened.parts], settings.held_out_share)
    groups = {
        "learned": [part for part in listened.parts if part.song not in away],
        "held_out": [part for part in listened.parts if part.song in away],
    }
    counts = {group: len({part.song for part in parts}) for group, parts in groups.items()}
    lm = bundle.lm.to(device)
    if not isinstance(lm, DualTrackLM):
        raise ConfigError(f"{source} composes by a {lm.KIND!r}; fine-tuning is for dual-track models")
    method = settings.described()
    told = {
        "from_model": bundle.name,
        "from_fingerprint": bundle.fingerprint,
        "from_lm_fingerprint": lm.fingerprint,
        **method,
    }
    check_settings(run, {**told, "parts": [part.id for part in listened.parts]})
    meters = {group: LossMeter(shards, parts) if parts else None for group, parts in groups.items()}
    before = _measure_before(meters, lm, run)
    if settings.lora_rank is not None:
        add_adapters(lm, settings.lora_rank, settings.seed)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    windows = open_windows(lm, shards, groups["learned"], settings.batch_size)
    learned = learn(lm, windows, meters["held_out"], settings, run)
    if settings.lora_rank is not None:
        merge_adapters(lm)
    provenance = {**told, "songs": counts["learned"], "kept_step": learned.kept_step}
    write_model(out, source=source, lm=lm, work=run, name=name, provenance=provenance)
    # Measured as stored: 16 bits round the weights.
    after = _measure(meters, DualTrackLM.from_pretrained(out / "lm").to(device))
    report = {
        "name": name,
        **told,
        "trained_parameters": trained,
        "steps_taken": learned.steps,
        "kept_step": learned.kept_step,
        "stopped_early": learned.stopped_early,
        "training_seconds": round(learned.seconds, 1),
        **{
            group: {
                "songs": counts[group],
                "loss_before_nats": before[group],
                "loss_after_nats": after[group],
            }
            for group in meters
        },
        "held_out_curve": learned.curve,  # step, nats
        "songs": _describe_songs(listened.parts, away, shards.index.frame_rate_hz),
        "left_out": [{"song": record.song, "reason": record.reason} for record in listened.left_out],
    }
    write_json(out / REPORT, report)
    shutil.rmtree(run, ignore_errors=True)
    return report


def _measure(meters: dict[str, LossMeter | None], lm: DualTrackLM) -> dict[str, float | None]:
    return {group: meter and meter.measure(lm) for group, meter in meters.items()}


def _measure_before(
    meters: dict[str, LossMeter | None], lm: DualTrackLM, run: Path
) -> dict[str, float | None]:
    """The losses of the model that is started from, measured once per run folder."""
    path = run / "before.json"
    if not path.exists():
        write_json(path, _measure(meters, lm))
    return read_json(path)


def _describe_songs(parts: list[TokenSong], away: set[str], rate_hz: float) -> list[dict[str, Any]]:
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.song] = seconds.get(part.song, 0.0) + part.frames / rate_hz
    return [
        {"song": song, "seconds": round(length, 1), "held_out": song in away}
        for song, length in seconds.items()
    ]
