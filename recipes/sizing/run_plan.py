"""What a full training run of the language model needs: batch, memory, time, music, disk, from its recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLMConfig
from duotok.recipes.sizing.dry_recipe import DryRecipe, LMRecipe
from duotok.recipes.sizing.flops import mean_flops_and_tokens, step_seconds
from duotok.recipes.sizing.memory import ZERO_STAGES, Activations, PartSize, StateBytes, state_bytes
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer

GIGA = 1e9
BYTES_PER_FRAME = 4 * len(TRACKS)  # int32 in the token shards


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines, and how well the run uses them."""

    devices: int
    devices_per_node: int = 8
    device_gb: float = 80.0
    reserved_share: float = 0.2  # of a device's memory: temporaries, buckets of communication, gaps
    peak_tflops: float  # of a device in the run's precision, dense
    mfu: float  # share of it that the run reaches
    zero: int = 1

    def __post_init__(self) -> None:
        if self.devices < 1 or self.devices_per_node < 1:
            raise ConfigError("--devices and --devices-per-node must be at least 1")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu must be above 0 and at most 1, got {self.mfu:g}")
        if self.device_gb <= 0 or self.peak_tflops <= 0:
            raise ConfigError("--device-gb and --peak-tflops must be above 0")
        if not 0 <= self.reserved_share < 1:
            raise ConfigError(f"--reserved must be at least 0 and below 1, got {self.reserved_share:g}")
        if self.zero not in ZERO_STAGES:
            raise ConfigError(f"--zero must be one of {', '.join(map(str, ZERO_STAGES))}, got {self.zero}")

    @property
    def nodes(self) -> int:
        """Machines, the last one perhaps not full."""
        return -(-self.devices // self.devices_per_node)

    @property
    def usable_gb(self) -> float:
        """Memory of a device for weights, optimizer and activations."""
        return self.device_gb * (1 - self.reserved_share)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The figures of a run; gb are 10^9 bytes, tokens are codes of either track."""

    recipe: str
    cluster: Cluster
    parts: Mapping[str, int]  # trained parameters
    states: Mapping[int, StateBytes]  # by ZeRO stage
    activations_gb: float  # of one micro-batch
    fixed_gb: float  # kept whatever the micro-batch
    micro_batch: int  # windows of the shortest length, per device
    accumulate: int  # micro-batches of a step
    recipe_steps: int
    tokens: float  # of the whole run
    tokens_per_step: float  # of all devices
    flops_per_token: float
    step_seconds: float
    checkpoint_gb: float
    export_gb: float
    checkpoint_minutes: float
    rate_hz: float
    windows: str
    bytes_per_value: int  # of weights and gradients on their way between devices

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(self.parts.values())

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.tokens / self.tokens_per_step))

    @property
    def tokens_per_second(self) -> float:
        """Speed of all devices together."""
        return self.tokens_per_step / self.step_seconds

    @property
    def days(self) -> float:
        """Time of the run's computing."""
        return self.steps * self.step_seconds / 86_400

    @property
    def hours_of_music(self) -> float:
        """Length of the windows that the run sees, repetitions included."""
        return self.tokens / (len(TRACKS) * self.rate_hz * 3600)

    @property
    def shard_gb(self) -> float:
        """Token shards of that much music."""
        return self.hours_of_music * 3600 * self.rate_hz * BYTES_PER_FRAME / GIGA

    @property
    def traffic_gb(self) -> float:
        """What a device sends in a step, and receives as well (ZeRO, arXiv 1910.02054, section 7).

        The gradients are added up and the new weights shared: 2 values per weight. ZeRO 2 adds up gradients
        in every micro-batch; ZeRO 3 gathers the weights twice in each as well.
        """
        values = {0: 2, 1: 2, 2: self.accumulate + 1, 3: 3 * self.accumulate}[self.cluster.zero]
        share = (self.cluster.devices - 1) / self.cluster.devices
        return share * values * self.bytes_per_value * self.parameters / GIGA

    @property
    def device_gb(self) -> float:
        """Memory of a device in a step."""
        return self.states[self.cluster.zero].total / GIGA + self.activations_gb + self.fixed_gb


def plan_run(
    recipe: DryRecipe,
    parts: Mapping[str, PartSize],
    activations: Activations,
    cluster: Cluster,
    *,
    precision: str,
    tokens: float | None = None,
) -> RunPlan:
    """Plan a run of so many tokens (None = as many steps as the recipe has).

    The micro-batch is the largest that fits and divides the recipe's batch per device and step.
    """
    if not isinstance(recipe, LMRecipe):
        raise ConfigError(f"{recipe.path} is no recipe of duotok.recipes.lm.train, which is what is planned")
    if tokens is not None and tokens <= 0:
        raise ConfigError("the run must have more than 0 tokens")
    train, data = recipe.train, recipe.config.data
    whole = sum(parts.values(), PartSize())
    averaged = train.ema_decay > 0
    states = {
        zero: state_bytes(whole, precision=precision, zero=zero, devices=cluster.devices, averaged=averaged)
        for zero in ZERO_STAGES
    }
    batch = train.batch_size * train.accumulate
    micro, kept = fit_micro_batch(batch, recipe, activations, states[cluster.zero], cluster)
    rate_hz = DuoTokenizer.frame_rate_hz
    flops, device_tokens = mean_flops_and_tokens(
        model_config(recipe),
        data,
        batch_size=micro,
        rate_hz=rate_hz,
        prompt_weight=recipe.config.prompt_weight,
    )
    accumulate = batch // micro
    tokens_per_step = device_tokens * accumulate * cluster.devices
    return RunPlan(
        recipe=str(recipe.path),
        cluster=cluster,
        parts={name: part.trainable for name, part in parts.items() if part.trainable},
        states=states,
        activations_gb=kept / GIGA,
        fixed_gb=activations.fixed / GIGA,
        micro_batch=micro,
        accumulate=accumulate,
        recipe_steps=train.steps,
        tokens=train.steps * tokens_per_step if tokens is None else tokens,
        tokens_per_step=tokens_per_step,
        flops_per_token=flops / device_tokens,
        step_seconds=accumulate * step_seconds(flops, mfu=cluster.mfu, peak_tflops=cluster.peak_tflops),
        checkpoint_gb=checkpoint_bytes(whole, precision, cluster.zero, averaged) / GIGA,
        export_gb=(4 * (whole.trainable + whole.frozen) + whole.buffer_bytes) / GIGA,
        checkpoint_minutes=train.checkpoint_minutes,
        rate_hz=rate_hz,
        windows=", ".join(f"{seconds:g} s" for seconds, _ in data.windows),
        # Without DeepSpeed weights and gradients are fp32 in any case.
        bytes_per_value=2 if precision == "bf16" and cluster.zero else 4,
    )


def fit_micro_batch(
    batch: int, recipe: LMRecipe, activations: Activations, state: StateBytes, cluster: Cluster
) -> tuple[int, float]:
    """Return the largest divisor of a device's batch that fits, and the bytes of its activations."""
    lengths = [seconds for seconds, _ in recipe.config.data.windows]
    free = cluster.usable_gb * GIGA - state.total - activations.fixed
    for micro in sorted((each for each in range(1, batch + 1) if batch % each == 0), reverse=True):
        longest = max(1, int(micro * min(lengths) // max(lengths)))  # windows of the longest length
        if longest * activations.per_example <= free:
            return micro, longest * activations.per_example
    needed = (state.total + activations.fixed + activations.per_example) / GIGA
    raise ConfigError(
        f"one window needs {needed:.1f} GB under ZeRO {cluster.zero}, {cluster.usable_gb:.1f} GB are usable; "
        f"raise --zero or --device-gb, or set model.gradient_checkpointing=true"
    )


def checkpoint_bytes(size: PartSize, precision: str, zero: int, averaged: bool) -> float:
    """Bytes of a checkpoint to resume from, of all devices together.

    Without DeepSpeed fp32 weights and two moments; under it the same as its state, weights of the run's
    precision and fp32 weights and moments. A moving average is 4 bytes more.
    """
    width = 4 if zero == 0 or precision == "fp32" else 2
    moments = 8 if zero == 0 else 12
    return (width + moments + (4 if averaged and zero == 0 else 0)) * size.trainable


def model_config(recipe: LMRecipe) -> DualTrackLMConfig:
    """Return the model that the recipe trains on its tokenizer."""
    tokenizer = recipe.tokenizer_config
    return replace(
        recipe.config.model,
        code_dim=tokenizer.code_dim,
        vocal_codes=tokenizer.vocal_codes,
        accompaniment_codes=tokenizer.accompaniment_codes,
    )
