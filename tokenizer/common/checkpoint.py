"""A component, a model with a folder of its own: config.json and model.safetensors. Never pickle."""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .config import config_from_dict
from .errors import CheckpointError
from .files import read_json_mapping, whole_folder, write_json, write_tensors
from .hub import local_folder

FORMAT = 1
SHARD_BYTES = 15_000_000


def read_description(folder: str | Path, *kinds: str) -> dict[str, Any]:
    """Return the checked config.json of a component folder, which must be of one of the kinds."""
    wanted = " or ".join(kinds)
    path = Path(folder) / "config.json"
    description = read_json_mapping(path, f"{wanted} folder")
    for key, kind in (("config", dict), ("extra", dict), ("fingerprint", str)):
        if not isinstance(description.get(key), kind):
            raise CheckpointError(f"{path} holds no {key}; the {wanted} folder is damaged, get it again")
    if description.get("kind") not in kinds:
        raise CheckpointError(f"{folder} holds a {description.get('kind')!r}, but a {wanted!r} is needed")
    if description.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder} has format {description.get('format')!r}, this version reads {FORMAT}; upgrade duotok"
        )
    return description


@contextmanager
def _no_larger_than(stored: int, folder: Path) -> Iterator[None]:
    """Raise CheckpointError before a model with far more weights than stored fills the memory."""
    thread, largest, total = threading.get_ident(), 4 * stored + 1_000_000, 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal total
        if threading.get_ident() == thread and parameter is not None:
            total += parameter.numel()
            if total > largest:
                raise CheckpointError(
                    f"the config.json in {folder} asks for far more weights than the {stored} stored there; "
                    "get the folder again"
                )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def fingerprint_of(state: dict[str, Tensor]) -> str:
    """Return what names weights: the first 16 hex digits of their SHA-256."""
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
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def _read_shards(folder: Path) -> dict[str, Tensor]:
    names = ["model.safetensors"]
    index_path = folder / "model.safetensors.index.json"
    if index_path.exists():
        weight_map = read_json_mapping(index_path, "folder").get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise CheckpointError(f"{index_path} is damaged; get the folder again")
        names = sorted(set(weight_map.values()))
    state: dict[str, Tensor] = {}
    for name in names:
        path = folder / Path(name).name  # a name from the index must stay inside the folder
        try:
            state.update(load_file(path))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} is missing or damaged; get the folder again") from error
    return state


ConfigT = TypeVar("ConfigT")


class Component(nn.Module, Generic[ConfigT]):
    """A model that is written to a folder and read from it; its config is all that builds it."""

    KIND: ClassVar[str]  # what its config.json calls it
    CONFIG: ClassVar[type]  # dataclass ConfigT
    STORED: ClassVar[tuple[str, ...]] = ()  # attributes that go along in config.json

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        self.fingerprint: str | None = None  # of the weights as they were last written or read

    @property
    def known_as(self) -> str | None:
        """The name by which those that were trained on it know it: its fingerprint."""
        return self.fingerprint

    def save_pretrained(
        self, folder: str | Path, *, half: bool = False, extra: dict[str, Any] | None = None
    ) -> None:
        """Write the folder, which appears only when whole; the fingerprint is the SHA-256 of the weights.

        half: floating-point weights as float16; extra: goes along in config.json.
        """
        state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        if half:
            state = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
        state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
        self.fingerprint = fingerprint_of(state)
        description = {
            "kind": self.KIND,
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "config": asdict(cast(Any, self.config)),
            "extra": {**self._describe_extra(), **(extra or {})},
        }
        with whole_folder(Path(folder)) as temporary:
            _write_shards(temporary, state)
            write_json(temporary / "config.json", description, indent=2)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None) -> Self:
        """Read a folder, or "owner/name" of the hub at a revision (CPU, eval, float32).

        Raises CheckpointError where it is damaged, of another kind or cannot be fetched.
        """
        folder = local_folder(folder, revision)
        description = read_description(folder, cls.KIND)
        state = {n: t.float() if t.is_floating_point() else t for n, t in _read_shards(folder).items()}
        with _no_larger_than(sum(tensor.numel() for tensor in state.values()), folder):
            try:
                model = cls(config_from_dict(cls.CONFIG, description["config"], str(folder)))
            except (RuntimeError, MemoryError, ArithmeticError, TypeError, ValueError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
                raise CheckpointError(
                    f"no model can be built from {folder / 'config.json'} ({reason}); get the folder again"
                ) from error
        wanted, found = ({n: tuple(t.shape) for n, t in s.items()} for s in (model.state_dict(), state))
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise CheckpointError(
                    f"the weights in {folder} do not fit its config.json, which asks for {name} of shape "
                    f"{wanted.get(name)} where they have {found.get(name)}; get the folder again"
                )
        model.load_state_dict(state)
        model.fingerprint = description["fingerprint"]
        model._take_extra(description["extra"])
        return model.eval()

    def _describe_extra(self) -> dict[str, Any]:
        return {name: value for name in self.STORED if (value := getattr(self, name)) is not None}

    def _take_extra(self, extra: dict[str, Any]) -> None:
        for name in self.STORED:
            setattr(self, name, extra.get(name))


AnyComponent = TypeVar("AnyComponent", bound=Component[Any])


def open_component(folder: str | Path, family: Iterable[type[AnyComponent]]) -> AnyComponent:
    """Read a folder, or "owner/name[@revision]" of the hub (CPU, eval), as the class of its KIND.

    Raises CheckpointError where it is damaged, of none of these or cannot be fetched.
    """
    classes = {cls.KIND: cls for cls in family}
    folder = local_folder(folder)
    return classes[read_description(folder, *classes)["kind"]].from_pretrained(folder)
