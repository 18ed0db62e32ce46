"""The learning: low-rank adapters (LoRA), the held-out loss, training in pieces with a look at that loss; and
the new model: an ordinary bundle, and finetune.json on how it was made.
"""

import copy
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import LMObjective, score_batch
from duotok.recipes.accompany.bundle import Bundle, assemble_bundle, read_bundle_description
from duotok.recipes.corpus.songs.maker import check_settings
from duotok.recipes.finetuning.finetune_settings import FEWEST_TO_HOLD_OUT, SHORTEST_SECONDS, FinetuneSettings
from duotok.recipes.finetuning.song_tokens import Listened
from duotok.recipes.lm.data import CodeDropout, DataConfig, WindowSource
from duotok.recipes.lm.sheets import SheetConfig, SheetSource
from duotok.recipes.lm.tokens import TokenShards, TokenSong
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.run_state import TrainingState
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_json, write_json, write_tensors

REPORT = "finetune.json"
WINDOW_SECONDS = 30.0  # of shorter songs the whole
MOST_WINDOWS = 16


def choose_held_out(names: Sequence[str], share: float) -> set[str]:
    """Return the songs not to learn from: a share of them, at least one of four or more, chosen by name.

    The choice goes by a hash of the name, so that adding a song seldom moves another one.
    """
    distinct = sorted(set(names), key=lambda name: sha256(f"held out:{name}".encode()).hexdigest())
    if share == 0 or len(distinct) < FEWEST_TO_HOLD_OUT:
        return set()
    return set(distinct[: max(1, round(share * len(distinct)))])


class LossMeter:
    """Measures the teacher-forced loss of the accompaniment given the vocal, without a prefix."""

    def __init__(
        self, shards: TokenShards, songs: Sequence[TokenSong], *, most_windows: int = MOST_WINDOWS
    ) -> None:
        """At most so many windows are chosen, spread evenly over the songs."""
        longest = round(WINDOW_SECONDS * shards.index.frame_rate_hz)
        windows = []
        for song in songs:
            frames = min(longest, song.frames)
            windows += [(song, start, frames) for start in range(0, song.frames - frames + 1, frames)]
        picked = np.linspace(0, len(windows) - 1, min(len(windows), most_windows)).round().astype(int)
        self._shards = shards
        self._windows = [windows[number] for number in picked]

    @torch.no_grad()
    def measure(self, lm: DualTrackLM) -> float:
        """Return the mean loss in nats per accompaniment token."""
        was_training = lm.training
        lm.eval()
        total, count = 0.0, 0
        for song, start, frames in self._windows:
            codes = self._shards.codes(song, start, frames)
            pair = (codes["vocal"][None], codes["accompaniment"][None])
            scores = score_batch(lm, *pair, "vocal_to_accompaniment")
            total += float(scores.loss_nats["accompaniment"].double().sum())
            count += frames
        lm.train(was_training)
        return total / count


TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA_PER_RANK = 2  # the adapters' update is scaled by alpha / rank, so that the rank leaves its size alone


def require_peft() -> None:
    """Raise ConfigError when peft is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--lora needs the package peft: pip install peft, or leave --lora out to train all weights"
        ) from error


def add_adapters(lm: DualTrackLM, rank: int, seed: int = 0) -> None:
    """Put an adapter on every linear layer of the backbone and freeze all other weights.

    The adapters start as no change at all. Raises ConfigError when peft is not installed.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=list(TARGETS))
    lm.requires_grad_(False)
    inject_adapter_in_model(config, lm.backbone)


@torch.no_grad()
def merge_adapters(lm: DualTrackLM) -> None:
    """Add the adapters into the weights and take them out: an ordinary model with the same logits."""
    from peft.tuners.lora import LoraLayer

    adapted = [(name, layer) for name, layer in lm.named_modules() if isinstance(layer, LoraLayer)]
    for name, layer in adapted:
        layer.merge()
        parent, _, attribute = name.rpartition(".")
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        setattr(lm.get_submodule(parent), attribute, base)
    lm.requires_grad_(True)
    if lm.sheet_reader is not None:
        lm.sheet_reader.requires_grad_(False)


# As the language model was first trained (recipes/lm/small.yaml), so that nothing it can do is unlearned.
WINDOWS = ((SHORTEST_SECONDS, 4.0), (10.0, 3.0), (30.0, 3.0))
PROMPT_WEIGHT = 0.5
_BEST = "best.safetensors"
_CURVE = "held_out.json"


@dataclass
class Curve:
    """The held-out losses so far, in nats, in the order of the steps."""

    points: list[tuple[int, float]] = field(default_factory=list)

    @property
    def best_step(self) -> int:
        """The step of the lowest loss, the first of equals."""
        return min(self.points, key=lambda point: point[1])[0]

    def has(self, step: int) -> bool:
        """Whether a step has been measured."""
        return any(step == known for known, _ in self.points)

    def is_over(self, patience: int) -> bool:
        """Whether so many measurements in a row have brought no new best."""
        steps = [step for step, _ in self.points]
        return bool(steps) and len(steps) - 1 - steps.index(self.best_step) >= patience


@dataclass(frozen=True, kw_only=True)
class Learned:
    """How the learning went; the model holds the kept weights."""

    steps: int  # taken
    kept_step: int  # whose weights are kept
    stopped_early: bool
    seconds: float  # of training
    curve: list[tuple[int, float]]  # step, held-out loss in nats; empty without held-out songs


def open_windows(lm: DualTrackLM, shards: TokenShards, songs: list[TokenSong], size: int) -> WindowSource:
    """Return batches of `size` random windows of some songs, of the lengths that any song has."""
    rate = shards.index.frame_rate_hz
    longest = max(song.frames for song in songs)
    config = DataConfig(
        tokens=str(shards.folder),
        windows=tuple(window for window in WINDOWS if round(window[0] * rate) <= longest),
        vocal_to_accompaniment=10.0,
        accompaniment_to_vocal=1.0,
        unconditional=1.0,
        song_starts=0.1,
        no_prefix=0.7,
        history_dropout=CodeDropout(probability=0.7, lowest=0.3, highest=1.0),
        source_code_dropout=CodeDropout(probability=0.3, lowest=0.1, highest=0.5),
    )
    chosen = TokenShards(shards.folder)
    chosen.index = replace(chosen.index, songs=list(songs))
    sheets = None
    if lm.sheet_reader is not None:
        sheets = SheetSource(chosen, SheetConfig(), copy.deepcopy(lm.sheet_reader))
    return WindowSource(chosen, config, lm, size, sheets)


def learn(
    lm: DualTrackLM, windows: WindowSource, held_out: LossMeter | None, settings: FinetuneSettings, run: Path
) -> Learned:
    """Train what requires a gradient in lm; go on from what the folder `run` holds.

    With held-out songs the weights of their lowest loss are kept, the ones before the first step included,
    and the training stops when it has not fallen for `patience` measurements.
    """
    train = TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.peak_learning_rate,
        warmup_steps=10,
        weight_decay=0.0 if settings.lora_rank is not None else 0.01,
        log_every=5,
        seed=settings.seed,
    )
    known = read_json(run / _CURVE) if (run / _CURVE).exists() else []
    curve = Curve([(int(step), float(nats)) for step, nats in known])
    is_finished = False

    def finish(_: Path) -> None:
        nonlocal is_finished
        is_finished = True

    every = settings.measure_every
    while True:
        # A new module each time: accelerate wraps the forward of the one it is given.
        objective = LMObjective(lm, PROMPT_WEIGHT)
        step, seconds = load_progress(objective, run)
        if held_out is not None and (step % every == 0 or is_finished) and not curve.has(step):
            _take_point(curve, step, held_out.measure(lm), objective, run)
        if is_finished or curve.is_over(settings.patience):
            break
        run_training(
            Task(objective=objective, make_batch=windows.make_batch, export=finish),
            train,
            run,
            minutes=settings.minutes,
            stop_after=None if held_out is None else every - step % every,
        )
    if held_out is not None:
        best = load_file(run / _BEST)
        with torch.no_grad():
            for name, parameter in _trained(objective).items():
                parameter.copy_(best[name])
    return Learned(
        steps=step,
        kept_step=curve.best_step if curve.points else step,
        stopped_early=not is_finished,
        seconds=seconds,
        curve=curve.points,
    )


def load_progress(objective: LMObjective, run: Path) -> tuple[int, float]:
    """Take up the weights of the run's checkpoint, if there is one; return its steps and seconds."""
    optimizer = torch.optim.AdamW(_trained(objective).values())
    state = TrainingState(objective, optimizer, use_ema=False)
    state.load(run / "checkpoint")
    return state.step, state.elapsed_seconds


def _take_point(curve: Curve, step: int, nats: float, objective: LMObjective, run: Path) -> None:
    is_best = all(nats < known for _, known in curve.points)
    if is_best:
        write_tensors(run / _BEST, _trained(objective))
    # The point comes after its weights: the best of the curve is always there.
    curve.points.append((step, nats))
    write_json(run / _CURVE, curve.points)
    told = "" if step == 0 else ", the lowest so far" if is_best else ""
    tqdm.write(f"held-out loss after {step} steps: {nats:.4f} nats per token{told}", sys.stderr)


def _trained(objective: LMObjective) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in objective.named_parameters() if parameter.requires_grad}


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
    optional = ("renderer/vocal", "separator", "score_reader")
    vocal_decoder, separator, score_reader = (source / name for name in optional)
    return assemble_bundle(
        out,
        tokenizer=source / "tokenizer",
        lm=folder,
        vae=source / "renderer" / "vae",
        accompaniment=source / "renderer" / "accompaniment",
        vocal_decoder=vocal_decoder if vocal_decoder.is_dir() else None,
        separator=separator if separator.is_dir() else None,
        score_reader=score_reader if score_reader.is_dir() else None,
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
    measured = run / "before.json"  # once per run folder, by the model that is started from
    if not measured.exists():
        write_json(measured, _measure(meters, lm))
    before = read_json(measured)
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
            group: {"songs": n, "loss_before_nats": before[group], "loss_after_nats": after[group]}
            for group, n in counts.items()
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


def _describe_songs(parts: list[TokenSong], away: set[str], rate_hz: float) -> list[dict[str, Any]]:
    seconds: dict[str, float] = {}
    for part in parts:
        seconds[part.song] = seconds.get(part.song, 0.0) + part.frames / rate_hz
    return [
        {"song": song, "seconds": round(length, 1), "held_out": song in away}
        for song, length in seconds.items()
    ]
