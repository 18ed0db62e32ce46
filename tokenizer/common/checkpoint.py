"""A component on disk: config.json and model.safetensors (in shards above 15 MB). Never pickle."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .config import config_to_dict
from .errors import CheckpointError
from .files import whole_folder, write_json, write_tensors

FORMAT = 1
SHARD_BYTES = 15_000_000


def save_component(
    folder: str | Path,
    model: nn.Module,
    config: Any,
    *,
    kind: str,
    extra: dict[str, Any] | None = None,
    half: bool = False,
) -> str:
    """Write a component folder and return its fingerprint; the folder appears only when it is whole.

    half: store floating-point weights as float16. The fingerprint is the SHA-256 of what is stored.
    """
    folder = Path(folder)
    state = {name: _storable(tensor, half) for name, tensor in model.state_dict().items()}
    fingerprint = _fingerprint(state)
    description = {
        "kind": kind,
        "format": FORMAT,
        "fingerprint": fingerprint,
        "config": config_to_dict(config),
        "extra": extra or {},
    }
    with whole_folder(folder) as temporary:
        _write_shards(temporary, state)
        write_json(temporary / "config.json", description, indent=2)
    return fingerprint


def load_component(
    folder: str | Path, kind: str, build: Callable[[dict[str, Any]], nn.Module]
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a component folder: the model (CPU, eval, float32, strict) and its whole config.json.

    build makes the empty model from the stored config mapping. Raises CheckpointError in one line when
    anything is missing, damaged, of another kind or of another format.
    """
    folder = Path(folder)
    description = read_description(folder, kind)
    model = build(description["config"])
    state = {name: t.float() if t.is_floating_point() else t for name, t in _read_shards(folder).items()}
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the weights in {folder} do not fit its config.json: {reason}") from error
    return model.eval(), description


def read_description(folder: str | Path, *kinds: str) -> dict[str, Any]:
    """Return the checked config.json of a component folder, which must be of one of the kinds."""
    wanted = " or ".join(kinds)
    path = Path(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing or unreadable; give a complete {wanted} folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON; the {wanted} folder is damaged") from error
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise CheckpointError(f"{path} holds no config; the {wanted} folder is damaged")
    if description.get("kind") not in kinds:
        raise CheckpointError(f"{folder} holds a {description.get('kind')!r}, but a {wanted!r} is needed")
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {description.get('format')!r}, this version reads {FORMAT}; upgrade duotok"
        )
    return description


def _storable(tensor: Tensor, half: bool) -> Tensor:
    tensor = tensor.detach().cpu()
    if half and tensor.is_floating_point():
        tensor = tensor.to(torch.float16)
    return tensor.contiguous().clone()


def _fingerprint(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_shards(folder: Path, state: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        tensor_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + tensor_bytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor_bytes
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file_name, shard)
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _read_shards(folder: Path) -> dict[str, Tensor]:
    index_path = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index_path.exists():
        try:
            names = sorted(set(json.loads(index_path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index_path} is damaged; get the folder again") from error
    state: dict[str, Tensor] = {}
    for name in names:
        # A name from the index must stay inside the folder.
        path = folder / Path(str(name)).name
        try:
            state.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing or damaged; get the folder again") from error
    return state
