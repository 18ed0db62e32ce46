"""Random cuts of corpus items by kind: full mix, sung vocal, accompaniment, instrumental (P C.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.corpus.shards import open_items
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, change_speed
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer
from duotok.tokenizer.objectives import KINDS
from duotok.tokenizer.spectra import level_gain
from duotok.tokenizer.text import TextVocabulary

START_CANDIDATES = 4
# Stems that a kind of cut is made of.
_BAND = ("drums", "bass", "other")
STEMS_OF_KIND = {"mix": STEMS, "vocal": ("vocal",), "accompaniment": _BAND, "instrumental": _BAND}


@dataclass(frozen=True, kw_only=True)
class CutConfig:
    """What is cut from where."""

    manifest: str  # a JSONL manifest, or webdataset tars as `shards.find_tars` takes them
    seconds: float = 10.0
    gain_db: float = 4.0  # random gain around the standard level, uniform in +- this
    # Random speed, in whole semitones up or down, so that keys stay in tune. Pitch, formants and tempo go
    # along: voices and bands that the corpus has not (speed perturbation; Ko et al., 2015).
    speed_semitones: int = 0
    tars: int = 8  # of which a process draws at a time
    steps_per_tar: int = 20  # after which the oldest of them makes room for the next
    cache: str = "~/.cache/duotok/shards"  # folder of tars from elsewhere, on a disk of this machine
    cache_gb: float = 100.0  # that it may hold: at least `tars` for each process of this machine

    def __post_init__(self) -> None:
        if self.tars < 1 or self.steps_per_tar < 1 or not self.cache_gb > 0:
            raise ConfigError("data.tars and data.steps_per_tar must be at least 1, data.cache_gb above 0")
        if not 0 <= self.speed_semitones <= 12:
            raise ConfigError(f"data.speed_semitones must be in 0..12, got {self.speed_semitones}")
        if self.seconds * SAMPLE_RATE_HZ < HOP_SAMPLES:
            raise ConfigError(f"data.seconds must be at least 0.04, got {self.seconds}")


class Cut(NamedTuple):
    """One cut near the standard level."""

    waves: dict[str, Tensor]  # stem -> [samples] mono, of those that the kind is made of
    kind: str
    lines: list[tuple[float, float, str]]  # sung wholly inside: start and end in seconds of the cut, text

    @property
    def wave(self) -> Tensor:
        """Its sound [samples], the sum of its stems."""
        return reduce(torch.add, self.waves.values())

    @property
    def stems(self) -> Tensor:
        """[4, samples]: vocal, drums, bass, other; those that the kind leaves out are zero."""
        nothing = torch.zeros_like(self.wave)
        return torch.stack([self.waves.get(stem, nothing) for stem in STEMS])


class CutSampler:
    """Draws cuts of one length from a corpus."""

    def __init__(self, config: CutConfig) -> None:
        self.config = config
        self.frames = int(config.seconds * SAMPLE_RATE_HZ // HOP_SAMPLES)
        self._source = open_items(
            config.manifest,
            shortest_seconds=config.seconds,
            tars=config.tars,
            steps_per_tar=config.steps_per_tar,
            cache=config.cache,
            cache_gb=config.cache_gb,
        )
        self.seek = self._source.seek

    def draw(self, rng: np.random.Generator, kinds: list[str]) -> Tensor:
        """Return one mono cut per kind, [len(kinds), frames * 1920], near the standard level."""
        return torch.stack([self.cut(rng, kind).wave for kind in kinds])

    def draw_mixture(self, rng: np.random.Generator, count: int, mixture: dict[str, float]) -> Tensor:
        """Return `count` cuts as `draw` does, of kinds in the proportions of a mixture."""
        return self.draw(rng, self.draw_kinds(rng, count, mixture))

    def draw_kinds(self, rng: np.random.Generator, count: int, mixture: dict[str, float]) -> list[str]:
        """Draw kinds in the proportions of a mixture."""
        unknown = set(mixture) - set(KINDS)
        if unknown:
            raise ConfigError(
                f"unknown kind {sorted(unknown)[0]!r} in the mixture; known are {', '.join(KINDS)}"
            )
        shares = np.array(list(mixture.values()), dtype=float)
        if not (shares >= 0).all() or not shares.sum() > 0:
            raise ConfigError(f"the mixture must give shares above 0 to some kinds, got {mixture}")
        return [str(kind) for kind in rng.choice(list(mixture), size=count, p=shares / shares.sum())]

    def cut(self, rng: np.random.Generator, kind: str) -> Cut:
        """Return a random cut of a kind: a vocal where much is sung, an instrumental where little is."""
        item = self._source.pick(rng, is_sung=kind == "vocal")
        speed = self._draw_speed(rng, item.seconds)
        seconds = self.config.seconds * speed
        starts = rng.uniform(0, max(0.0, item.seconds - seconds), size=START_CANDIDATES)
        if item.lyrics and kind != "instrumental":
            # Whole sentences can be supervised only where a cut does not begin inside of one.
            begins = np.array([begin for begin, *_ in item.lyrics])
            starts = np.minimum(rng.choice(begins, size=START_CANDIDATES), max(0.0, item.seconds - seconds))
        if kind in ("vocal", "instrumental"):
            sung = [item.sung_between(start, start + seconds) for start in starts]
            start = float(starts[int(np.argmax(sung) if kind == "vocal" else np.argmin(sung))])
        else:
            start = float(starts[0])
        waves, samples = {}, self.frames * HOP_SAMPLES
        for stem in STEMS_OF_KIND[kind]:
            wave = change_speed(item.read(stem, start_seconds=start, seconds=seconds, channels=1), speed)[0]
            waves[stem] = functional.pad(wave, (0, samples - len(wave))) if len(wave) != samples else wave
        gain_db = rng.uniform(-self.config.gain_db, self.config.gain_db)
        level = level_gain(Cut(waves, kind, []).wave[None])[0] * 10 ** (gain_db / 20)
        for wave in waves.values():
            wave *= level  # it is nobody else's
        lines = item.lines_between(start, start + seconds) if kind in ("mix", "vocal") else []
        lines = [((begin - start) / speed, (stop - start) / speed, text) for begin, stop, text in lines]
        return Cut(waves=waves, kind=kind, lines=lines)

    def _draw_speed(self, rng: np.random.Generator, item_seconds: float) -> float:
        most = self.config.speed_semitones
        if most == 0:
            return 1.0
        speed = 2.0 ** (int(rng.integers(-most, most + 1)) / 12)
        return speed if self.config.seconds * speed <= item_seconds else 1.0


def mel_statistics(sampler: CutSampler, log_mel: torch.nn.Module, cuts: int = 96) -> tuple[Tensor, Tensor]:
    """Return mean and deviation per mel band over cuts of all kinds, the same for the same corpus."""
    rng = np.random.default_rng(0)
    waves = sampler.draw_mixture(rng, cuts, {"mix": 1, "vocal": 1, "accompaniment": 1})
    mel = torch.cat([log_mel(wave[None]).flatten(0, 1) for wave in waves])
    return mel.mean(dim=0), mel.std(dim=0).clamp_min(0.1)


SHORTEST_RUN_SECONDS = 0.3
SLACK_FRAMES = 1  # that a run's frames reach beyond its times


def collate_cuts(
    cuts: Sequence[Cut], vocabulary: TextVocabulary | None, run_seconds: float, rng: np.random.Generator
) -> dict[str, Tensor]:
    """Return {"kind" [batch], "text" [runs, longest], "text_span" [runs, 3]}.

    A run is some consecutive lines of a vocal (P C.3), about run_seconds at most: its text holds lyric
    tokens, -1 after their end; its span the cut's index, its first and its after-last frame. Without any run
    there is one row of no tokens.
    """
    rows: list[list[int]] = []
    spans: list[tuple[int, int, int]] = []
    for index, cut in enumerate(cuts):
        if vocabulary is None or cut.kind != "vocal":
            continue
        for start, end, text in draw_runs(cut.lines, run_seconds, rng):
            rows.append(vocabulary.encode(text))
            first = max(0, math.floor(start * DuoTokenizer.frame_rate_hz) - SLACK_FRAMES)
            spans.append((index, first, math.ceil(end * DuoTokenizer.frame_rate_hz) + SLACK_FRAMES))
    text_rows = torch.full((max(1, len(rows)), max([1, *map(len, rows)])), -1)
    for number, row in enumerate(rows):
        text_rows[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return {
        "kind": torch.tensor([KINDS.index(cut.kind) for cut in cuts]),
        "text": text_rows,
        "text_span": torch.tensor(spans or [(0, 0, 1)]),
    }


def draw_runs(
    lines: Sequence[tuple[float, float, str]], longest_seconds: float, rng: np.random.Generator
) -> list[tuple[float, float, str]]:
    """Join consecutive lines to runs of random lengths; a run ends with the line that reaches its length."""
    runs: list[tuple[float, float, str]] = []
    wanted = 0.0
    for start, end, text in lines:
        if runs and runs[-1][1] - runs[-1][0] < wanted:
            runs[-1] = (runs[-1][0], end, f"{runs[-1][2]} {text}")
            continue
        runs.append((start, end, text))
        wanted = rng.uniform(SHORTEST_RUN_SECONDS, max(SHORTEST_RUN_SECONDS, longest_seconds))
    return runs
