"""Band-split RoFormer (Lu et al. 2023) by the `BS-RoFormer` package.

A checkpoint is a folder, here or on the hub, with `model.safetensors` and `config.json` or `config.yaml`:

    model: {dim: 512, depth: 12, stereo: true, num_stems: 1, ...}   # arguments of bs_roformer.BSRoformer
    training: {instruments: [vocals, other], target_instrument: vocals}
    audio: {sample_rate: 44100, chunk_size: 352800}

which is how the published models are described. Their weights come as .ckpt pickles, which are not read:
load one where you trust it and write its mapping of tensors by `safetensors.torch.save_file`. Those of the
generation without value residuals are recognized by their names and give the same output in today's class.
"""

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from bs_roformer import BSRoformer  # pyright: ignore[reportMissingImports]
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from duotok.recipes.separation.stems import complete_stems, separate_in_pieces
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.hub import local_folder

CONFIG_FILES = ("config.json", "config.yaml", "config.yml")
WEIGHTS_FILE = "model.safetensors"
SOURCES = {"vocals": "vocal", "vocal": "vocal", "drums": "drums", "bass": "bass"}
CHUNK_SAMPLES = 352_800  # 8 s at 44.1 kHz, as the published models
_OLD_NAME = re.compile(r"(layers\.\d+\.\d+\.layers\.\d+\.[01]\.)(?!branch\.)")
_NO_RESIDUAL = -100.0  # the sigmoid of this is 0: the value residual is not mixed in


class RoFormerSeparator:
    """A band-split RoFormer as a separator; stems that it does not estimate are silent, the rest is other."""

    name = "bs-roformer"

    def __init__(self, checkpoint: str | None, device: str = "cpu") -> None:
        if checkpoint is None:
            raise ConfigError("the separator bs-roformer needs a folder or a hub id by --checkpoint")
        folder = _find_folder(checkpoint)
        config = _read_config(folder)
        self.device = device
        try:
            audio, training = config.get("audio", {}), config.get("training", {})
            self.rate_hz = int(audio.get("sample_rate", 44_100))
            self.chunk = int(audio.get("chunk_size", CHUNK_SAMPLES))
            target = training.get("target_instrument")
            self.sources = [str(name) for name in ([target] if target else training["instruments"])]
            self.model = _build(config["model"], folder / WEIGHTS_FILE).to(device)
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"the description of the RoFormer in {folder} is not complete: {reason}"
            ) from error
        if self.model.num_stems != len(self.sources) or not {"vocals", "vocal"} & set(self.sources):
            raise ConfigError(
                f"{folder}: num_stems is {self.model.num_stems}, the instruments are "
                f"{', '.join(self.sources)}; they must agree and name the vocals"
            )

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] at 48 kHz -> four stems of the same shape that sum to it."""
        piece = round(self.chunk * SAMPLE_RATE_HZ / self.rate_hz)
        stems = separate_in_pieces(wave, self._separate_piece, piece=piece, overlap=piece // 2)
        found = zip(self.sources, stems, strict=True)
        return complete_stems(wave, {SOURCES[name]: stem for name, stem in found if name in SOURCES})

    @torch.no_grad()
    def _separate_piece(self, wave: Tensor) -> Tensor:
        mix = resample(wave, SAMPLE_RATE_HZ, self.rate_hz)
        if not self.model.stereo:
            mix = mix.mean(dim=0, keepdim=True)
        # The model gives back whole STFT hops only: one more chunk length of silence, cut off again.
        samples = mix.shape[-1]
        hop = self.model.stft_kwargs["hop_length"]
        padded = functional.pad(mix, (0, max(self.chunk, samples) - samples + hop))
        estimate = self.model(padded[None].to(self.device)).cpu()
        stems = estimate.reshape(len(self.sources), -1, estimate.shape[-1])[..., :samples]
        stems = resample(stems, self.rate_hz, SAMPLE_RATE_HZ, samples=wave.shape[-1])
        return stems.expand(-1, 2, -1).clone()


def _find_folder(checkpoint: str) -> Path:
    path = Path(checkpoint)
    if path.is_file():
        raise ConfigError(f"{path} is a file; give the folder with {WEIGHTS_FILE} and {CONFIG_FILES[0]}")
    path = local_folder(checkpoint)
    if not path.is_dir():
        raise ConfigError(f"{checkpoint} is neither a folder nor a hub id of the form owner/name")
    if not (path / WEIGHTS_FILE).is_file():
        raise ConfigError(f"{path / WEIGHTS_FILE} is missing; pickled checkpoints must be converted first")
    return path


def _read_config(folder: Path) -> dict[str, Any]:
    found = [folder / name for name in CONFIG_FILES if (folder / name).is_file()]
    if not found:
        raise ConfigError(f"{folder} has no {CONFIG_FILES[0]}; it says how the model is built")
    try:
        config = yaml.load(found[0].read_text(encoding="utf-8"), _TupleLoader)  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{found[0]} is not valid: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{found[0]} must hold a mapping with the keys model, training and audio")
    return config


class _TupleLoader(yaml.SafeLoader):
    """The safe loader, and the one tag that the published descriptions use."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.YAMLError("!!python/tuple must hold a list")
    return tuple(loader.construct_sequence(node))


_TupleLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def _build(settings: Mapping[str, Any], weights: Path) -> BSRoformer:
    try:
        state = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{weights} is damaged; get it again") from error
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    is_old = any(_OLD_NAME.match(name) for name in state)
    if is_old:
        settings["num_residual_streams"] = 1
        state = {_OLD_NAME.sub(r"\1branch.", name): tensor for name, tensor in state.items()}
    known = inspect.signature(BSRoformer.__init__).parameters
    if unknown := [key for key, value in settings.items() if key not in known and value]:
        raise ConfigError(
            f"BSRoformer has no argument {unknown[0]!r}; this model needs another version of it"
        )
    model = BSRoformer(**{key: value for key, value in settings.items() if key in known})
    if is_old:
        for name, tensor in model.state_dict().items():
            if ".to_value_residual_mix." in name:
                state[name] = torch.full_like(tensor, _NO_RESIDUAL if name.endswith("bias") else 0.0)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(f"the weights in {weights.parent} do not fit its config: {reason}") from error
    return model.eval()
