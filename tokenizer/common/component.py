"""A model with a folder of its own: config.json and model.safetensors."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from torch import nn

from .checkpoint import load_component, read_description, save_component
from .config import config_from_dict

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

    def save_pretrained(
        self, folder: str | Path, *, half: bool = False, extra: dict[str, Any] | None = None
    ) -> None:
        """Write the folder; half: floating-point weights as float16; extra: goes along in config.json."""
        extra = {**self._describe_extra(), **(extra or {})}
        self.fingerprint = save_component(folder, self, self.config, kind=self.KIND, extra=extra, half=half)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a folder (CPU, eval); raises CheckpointError where it is damaged or of another kind."""
        model, description = load_component(
            folder, cls.KIND, lambda config: cls(config_from_dict(cls.CONFIG, config, str(folder)))
        )
        assert isinstance(model, cls)
        model.fingerprint = description["fingerprint"]
        model._take_extra(description["extra"])
        return model

    def _describe_extra(self) -> dict[str, Any]:
        return {name: value for name in self.STORED if (value := getattr(self, name)) is not None}

    def _take_extra(self, extra: dict[str, Any]) -> None:
        for name in self.STORED:
            setattr(self, name, extra.get(name))


AnyComponent = TypeVar("AnyComponent", bound=Component[Any])


def read_kind(folder: str | Path, *kinds: str) -> str:
    """Return which of the kinds a component folder holds; raises CheckpointError if it is none of them."""
    return read_description(folder, *kinds)["kind"]


def open_component(folder: str | Path, family: Iterable[type[AnyComponent]]) -> AnyComponent:
    """Read a folder (CPU, eval) as the class of the family whose KIND its config.json names.

    The one way into a family of components: `open_vae` is this with the classes of all autoencoders.
    Raises CheckpointError in one line when the folder is damaged or of no kind of the family.
    """
    classes = {cls.KIND: cls for cls in family}
    return classes[read_kind(folder, *classes)].from_pretrained(folder)
