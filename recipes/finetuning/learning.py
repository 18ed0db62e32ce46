"""The learning: pieces of the shared training loop with a look at the held-out songs after each."""

import copy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.objective import LMObjective
from duotok.recipes.finetuning.held_out import LossMeter
from duotok.recipes.finetuning.settings import SHORTEST_SECONDS, FinetuneSettings
from duotok.recipes.lm.data import CodeDropout, DataConfig, WindowSource
from duotok.recipes.lm.sheets import SheetConfig, SheetSource
from duotok.recipes.lm.token_shards import TokenShards, TokenSong
from duotok.recipes.training.checkpoint import TrainingState
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.json_files import read_json, write_json

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


def open_windows(
    lm: DualTrackLM, shards: TokenShards, songs: list[TokenSong], batch_size: int
) -> WindowSource:
    """Return the random training windows of some songs; lengths that no song has are left out."""
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
    return WindowSource(chosen, config, lm, batch_size, sheets)


def learn(
    lm: DualTrackLM,
    windows: WindowSource,
    held_out: LossMeter | None,
    settings: FinetuneSettings,
    run: Path,
) -> Learned:
    """Train what requires a gradient in lm; go on from what the folder `run` holds.

    With held-out songs the weights of their lowest loss are kept, the ones before the first step included,
    and the training stops when it has not fallen for `patience` measurements.
    """
    train = train_config(settings)
    curve = Curve([(int(step), float(nats)) for step, nats in _read_curve(run)])
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
        _load_weights(objective, run)
    return Learned(
        steps=step,
        kept_step=curve.best_step if curve.points else step,
        stopped_early=not is_finished,
        seconds=seconds,
        curve=curve.points,
    )


def train_config(settings: FinetuneSettings) -> TrainConfig:
    """Return the settings of the loop."""
    return TrainConfig(
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.peak_learning_rate,
        warmup_steps=10,
        weight_decay=0.0 if settings.lora_rank is not None else 0.01,
        log_every=5,
        seed=settings.seed,
    )


def load_progress(objective: LMObjective, run: Path) -> tuple[int, float]:
    """Take up the weights of the run's checkpoint, if there is one; return its steps and seconds."""
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    state = TrainingState(objective, torch.optim.AdamW(trained), use_ema=False)
    state.load(run / "checkpoint")
    return state.step, state.elapsed_seconds


def _take_point(curve: Curve, step: int, nats: float, objective: LMObjective, run: Path) -> None:
    is_best = all(nats < known for _, known in curve.points)
    if is_best:
        trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        run.mkdir(parents=True, exist_ok=True)
        temporary = run / f".{_BEST}.part"
        save_file({name: p.detach().cpu().contiguous() for name, p in trained.items()}, temporary)
        temporary.replace(run / _BEST)
    # The point comes after its weights: the best of the curve is always there.
    curve.points.append((step, nats))
    write_json(run / _CURVE, curve.points)
    told = "" if step == 0 else ", the lowest so far" if is_best else ""
    tqdm.write(f"held-out loss after {step} steps: {nats:.4f} nats per token{told}", sys.stderr)


def _read_curve(run: Path) -> list[tuple[int, float]]:
    return read_json(run / _CURVE) if (run / _CURVE).exists() else []


@torch.no_grad()
def _load_weights(objective: LMObjective, run: Path) -> None:
    best = load_file(run / _BEST)
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(best[name])
