"""The measurements of the GPU check: each builds what it measures, of random weights and data."""

import contextlib
import functools
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track import sampling
from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective, count_loss_parts
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.lm.train import batch_flops
from duotok.recipes.renderer.train_diffusion import DiffusionLossConfig, DiffusionObjective
from duotok.recipes.training.log import read_log
from duotok.recipes.training.loop import choose_precision, prepared_blocks, run_training
from duotok.recipes.training.meter import measure_peak_flops
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.command import peak_memory_gb
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer, DuoTokenizerConfig
from duotok.tokenizer.objectives import DualCodebookObjective, LossWeights

ZERO2 = Path(__file__).parents[1] / "lm" / "deepspeed" / "zero2.json"
WARM_UP_STEPS = 2
# FLOP/s that makers state of dense products in bfloat16.
STATED_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured."""

    lm: DualTrackLMConfig
    small_lm: DualTrackLMConfig  # of the width of the shipped model, for generation
    tokenizer: DuoTokenizerConfig
    decoder: DiffusionDecoderConfig
    windows: int  # of a batch of the language model
    cuts: int  # of a batch of the tokenizer
    decoder_windows: int  # of a batch of the decoder
    seconds: float  # of windows, of what is generated, and, less a third, of cuts
    steps: int  # at most, that are timed
    song_seconds: float  # that the shipped bundle accompanies


_TINY_LM = DualTrackLMConfig(
    vocal_codes=64, accompaniment_codes=64, code_dim=8, embedding_dim=16, hidden_dim=32, layers=2, heads=2,
    key_value_heads=1, feed_forward_dim=64, gradient_checkpointing=True,
)  # fmt: skip
SIZES = {
    "base": Size(
        lm=DualTrackLMConfig(gradient_checkpointing=True),
        small_lm=DualTrackLMConfig(
            vocal_codes=3600, accompaniment_codes=1725, code_dim=32, embedding_dim=192, hidden_dim=256,
            layers=6, heads=4, key_value_heads=2, feed_forward_dim=704,
        ),
        tokenizer=DuoTokenizerConfig(),
        decoder=DiffusionDecoderConfig(),
        windows=8, cuts=16, decoder_windows=15, seconds=30.0, steps=12, song_seconds=60.0,
    ),
    "tiny": Size(
        lm=_TINY_LM,
        small_lm=_TINY_LM,
        tokenizer=DuoTokenizerConfig(
            mel_bands=16, dim=32, heads=2, feed_forward_dim=32, blocks=1, attention_window=4, code_dim=8,
            vocal_codes=64, accompaniment_codes=64, head_dim=8,
        ),
        decoder=DiffusionDecoderConfig(
            feature_dim=32, latent_dim=8, dim=32, heads=2, feed_forward_dim=32, blocks=1, condition_blocks=1
        ),
        windows=2, cuts=2, decoder_windows=2, seconds=1.2, steps=1, song_seconds=2.0,
    ),
}  # fmt: skip


def describe_device(size: Size, device: torch.device) -> Figures:
    """The GPU's name, and what its largest products reach."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else "CPU"
    found: Figures = {"name": name, "torch": torch.__version__, "precision": choose_precision("auto")}
    found["product_tflops"] = measure_peak_flops(device, found["precision"]) / 1e12
    found["flash_attention"] = find_spec("flash_attn") is not None
    if on_cuda:
        found["memory_gb"] = torch.cuda.get_device_properties(device).total_memory / 1e9
        found["cuda"] = torch.version.cuda
    return found


def measure_steps(
    objective: nn.Module, batch: dict[str, Tensor], steps: int, device: torch.device
) -> Figures:
    """Seconds of a training step as the loop takes it, and the peak memory in 10^9 bytes."""
    objective.to(device).train()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    in_bf16 = choose_precision("auto") == "bf16"
    seconds, loss = [], 0.0
    for _ in range(WARM_UP_STEPS + steps):
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
            total = objective(**batch)["total"]
        total.float().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = float(total.detach())  # waits for the device
        seconds.append(time.perf_counter() - start)
    on_cuda = device.type == "cuda"
    return {
        "parameters": sum(p.numel() for p in parameters),
        "loss": loss,
        "first_step_seconds": seconds[0],
        "seconds_per_step": float(np.median(seconds[WARM_UP_STEPS:])),
        "memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if on_cuda else peak_memory_gb(),
    }


def lm_batch(lm: DualTrackLM, size: Size) -> dict[str, Tensor]:
    """Random windows, the accompaniment from the vocal."""
    windows, frames = size.windows, round(25 * size.seconds)
    codes = {track: torch.randint(lm.codes_of(track).codes, (windows, frames)) for track in TRACKS}
    layout = lm.lay_out(codes, "vocal_to_accompaniment")
    weights = {
        "weight_vocal": torch.zeros(windows, frames),
        "weight_accompaniment": torch.ones(windows, frames),
    }
    targets = {f"target_{track}": each for track, each in codes.items()}
    return {**layout._replace(position=layout.position.contiguous()).tensors(), **targets, **weights}


def lm_objective(config: DualTrackLMConfig, size: Size, device: torch.device) -> LMObjective:
    """The objective, in the parts that the recipe would choose."""
    parts = count_loss_parts(size.windows * round(25 * size.seconds), config.accompaniment_codes)
    with device:  # a billion random numbers take long on a CPU
        return LMObjective(DualTrackLM(config), loss_parts=parts)


def train_lm(size: Size, device: torch.device, *, is_compiled: bool = False, flash: bool = False) -> Figures:
    """The language model's steps by one kernel of attention, compiled or not."""
    if flash and find_spec("flash_attn") is None:
        return {"left_out": "flash-attn is not installed"}
    objective = lm_objective(size.lm, size, device)
    batch = lm_batch(objective.lm, size)
    with contextlib.ExitStack() as stack:
        if not flash:
            never = patch("duotok.lm.dual_track.backbone.find_spec", return_value=None)
            stack.enter_context(never)
        stack.enter_context(prepared_blocks(objective, TrainConfig(compile=is_compiled)))
        figures = measure_steps(objective, batch, size.steps, device)
    tokens = batch["target_vocal"].numel() + batch["target_accompaniment"].numel()
    flops = batch_flops(objective.lm.config, batch) / figures["seconds_per_step"]
    figures |= {"tokens_per_second": tokens / figures["seconds_per_step"], "tflops": flops / 1e12}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        stated = next((each for model, each in STATED_FLOPS.items() if model in name), None)
        figures |= {} if stated is None else {"mfu": flops / stated}
    return figures


def train_decoder(size: Size, device: torch.device) -> Figures:
    """The diffusion decoder's steps, on features of a frozen tokenizer."""
    tokenizer, decoder = DuoTokenizer(size.tokenizer), DiffusionDecoder(size.decoder)
    objective = DiffusionObjective(decoder, tokenizer, "accompaniment", DiffusionLossConfig())
    windows, frames, context = size.decoder_windows, round(25 * size.seconds), 50
    codes = torch.randint(size.tokenizer.accompaniment_codes, (windows, frames + 2 * context))
    latents = torch.randn(windows, size.decoder.latent_dim, 2 * frames)
    batch = {"codes": codes, "offset": torch.full((windows,), context), "latents": latents}
    figures = measure_steps(objective, batch, size.steps, device)
    return figures | {"audio_seconds_per_second": windows * size.seconds / figures["seconds_per_step"]}


def train_tokenizer(size: Size, device: torch.device) -> Figures:
    """The tokenizer's steps of stage 3."""
    tokenizer = DuoTokenizer(size.tokenizer)
    objective = DualCodebookObjective(tokenizer, LossWeights())
    seconds = size.seconds * 2 / 3
    waves = 0.1 * torch.randn(size.cuts, round(25 * seconds) * HOP_SAMPLES)
    half = size.cuts // 2
    batch = {"vocal": waves[:half], "accompaniment": waves[half:], "kind": torch.ones(size.cuts).long()}
    batch |= {"text": torch.zeros(0, 1).long(), "text_span": torch.zeros(0, 3).long()}
    figures = measure_steps(objective, batch, size.steps, device)
    return figures | {"audio_seconds_per_second": size.cuts * seconds / figures["seconds_per_step"]}


def train_sharded(size: Size, device: torch.device) -> Figures:
    """Steps of the training loop itself under ZeRO 2, in a group of one process."""
    if find_spec("deepspeed") is None:
        return {"left_out": "deepspeed is not installed"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(port)
    # Fewer layers, for a checkpoint ends every run.
    config = replace(size.lm, layers=min(4, size.lm.layers))
    objective = lm_objective(config, size, device)
    batch = lm_batch(objective.lm, size)
    units = batch["target_vocal"].numel() + batch["target_accompaniment"].numel()
    task = Task(objective, lambda _: dict(batch), lambda folder: None, count_units=lambda _: units)
    settings = TrainConfig(steps=WARM_UP_STEPS + size.steps, log_every=1, workers=0, log_to="none")
    with tempfile.TemporaryDirectory() as folder:
        run_training(task, settings, Path(folder) / "run", deepspeed=ZERO2)
        rows = read_log(Path(folder) / "run")[WARM_UP_STEPS:]
    return {
        "backend": torch.distributed.get_backend(),
        "parameters": sum(p.numel() for p in objective.parameters()),
        "tokens_per_second": float(np.median([row["tokens_per_second"] for row in rows])),
        "memory_gb": rows[-1]["peak_memory_gb"],
    }


@contextlib.contextmanager
def without_graphs() -> Iterator[None]:
    """Take every step of sampling by its operators in place of a CUDA graph of them."""
    with patch.object(sampling, "_capture", lambda step, place: step):
        yield


def compose(size: Size, device: torch.device) -> Figures:
    """Seconds of music that models of both widths compose in a second, with CUDA graphs and without."""
    figures: Figures = {}
    for name, config in (("small", size.small_lm), ("base", size.lm)):
        lm = lm_objective(config, size, device).lm.eval()
        source = torch.randint(config.vocal_codes, (round(25 * size.seconds),))
        codes = {}
        for way in ("graphs", "operators") if device.type == "cuda" else ("operators",):
            with without_graphs() if way == "operators" else contextlib.nullcontext():
                seconds = []
                for _ in range(2):  # the first one sets libraries up
                    start = time.perf_counter()
                    codes[way] = lm.compose(source, seeds=[0], sampling=SamplingConfig()).codes
                    seconds.append(time.perf_counter() - start)
            figures[f"{name}_{way}_times_real_time"] = size.seconds / seconds[-1]
        if len(codes) == 2:
            figures[f"{name}_equal_codes"] = float((codes["graphs"] == codes["operators"]).float().mean())
    return figures


def generate(size: Size, device: torch.device) -> Figures:
    """Seconds of audio that the shipped bundle accompanies in a second, from wave to wave."""
    accompanist = Accompanist.from_pretrained(device=str(device))
    times = np.arange(round(size.song_seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    # Notes of half a second with a gap behind each, of a voice with three partials.
    scale = 220 * 2 ** (np.array([0, 2, 4, 5, 7, 5, 4, 2])[(times / 0.5).astype(int) % 8] / 12)
    phase = 2 * np.pi * np.cumsum(scale) / SAMPLE_RATE_HZ
    wave = sum(np.sin(k * phase) / k for k in range(1, 4)) * 0.1 * (times % 0.5 < 0.42)
    vocal = torch.from_numpy(np.asarray(wave)).float()[None]
    seconds = []
    for _ in range(2 if device.type == "cuda" else 1):
        start = time.perf_counter()
        accompanist.accompany(vocal, seed=0)
        seconds.append(time.perf_counter() - start)
    return {"times_real_time": size.song_seconds / seconds[-1], "first_call_seconds": seconds[0]}


MEASUREMENTS = {
    "device": describe_device,
    "lm_sdpa": train_lm,
    "lm_flash": functools.partial(train_lm, flash=True),
    "lm_compiled": functools.partial(train_lm, is_compiled=True),
    "decoder": train_decoder,
    "tokenizer": train_tokenizer,
    "zero2": train_sharded,
    "compose": compose,
    "generate": generate,
}
