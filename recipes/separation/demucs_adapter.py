"""Demucs (Defossez 2019; Rouard et al. 2023) by the `demucs` package from version 4.1 on.

A checkpoint is what that package publishes: safetensors whose metadata name the model's class and arguments.
Its older .th files are pickles and are not read; load one in a session of your own, by demucs itself, and
give the model to `save_demucs`.
"""

import json
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from demucs.apply import BagOfModels, apply_model  # pyright: ignore[reportMissingImports]
from demucs.hf import get_hf_model, load_safetensors_model  # pyright: ignore[reportMissingImports]
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from duotok.recipes.separation.stems import complete_stems, separate_in_pieces
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError

DEFAULT_MODEL = "htdemucs"
CLASSES = ("demucs.htdemucs.HTDemucs", "demucs.hdemucs.HDemucs", "demucs.demucs.Demucs")
SOURCES = {"vocals": "vocal", "drums": "drums", "bass": "bass"}  # any other source is part of our "other"
PIECE_SECONDS = 60
OVERLAP_SECONDS = 2


class DemucsSeparator:
    """A Demucs model as a separator; deterministic, for the random shifts are off."""

    name = "demucs"

    def __init__(self, checkpoint: str | None, device: str = "cpu") -> None:
        self.model = _load(checkpoint or DEFAULT_MODEL)
        self.device = device
        if self.model.audio_channels != 2 or "vocals" not in self.model.sources:
            raise ConfigError(
                f"{checkpoint} has no stereo source named vocals; give a music separation model"
            )

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] at 48 kHz -> four stems of the same shape that sum to it."""
        mono = wave.mean(dim=0)
        mean, deviation = float(mono.mean()), float(mono.std(correction=0)) + 1e-8
        stems = separate_in_pieces(
            wave,
            partial(self._separate_piece, mean=mean, deviation=deviation),
            piece=PIECE_SECONDS * SAMPLE_RATE_HZ,
            overlap=OVERLAP_SECONDS * SAMPLE_RATE_HZ,
        )
        wanted = [SOURCES[source] for source in self.model.sources if source in SOURCES]
        return complete_stems(wave, dict(zip(wanted, stems, strict=True)))

    @torch.no_grad()
    def _separate_piece(self, wave: Tensor, *, mean: float, deviation: float) -> Tensor:
        rate_hz = int(self.model.samplerate)
        mix = (resample(wave, SAMPLE_RATE_HZ, rate_hz) - mean) / deviation
        sources = apply_model(self.model, mix[None], shifts=0, split=True, device=self.device)[0]
        wanted = [index for index, source in enumerate(self.model.sources) if source in SOURCES]
        sources = sources[wanted].cpu() * deviation + mean
        return resample(sources, rate_hz, SAMPLE_RATE_HZ, samples=wave.shape[-1])


def save_demucs(model: torch.nn.Module, path: str | Path) -> None:
    """Write a Demucs model as the safetensors file that the package and this adapter read."""
    arguments, settings = model._init_args_kwargs  # type: ignore[misc]  # kept by demucs.states.capture_init
    kind = type(model)
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {
        "klass": f"{kind.__module__}.{kind.__qualname__}",
        "args": json.dumps(arguments, default=_encode),
        "kwargs": json.dumps(settings, default=_encode),
    }
    save_file(state, str(path), metadata=metadata)


def _encode(value: Any) -> Any:
    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    raise ConfigError(f"the model argument {value!r} cannot be stored as JSON")


def _load(checkpoint: str) -> Any:
    path = Path(checkpoint)
    try:
        if path.is_dir():
            model = _load_bag(path)
        elif path.is_file():
            model = _load_file(path)
        elif path.suffix or path.is_absolute() or checkpoint.startswith("."):
            raise ConfigError(
                f"{checkpoint} does not exist; give a .safetensors file or a hub name by --checkpoint"
            )
        else:
            model = get_hf_model(checkpoint)
    except (OSError, ValueError, KeyError, TypeError, HfHubHTTPError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"cannot load the Demucs model {checkpoint}: {reason}; give a .safetensors file by --checkpoint"
        ) from error
    return model.eval()


def _load_bag(folder: Path) -> BagOfModels:
    """A folder as the hub holds it: one YAML that lists the models, and one safetensors file for each."""
    descriptions = sorted(folder.glob("*.yaml"))
    if len(descriptions) != 1:
        raise ConfigError(f"{folder} must hold one YAML that lists its models, found {len(descriptions)}")
    bag = yaml.safe_load(descriptions[0].read_text(encoding="utf-8"))
    models = [_load_file(folder / f"{Path(str(name)).name}.safetensors") for name in bag["models"]]
    return BagOfModels(models, bag.get("weights"), bag.get("segment"))


def _load_file(path: Path) -> Any:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file; pickled checkpoints are not read")
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
    # The package imports whatever class the metadata name; only its own may be named.
    if metadata.get("klass") not in CLASSES or "structure" in metadata:
        raise ConfigError(f"{path} does not say it is a Demucs model; it needs the package's own metadata")
    return load_safetensors_model(path)
