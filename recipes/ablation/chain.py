"""The steps from a corpus to a variant's figures; each result is kept, named by all that it depends on."""

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from duotok.recipes.ablation.measure import measure_variant
from duotok.recipes.corpus.manifest import Item, read_manifest, write_manifest
from duotok.recipes.lm.tokenize import make_tokens
from duotok.recipes.tokenizer.train_text_model import write_text_model
from duotok.recipes.training.loop import run_training
from duotok.tokenizer.common.config import config_from_dict, config_to_dict, load_config
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import whole_file, write_json
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

STAGES = ("stage1", "stage2", "stage3", "lm")
ROUTES = "tracks."  # the weights that a variant's model may have otherwise
TEXT_PIECES = 400


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One recipe to compare: what it changes over the recipes of its size."""

    name: str  # its row in the table
    paper: str | None = None  # its row in the paper's tables 9 and 10
    seed: int = 0  # of stages 2 and 3 and the language model
    model: dict[str, Any] = field(default_factory=dict)  # settings of the tokenizer from stage 3 on
    stage2: dict[str, Any] = field(default_factory=dict)  # settings of the stage
    stage3: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is equal for all variants."""

    train: Path  # manifest of the songs that tokenizer and language model learn from
    held_out: Path  # manifest of the songs that are measured
    out: Path
    size: str = "small"  # names the recipes of all stages
    steps: dict[str, int] = field(default_factory=dict)  # per stage; others as in their recipes
    token_items: int = 400  # items whose tokens the language model learns from
    stage1: Path | None = None  # a trained tokenizer to start from, in place of a stage 1 of its own
    device: str = "cpu"  # of encoding and measuring; training finds its own

    def __post_init__(self) -> None:
        unknown = sorted(set(self.steps) - set(STAGES))
        if unknown:
            raise ConfigError(f"no stage {unknown[0]!r} to give steps to; stages are {', '.join(STAGES)}")
        if self.token_items < 1 or any(count < 1 for count in self.steps.values()):
            raise ConfigError("token items and steps must be at least 1")


class Chain:
    """Runs variants; what two of them have in common is made once, what is there is not made again."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.out = budget, budget.out
        # A corpus may grow while variants train: all of them see it as it was at the start.
        self.train = self._copy_manifest(budget.train)
        self.held_out = self._copy_manifest(budget.held_out)

    def run(self, variant: Variant) -> Path:
        """Bring a variant from the corpus to its figures; return their JSON file."""
        tokenizer = self.make_tokenizer(variant)
        tokens = self._make_tokens(tokenizer, self._choose_items())
        held_out = self._make_tokens(tokenizer, self.held_out)
        lm = self._train(
            "lm", {"tokenizer": str(tokenizer), "data": {"tokens": str(tokens)}}, {}, seed=variant.seed
        )
        settings = {"variant": config_to_dict(variant), "lm": lm.parent.name, "held_out": held_out.name}
        path = self.out / f"figures-{self._digest(settings)}.json"
        if not path.exists():
            found = measure_variant(
                tokenizer=tokenizer,
                lm=lm,
                tokens=held_out,
                manifest=self.held_out,
                seconds=self._lm_window_seconds(),
                device=self.budget.device,
            )
            write_json(path, {**settings, **found})
        return path

    def make_tokenizer(self, variant: Variant) -> Path:
        """Train a variant's stages; return the folder of its tokenizer."""
        data = {"data": {"manifest": str(self.train)}}
        start = self.budget.stage1
        if start is None:
            start = self._train("stage1", data, {}, seed=0)
        inputs = {"start_from": str(start), **data}
        if self._recipe("stage2").text is not None:
            inputs["text"] = str(self._make_text_model())
        start = self._train("stage2", inputs, variant.stage2, seed=variant.seed)
        if variant.model:
            start = self._change_model(start, variant)
        inputs = {"start_from": str(start), **data}
        return self._train("stage3", inputs, variant.stage3, seed=variant.seed)

    def _train(self, stage: str, inputs: Mapping[str, Any], changes: Mapping[str, Any], seed: int) -> Path:
        """Train a stage unless it is there; inputs are where things are, changes are the variant's."""
        config = self.settings(stage, inputs, changes, seed)
        settings = config_to_dict(config)
        folder = self.out / f"{stage}-{self._digest(settings)}"
        if not (folder / "final").exists():
            write_json(folder / "settings.json", settings)
            torch.manual_seed(seed)  # of new weights; the loop seeds itself
            run_training(self._module(stage).build(config), config.train, folder)
        return folder / "final"

    def settings(
        self, stage: str, inputs: Mapping[str, Any], changes: Mapping[str, Any], seed: int = 0
    ) -> Any:
        """Return the recipe of a stage with a variant's changes and the budget's steps."""
        train = {"seed": seed}
        if stage in self.budget.steps:
            train["steps"] = self.budget.steps[stage]
        return self._recipe(stage, [*_flatten(inputs), *_flatten(changes), *_flatten({"train": train})])

    def _module(self, stage: str) -> Any:
        return import_module(
            "duotok.recipes.lm.train" if stage == "lm" else f"duotok.recipes.tokenizer.{stage}"
        )

    def _recipe(self, stage: str, overrides: list[str] | None = None) -> Any:
        folder = Path(str(files("duotok.recipes"))) / ("ablation" if stage == "lm" else "tokenizer") / stage
        return load_config(self._module(stage).Config, folder / f"{self.budget.size}.yaml", overrides or [])

    def _lm_window_seconds(self) -> float:
        return max(seconds for seconds, _ in self._recipe("lm").data.windows)

    def _make_text_model(self) -> Path:
        def write(path: Path) -> None:
            write_text_model(self.train, path, TEXT_PIECES)

        return self._make_file(f"text-{self._digest(self.train.name)}.model", write)

    def _choose_items(self) -> Path:
        """Write the manifest of the items whose tokens are learned from, spread evenly over the corpus."""

        def write(path: Path) -> None:
            items = sorted(read_manifest(self.train), key=lambda item: item.id)
            count = min(self.budget.token_items, len(items))
            write_manifest(path, [items[number * len(items) // count] for number in range(count)])

        settings = [self.train.name, self.budget.token_items]
        return self._make_file(f"items-{self._digest(settings)}.jsonl", write)

    def _make_tokens(self, tokenizer: Path, manifest: Path) -> Path:
        """Encode a manifest's items; the folder counts once its mark is there."""
        folder = self.out / f"tokens-{self._digest([str(tokenizer), str(manifest)])}"
        mark = folder / "complete.json"
        if not mark.exists():
            arguments = Namespace(
                tokenizer=tokenizer,
                manifest=manifest,
                out=folder,
                batch=4,
                items_per_shard=64,
                device=self.budget.device,
            )
            write_json(mark, {"items": make_tokens(**vars(arguments))})
        return folder

    def _copy_manifest(self, manifest: Path) -> Path:
        def write(path: Path) -> None:
            items = read_manifest(manifest)
            if not items:
                raise DataError(f"{manifest} has no items")
            write_manifest(path, [_with_absolute_paths(item) for item in items])

        return self._make_file(f"{manifest.stem}-{self._digest(str(manifest.resolve()))}.jsonl", write)

    def _change_model(self, start: Path, variant: Variant) -> Path:
        """Write stage 2's tokenizer with other settings of the tracks' ways through the bottleneck."""
        settings = {"start": str(start), "model": variant.model, "seed": variant.seed}
        folder = self.out / f"changed-{self._digest(settings)}"
        if not folder.exists():
            torch.manual_seed(variant.seed)
            change_model(DuoTokenizer.from_pretrained(start), variant.model).save_pretrained(folder)
        return folder

    def _make_file(self, name: str, write: Callable[[Path], None]) -> Path:
        path = self.out / name
        if not path.exists():
            with whole_file(path) as temporary:
                write(temporary)
        return path

    def _digest(self, settings: Any) -> str:
        # The folder's own name does not count, so that it can be moved.
        text = json.dumps(settings, sort_keys=True).replace(json.dumps(str(self.out))[1:-1], "OUT")
        return hashlib.sha256(text.encode()).hexdigest()[:10]


def change_model(tokenizer: DuoTokenizer, changes: Mapping[str, Any]) -> DuoTokenizer:
    """Return a tokenizer with other settings and the same weights, the tracks' ways newly made."""
    settings = {**config_to_dict(tokenizer.config), **changes}
    model = DuoTokenizer(config_from_dict(DuoTokenizerConfig, settings, "model"))
    wanted = model.state_dict()
    kept = {name: tensor for name, tensor in tokenizer.state_dict().items() if not name.startswith(ROUTES)}
    foreign = [
        n for n in wanted if not n.startswith(ROUTES) and (n not in kept or kept[n].shape != wanted[n].shape)
    ]
    if foreign:
        raise ConfigError(f"model may only change the quantizers after stage 2, not {foreign[0]}")
    model.load_state_dict(wanted | kept)
    model.text = tokenizer.text
    return model


def _with_absolute_paths(item: Item) -> Item:
    """The item as a manifest in another folder can hold it."""
    stems = {stem: str(item.path(stem).resolve()) for stem in item.stems}
    return replace(item, stems=stems, mix=str(item.path("mix").resolve()))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Nested settings as the overrides "section.key=value" that a recipe takes."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found += _flatten(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value)}")
    return found
