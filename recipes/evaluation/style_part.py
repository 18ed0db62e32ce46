"""Whether the band plays what it is asked for: probes on codes tell styles apart, and bars with drums.

Probes learn from the true codes of training items (`settings.tokens`, as lm.tokenize makes them, and their
manifest), and are tried on songs they have not seen; then they judge generated codes.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.request import STEMS
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.evaluation.audio_metrics import hear_stems
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of
from duotok.recipes.lm.tokens import TokenShards, check_tokens, split_songs
from duotok.tokenizer.common.errors import ConfigError, DataError

_HELD_OUT = 0.15  # of the songs, to try the probes on
_DECAY = 3e-5
_STEPS = 60
_MOST_BARS = 8000
_EARLY_SECONDS = 0.03  # that the stroke on a downbeat may be


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A multinomial logistic regression on how often each code occurs."""

    classes: Sequence[str]
    weights: Tensor  # [codes + 1, classes], the last row for itself

    @classmethod
    def learn(cls, songs: Sequence[Tensor], truth: Sequence[str], codes: int) -> "Probe":
        """The probe of these codes [frames] below `codes` with these classes."""
        classes = sorted(set(truth))
        if len(classes) < 2:
            raise DataError(f"a probe needs two classes to tell apart, got {classes}")
        rows, answers = count_codes(songs, codes), torch.tensor([classes.index(name) for name in truth])
        weights = torch.zeros(codes + 1, len(classes), requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = functional.cross_entropy(rows @ weights, answers) + _DECAY * weights[:-1].square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        return cls(classes=classes, weights=weights.detach())

    def tell(self, songs: Sequence[Tensor]) -> list[str]:
        """The class of each song's codes [frames]."""
        found = (count_codes(songs, len(self.weights) - 1) @ self.weights).argmax(dim=1)
        return [self.classes[int(number)] for number in found]


def count_codes(songs: Sequence[Tensor], codes: int) -> Tensor:
    """Roots of the shares of the codes in each song, and a 1: [songs, codes + 1]."""
    counts = torch.stack([torch.bincount(song, minlength=codes)[:codes].float() for song in songs])
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.cat([shares.sqrt(), torch.ones(len(songs), 1)], dim=1)


def measure_style(settings: Settings) -> dict[str, float]:
    """Accuracy of the probes on true codes, and what they say of codes that were asked for (asked_...).

    A model that knows no styles is only told of; then the probes alone are measured.
    """
    if settings.tokens is None:
        raise ConfigError("style needs --tokens: training tokens as duotok.recipes.lm.tokenize makes them")
    accompanist = Accompanist.from_pretrained(settings.bundle)
    excerpts = excerpts_of(settings, 4, 20.0)
    shards = TokenShards(settings.tokens)
    check_tokens(shards, accompanist.bundle.lm.tokenizer_fingerprint or "")
    manifest = settings.manifest or settings.corpus / "train.jsonl"
    items = {item.id: item for item in read_manifest(manifest)}
    if not any(song.id in items for song in shards.index.songs):
        raise DataError(f"{manifest} has none of the items in {settings.tokens}")
    frames = round(excerpts[0].seconds * shards.index.frame_rate_hz)
    probes: dict[str, Probe] = {}
    figures: dict[str, float] = {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}
    for name, pieces in {"style": cut_clips(shards, items, frames), "drums": cut_bars(shards, items)}.items():
        kept, held_out = pieces
        if min(len(set(truth)) for _, truth in pieces) < 2:
            print(f"left out: the probe of {name}; {manifest} does not tell of two kinds", file=sys.stderr)
            continue
        probes[name] = Probe.learn(*kept, shards.index.codebook_sizes["accompaniment"])
        figures |= score_probe(name, held_out[1], probes[name].tell(held_out[0]))
    band = accompanist.bundle.lm.band
    if band is None:
        print("left out: styles asked for; this model knows none", file=sys.stderr)
        return figures
    return figures | ask_for_styles(accompanist, excerpts, probes, tuple(band.styles), settings.seed)


def score_probe(name: str, truth: Sequence[str], told: Sequence[str]) -> dict[str, float]:
    """Share that a probe tells rightly, and the same with every class counting alike."""
    right = np.array([a == b for a, b in zip(truth, told, strict=True)])
    classes = [right[[answer == kind for answer in truth]].mean() for kind in sorted(set(truth))]
    return {
        f"{name}_probe_accuracy": float(right.mean()),
        f"{name}_probe_balanced_accuracy": float(np.mean(classes)),
        f"{name}_probe_pieces": len(truth),
    }


Pieces = tuple[list[Tensor], list[str]]  # codes [frames] of each, and its class


def cut_clips(shards: TokenShards, items: Mapping[str, Item], frames: int) -> tuple[Pieces, Pieces]:
    """Clips of so many frames with their styles, to learn from and held out."""

    def cut(codes: Tensor, item: Item) -> list[tuple[Tensor, str]]:
        starts = range(0, len(codes) - frames + 1, frames)
        return [(codes[start : start + frames], item.style) for start in starts]

    return _cut(shards, items, cut)


def cut_bars(shards: TokenShards, items: Mapping[str, Item]) -> tuple[Pieces, Pieces]:
    """Bars of items whose band is known, "drums" or "none", to learn from and held out."""
    rate_hz = shards.index.frame_rate_hz

    def cut(codes: Tensor, item: Item) -> list[tuple[Tensor, str]]:
        strokes = np.array([note[0] for part in item.band.get("drums", ()) for note in part[2]])
        strokes = strokes + _EARLY_SECONDS
        bars = [
            (codes[round(start * rate_hz) : round(stop * rate_hz)], bool(_between(strokes, start, stop)))
            for start, stop in (pairwise(item.downbeats_seconds) if item.band else ())
        ]
        return [(bar, "drums" if struck else "none") for bar, struck in bars if len(bar)]

    return _cut(shards, items, cut)


def _between(times: np.ndarray, start: float, stop: float) -> int:
    return int(((times >= start) & (times < stop)).sum())


def _cut(shards: TokenShards, items: Mapping[str, Item], cut: Any) -> tuple[Pieces, Pieces]:
    sides = []
    known = [song for song in shards.index.songs if song.split == "train" and song.id in items]
    for songs in split_songs(known, _HELD_OUT):
        pieces = [
            piece for song in songs for piece in cut(shards.codes(song)["accompaniment"], items[song.id])
        ]
        pieces = pieces[:: max(1, len(pieces) // _MOST_BARS)]
        sides.append(([codes for codes, _ in pieces], [truth for _, truth in pieces]))
    return sides[0], sides[1]


def ask_for_styles(
    accompanist: Accompanist,
    excerpts: Sequence[Excerpt],
    probes: Mapping[str, Probe],
    styles: Sequence[str],
    seed: int,
) -> dict[str, float]:
    """Each style for every excerpt: how often it is heard (…_heard); then bars without each stem in turn.

    bars_with_STEM_WISH: share of the bars in which a stem is heard, WISH asked or without_STEM;
    drums_probe_WISH: bars with drums by their codes.
    """
    figures: dict[str, float] = {}
    style = probes.get("style")
    known = [name for name in styles if style is not None and name in style.classes]
    heard: list[float] = []
    for name in tqdm(known, desc="style: asked for", disable=None):
        codes = [
            accompanist.compose(excerpt.read("vocal"), seed=seed + number, style=name).ranked[0].codes
            for number, excerpt in enumerate(excerpts)
        ]
        assert style is not None
        right = [told == name for told in style.tell(codes)]
        figures[f"asked_{name}_heard"] = float(np.mean(right))
        heard += right
    if heard:
        figures["asked_heard"] = float(np.mean(heard))
    wishes: dict[str, tuple[str, ...]] = {"asked": (), **{f"without_{stem}": (stem,) for stem in STEMS}}
    for wish, without in wishes.items():
        bars: dict[str, list[np.ndarray]] = {}
        told: list[Tensor] = []
        for number, excerpt in enumerate(tqdm(excerpts, desc=f"style: {wish}", disable=None)):
            made = accompanist.accompany(excerpt.read("vocal"), seed=seed + number, without=without)
            for stem, found in hear_stems(made.accompaniment, excerpt.downbeats_seconds).items():
                bars.setdefault(stem, []).append(found)
            rate_hz = accompanist.bundle.tokenizer.frame_rate_hz
            edges = np.round(excerpt.downbeats_seconds * rate_hz).astype(int)
            told += [made.codes[start:stop] for start, stop in pairwise(edges.tolist())]
        for stem, found in bars.items():
            figures[f"bars_with_{stem}_{wish}"] = float(np.concatenate(found).mean())
        if "drums" in probes and told:
            figures[f"drums_probe_{wish}"] = float(
                np.mean([t == "drums" for t in probes["drums"].tell(told)])
            )
    return figures
