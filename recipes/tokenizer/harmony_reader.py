"""Learn to read chords and keys out of chroma from the labels of a training corpus.

Run: python -m duotok.recipes.tokenizer.harmony_reader CONFIG.yaml --out runs/small/harmony
The result, runs/small/harmony/final, goes into tokenizer/music/weights; it is worth learning anew when the
tokenizer's chroma has become better.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from duotok.recipes.tokenizer.labelled_chroma import (
    BlockSampler,
    ChromaSong,
    LabelledChromaConfig,
    read_songs,
)
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import TRACKS
from duotok.tokenizer.music.harmony_reader import HarmonyReader, HarmonyReaderConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the harmony reader's training."""

    data: LabelledChromaConfig
    model: HarmonyReaderConfig = field(default_factory=HarmonyReaderConfig)
    key_decay: float = 0.01  # penalty of the key weights' squares
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.key_decay <= 0:
            raise ConfigError(f"key_decay must be above 0, got {self.key_decay}")


class ChordObjective(nn.Module):
    """Cross-entropy of the chord of every block whose chord is known."""

    def __init__(self, reader: HarmonyReader) -> None:
        super().__init__()
        self.reader = reader
        reader.vocal_key.requires_grad_(False)  # fitted at the end, see `fit_keys`
        reader.accompaniment_key.requires_grad_(False)

    def forward(self, around: Tensor, chords: Tensor) -> dict[str, Tensor]:
        """around [batch, stretches, 12], chords [batch] -> named losses in nats."""
        judged = self.reader(around)
        accuracy = (judged.detach().argmax(dim=-1) == chords).float().mean()
        return {"total": functional.nll_loss(judged, chords), "accuracy": accuracy}


def fit_keys(reader: HarmonyReader, songs: Sequence[ChromaSong], decay: float) -> None:
    """Fit the key weights of both tracks by logistic regression, all roots sharing theirs."""
    for track in TRACKS:
        heard = [song for song in songs if song.sounding[track].any()]
        keys = torch.tensor([song.key for song in heard])
        evidence = torch.stack(
            [reader.key_evidence(song.blocks[track][song.sounding[track]], track) for song in heard]
        )
        # Every map at zero mean and unit deviation while fitting; undone in the weights below.
        mean = evidence.mean(dim=(0, 2), keepdim=True)
        deviation = evidence.std(dim=(0, 2), keepdim=True).clamp_min(1e-6)
        layer = reader.key_layer(track)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            [layer.weight.requires_grad_(), layer.bias.requires_grad_()],
            max_iter=200,
            line_search_fn="strong_wolfe",
        )

        def penalized(
            evidence=(evidence - mean) / deviation, keys=keys, track=track, layer=layer, optimizer=optimizer
        ):
            optimizer.zero_grad()
            loss = functional.cross_entropy(reader.key_logits(evidence, track), keys)
            loss = loss + decay * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(penalized)
        with torch.no_grad():
            layer.weight.div_(deviation.flatten().repeat_interleave(12))
            layer.bias.sub_(layer.weight @ mean.flatten().repeat_interleave(12))


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    songs = read_songs(config.data)
    reader = HarmonyReader(config.model)

    sampler = BlockSampler(songs)

    def make_batch(rng):
        return sampler.draw(rng, config.train.batch_size)

    def export(folder: Path) -> None:
        finished = HarmonyReader(config.model)
        finished.load_state_dict({name: tensor.cpu() for name, tensor in reader.state_dict().items()})
        fit_keys(finished, songs, config.key_decay)
        finished.save_pretrained(folder, half=True, extra={"songs": len(songs)})

    return Task(ChordObjective(reader), make_batch, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Chords and keys from chroma", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
