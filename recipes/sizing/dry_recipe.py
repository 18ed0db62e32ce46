"""A recipe built without its data and without what it starts from: random weights, noise to train on."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import LMObjective
from duotok.recipes.lm.data import WindowSource
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.recipes.renderer.train_diffusion import DiffusionObjective
from duotok.recipes.sizing.stand_ins import write_noise_corpus, write_vocabulary
from duotok.recipes.tokenizer import stage1
from duotok.recipes.tokenizer.cuts import CutSampler
from duotok.recipes.training.loop import Task, TrainConfig
from duotok.renderer.diffusion import LATENTS_PER_FEATURE, DiffusionDecoder
from duotok.tokenizer.common.checkpoint import read_description
from duotok.tokenizer.common.config import config_from_dict, load_config
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig
from duotok.tokenizer.text import read_vocabulary

PAPER_TEXT_TOKENS = 119_547  # of bert-base-multilingual-cased (P 4.1)
RUN_LINE = re.compile(r"# Run: .*-m (duotok\.recipes\.[\w.]+)")


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of a recipe is built and fed."""

    blocks: int  # of each stack whose depth the recipe sets
    batch_size: int
    seconds: float  # of each example


class DryRecipe(ABC):
    """One recipe; its objective is the real one, at any scale."""

    def __init__(self, path: Path, module: Any, config: Any, text_tokens: int) -> None:
        self.path, self.module, self.config, self.text_tokens = path, module, config, text_tokens
        self.tokenizer_config = find_tokenizer_config(path, config)

    @property
    @abstractmethod
    def scale(self) -> Scale:
        """The scale that the recipe asks for, per device."""

    @property
    def train(self) -> TrainConfig:
        """Settings of the training loop."""
        return self.config.train

    @abstractmethod
    def make_task(self, scale: Scale, folder: Path) -> Task:
        """Return the training task at a scale; what it reads is written to folder first."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """Read back what the task exported."""

    def without_recomputation(self) -> "DryRecipe | None":
        """Return the recipe without gradient checkpointing; None where it has none."""
        return None

    def find_text(self, folder: Path) -> str | None:
        """Return the text tokenizer of stage 2 of this size, or a stand-in written to folder; None: none."""
        stage2 = open_sibling("stage2", self.path.name)
        text = getattr(self.config if hasattr(self.config, "text") else stage2, "text", None)
        if text is None or Path(text).exists():
            return text
        return str(write_vocabulary(folder / "text", self.text_tokens))

    def make_tokenizer(self, blocks: int, text: str | None) -> DuoTokenizer:
        """Return a new tokenizer of this depth, with a lyric head where there is a text tokenizer."""
        tokenizer = DuoTokenizer(replace(self.tokenizer_config, blocks=blocks))
        return tokenizer if text is None else tokenizer.with_heads(text=read_vocabulary(text), masks=False)


class StageRecipe(DryRecipe):
    """Stage 1, 2 or 3 of the tokenizer."""

    @property
    def scale(self) -> Scale:
        return Scale(
            blocks=self.tokenizer_config.blocks,
            batch_size=self.train.batch_size,
            seconds=self.config.data.seconds,
        )

    def make_task(self, scale: Scale, folder: Path) -> Task:
        manifest = write_noise_corpus(folder, seconds=scale.seconds)
        config = replace(
            self.config,
            data=replace(self.config.data, manifest=str(manifest), seconds=scale.seconds),
            train=replace(self.train, batch_size=scale.batch_size),
        )
        # Stage 1 has no lyric head yet, stage 2 makes it, stage 3 finds it.
        text = None if isinstance(config, stage1.Config) else self.find_text(folder)
        if hasattr(config, "text"):
            config, text = replace(config, text=text), None
        tokenizer = self.make_tokenizer(scale.blocks, text)
        return self.module.make_task(config, CutSampler(config.data), tokenizer)

    def load(self, folder: Path) -> nn.Module:
        return DuoTokenizer.from_pretrained(folder)


class LMRecipe(DryRecipe):
    """The language model, on its longest windows in the mode with the longest sequences."""

    @property
    def scale(self) -> Scale:
        lengths = [seconds for seconds, _ in self.config.data.windows]
        # A batch counts windows of the shortest length.
        size = max(1, int(self.train.batch_size * min(lengths) // max(lengths)))
        return Scale(blocks=self.config.model.layers, batch_size=size, seconds=max(lengths))

    def make_task(self, scale: Scale, folder: Path) -> Task:
        tokenizer = self.tokenizer_config
        sizes = {"vocal": tokenizer.vocal_codes, "accompaniment": tokenizer.accompaniment_codes}
        frames = round(scale.seconds * DuoTokenizer.frame_rate_hz)
        index = TokenIndex(
            tokenizer_fingerprint="none", codebook_sizes=sizes, frame_rate_hz=DuoTokenizer.frame_rate_hz
        )
        codes = {track: torch.randint(sizes[track], (frames,)) for track in TRACKS}
        append_shard(folder, index, {"noise": ("noise", "train", codes)})
        shares = self.config.data.mode_shares()
        with_source = [mode for mode in shares if mode != "unconditional" and shares[mode] > 0]
        mode = with_source[0] if with_source else "unconditional"
        data = replace(
            self.config.data,
            tokens=str(folder),
            windows=((scale.seconds, 1.0),),
            **{name: float(name == mode) for name in shares},
        )
        model = replace(
            self.config.model,
            code_dim=tokenizer.code_dim,
            layers=scale.blocks,
            **{f"{t}_codes": sizes[t] for t in TRACKS},
        )
        lm = DualTrackLM(model)
        source = WindowSource(TokenShards(folder), data, lm, scale.batch_size)
        return Task(LMObjective(lm, self.config.prompt_weight), source.make_batch, lm.save_pretrained)

    def without_recomputation(self) -> DryRecipe | None:
        if not self.config.model.gradient_checkpointing:
            return None
        model = replace(self.config.model, gradient_checkpointing=False)
        return LMRecipe(self.path, self.module, replace(self.config, model=model), self.text_tokens)

    def load(self, folder: Path) -> nn.Module:
        return DualTrackLM.from_pretrained(folder)


class DiffusionRecipe(DryRecipe):
    """The diffusion decoder of one track under its frozen tokenizer."""

    @property
    def scale(self) -> Scale:
        return Scale(
            blocks=self.config.model.blocks,
            batch_size=self.train.batch_size,
            seconds=self.config.data.seconds,
        )

    def make_task(self, scale: Scale, folder: Path) -> Task:
        decoder = DiffusionDecoder(replace(self.config.model, blocks=scale.blocks))
        tokenizer = self.make_tokenizer(self.tokenizer_config.blocks, self.find_text(folder))
        context = round(self.config.data.context_seconds * tokenizer.frame_rate_hz)
        frames = round(scale.seconds * tokenizer.frame_rate_hz)
        size, latent_dim = scale.batch_size, self.config.model.latent_dim

        def make_batch(rng):
            codes = rng.integers(self.tokenizer_config.accompaniment_codes, size=(size, frames + 2 * context))
            latents = rng.normal(size=(size, latent_dim, LATENTS_PER_FEATURE * frames))
            return {
                "codes": torch.from_numpy(codes),
                "offset": torch.full((size,), context),
                "latents": torch.from_numpy(latents).float(),
            }

        objective = DiffusionObjective(decoder, tokenizer, "accompaniment", self.config.loss)
        return Task(objective, make_batch, decoder.save_pretrained)

    def load(self, folder: Path) -> nn.Module:
        return DiffusionDecoder.from_pretrained(folder)


RECIPES: dict[str, type[DryRecipe]] = {
    "duotok.recipes.tokenizer.stage1": StageRecipe,
    "duotok.recipes.tokenizer.stage2": StageRecipe,
    "duotok.recipes.tokenizer.stage3": StageRecipe,
    "duotok.recipes.lm.train": LMRecipe,
    "duotok.recipes.renderer.train_diffusion": DiffusionRecipe,
}


def open_recipe(
    path: Path, overrides: Sequence[str] = (), *, text_tokens: int = PAPER_TEXT_TOKENS
) -> DryRecipe:
    """Read a recipe; its program is the one that its head says runs it."""
    try:
        match = RUN_LINE.search(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the recipe {path}: {error}") from error
    if match is None or match[1] not in RECIPES:
        known = ", ".join(RECIPES)
        raise ConfigError(
            f"the head of {path} must have a line '# Run: python -m PROGRAM', PROGRAM of {known}"
        )
    module = import_module(match[1])
    return RECIPES[match[1]](path, module, load_config(module.Config, path, overrides), text_tokens)


def find_tokenizer_config(path: Path, config: Any) -> DuoTokenizerConfig:
    """Return the tokenizer that a recipe makes or builds on.

    That of the folder it starts from where there is one yet, else the model of stage 1 of the same size.
    """
    if isinstance(getattr(config, "model", None), DuoTokenizerConfig):
        return config.model
    folder = Path(getattr(config, "tokenizer", None) or config.start_from)
    if (folder / "config.json").exists():
        stored = read_description(folder, "tokenizer")["config"]
        return config_from_dict(DuoTokenizerConfig, stored, str(folder))
    sibling = open_sibling("stage1", path.name)
    if sibling is None:
        raise ConfigError(
            f"{path} builds on the tokenizer {folder}, which is not there, and there is no "
            f"recipes/tokenizer/stage1/{path.name}; name the recipe after its size"
        )
    return sibling.model


def open_sibling(stage: str, name: str) -> Any:
    """Return the config of a tokenizer stage by the file name of its size; None where there is none."""
    path = Path(str(files("duotok.recipes"))) / "tokenizer" / stage / name
    module = import_module(f"duotok.recipes.tokenizer.{stage}")
    return load_config(module.Config, path) if path.exists() else None
