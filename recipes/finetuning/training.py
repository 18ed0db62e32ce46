"""From the tokens of a person's songs to the new model and its report."""

import shutil
from pathlib import Path
from typing import Any

import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.accompany.bundle import Bundle
from duotok.recipes.corpus.song_records import check_settings
from duotok.recipes.finetuning.held_out import LossMeter, choose_held_out
from duotok.recipes.finetuning.learning import learn, open_windows
from duotok.recipes.finetuning.listening import Listened
from duotok.recipes.finetuning.low_rank import add_adapters, merge_adapters
from duotok.recipes.finetuning.result import write_model, write_report
from duotok.recipes.finetuning.settings import FinetuneSettings
from duotok.recipes.lm.tokens import TokenShards, TokenSong
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.json_files import read_json, write_json


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
    write_report(out, report)
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
