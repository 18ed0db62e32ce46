"""Distances between sets of sounds by what a music tagger hears: Frechet and kernel distances.

The tagger is musicnn (Pons & Serra, 2019), trained on MagnaTagATune; musicnn.safetensors holds the weights of
its PyPI package 0.1.0 (ISC licence, in the file's metadata), kernels rounded to half precision. The features
are its "penultimate" ones: the normalized last hidden layer, 200 numbers per patch of 3 s. The wiring is that
of the graph in the package's .meta file.

A Frechet distance of few samples is too large, the more so the fewer they are. All of them that are to be
compared are therefore taken between sets of the same number of patches, and averaged over draws. The kernel
distance has no such bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import librosa
import numpy as np
import soxr
import torch
from safetensors.torch import load_file
from scipy.spatial.distance import pdist
from torch import Tensor
from torch.nn import functional

from duotok.lm.metrics import code_counts, unigram_entropy_bits
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

_RATE_HZ = 16_000
_BANDS = 96
_PATCH_FRAMES = 187  # of 256 samples
_PATCHES_AT_ONCE = 8
_NORM_EPSILON = 1e-3
DRAWS = 20
_RUN = 4  # codes
_FEWEST_SONGS = 4  # of a style that is cut into halves


class MusicFeatures:
    """The network, with its weights by their names in the package's checkpoint."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {name: values.float() for name, values in weights.items()}

    @classmethod
    def from_pretrained(cls) -> "MusicFeatures":
        """The network with musicnn's own weights, which lie beside this file."""
        return cls(load_file(Path(__file__).with_name("musicnn.safetensors")))

    @torch.no_grad()
    def of_wave(self, wave: Tensor) -> Tensor:
        """wave [channels, samples] at 48 kHz -> features [patches, 200], one per whole 3 s, at least one.

        A shorter wave is continued by silence.
        """
        mono = wave.detach().float().mean(dim=0).cpu().numpy()
        mel = log_mel(soxr.resample(mono, SAMPLE_RATE_HZ, _RATE_HZ))
        mel = np.pad(mel, ((0, max(0, _PATCH_FRAMES - len(mel))), (0, 0)))
        count = len(mel) // _PATCH_FRAMES
        patches = torch.from_numpy(mel[: count * _PATCH_FRAMES]).unflatten(0, (count, _PATCH_FRAMES))
        return torch.cat([self.of_patches(some) for some in patches.split(_PATCHES_AT_ONCE)])

    def of_patches(self, mel: Tensor) -> Tensor:
        """mel [patches, frames, 96] -> features [patches, 200]."""
        heard = self._normalize(mel[:, None], "batch_normalization", dim=1)  # [patches, 1, frames, bands]
        front = self._front_end(heard)  # [patches, frames, channels]
        first = self._convolve_all(front, 5)
        second = self._convolve_all(first, 6) + first
        third = self._convolve_all(second, 7) + second
        layers = torch.cat([front, first, second, third], dim=2)
        # Maximum and mean of each channel side by side, as the package flattens them.
        pooled = torch.stack([layers.amax(dim=1), layers.mean(dim=1)], dim=2).flatten(1)
        pooled = self._normalize(pooled, "batch_normalization_9", dim=1)
        hidden = functional.relu(pooled @ self._weights["dense/kernel"] + self._weights["dense/bias"])
        return self._normalize(hidden, "batch_normalization_10", dim=1)

    def _front_end(self, heard: Tensor) -> Tensor:
        """Wide filters for timbre, long ones for rhythm, each at its strongest band."""
        padded = functional.pad(heard, (0, 0, 3, 3))
        timbre = [self._convolve(padded, number) for number in (0, 1)]
        rhythm = []
        for number in (2, 3, 4):
            length = self._weights[f"conv2d_{number}/kernel"].shape[0]
            before = (length - 1) // 2
            rhythm.append(self._convolve(functional.pad(heard, (0, 0, before, length - 1 - before)), number))
        return torch.cat([found.amax(dim=3) for found in (*timbre, *rhythm)], dim=1).transpose(1, 2)

    def _convolve_all(self, layer: Tensor, number: int) -> Tensor:
        """layer [patches, frames, channels] -> the same shape with other channels, from 7 frames each."""
        padded = functional.pad(layer[:, None], (0, 0, 3, 3))
        return self._convolve(padded, number)[..., 0].transpose(1, 2)

    def _convolve(self, heard: Tensor, number: int) -> Tensor:
        name = f"conv2d_{number}" if number else "conv2d"
        kernel = self._weights[f"{name}/kernel"].permute(3, 2, 0, 1)
        found = functional.relu(functional.conv2d(heard, kernel, self._weights[f"{name}/bias"]))
        return self._normalize(found, f"batch_normalization_{number + 1}", dim=1)

    def _normalize(self, values: Tensor, name: str, dim: int) -> Tensor:
        """Batch normalization by the moments of the training."""
        shape = [-1 if axis == dim else 1 for axis in range(values.dim())]
        mean, variance, gamma, beta = (
            self._weights[f"{name}/{part}"].reshape(shape)
            for part in ("moving_mean", "moving_variance", "gamma", "beta")
        )
        return (values - mean) / (variance + _NORM_EPSILON).sqrt() * gamma + beta


def log_mel(wave: np.ndarray) -> np.ndarray:
    """wave [samples] at 16 kHz -> [frames, 96] float32, what the network was trained on."""
    mel = librosa.feature.melspectrogram(y=wave, sr=_RATE_HZ, n_fft=512, hop_length=256, n_mels=_BANDS)
    return np.log10(10_000 * mel.T + 1).astype(np.float32)


def compare_sets(
    bands: np.ndarray, true: Sequence[np.ndarray], found: Sequence[np.ndarray], *, seed: int
) -> dict[str, float]:
    """How a set of songs sounds: its distances from the corpus' own bands, its spread over the true one.

    bands: [patches, features] of the corpus; true, found: the same of each song, as it truly is and as it was
    made. Frechet distances are taken on features over their deviation in the corpus, between as many patches
    of both sides as the smaller has; spread: mean distance between the mean features of two songs, over that
    of the true ones (0: all songs sound alike).
    """
    deviation = bands.std(axis=0) + _NORM_EPSILON
    patches = np.concatenate(found)
    spreads = [
        pdist([song.mean(axis=0) / deviation for song in songs]).mean() if len(songs) > 1 else 0.0
        for songs in (found, true)
    ]
    return {
        "kernel_distance": kernel_distance(bands, patches),
        "frechet_standardized": drawn_distance(
            bands / deviation, patches / deviation, patches=min(len(bands), len(patches)), seed=seed
        ),
        "spread": float(spreads[0] / max(spreads[1], _NORM_EPSILON)),
    }


def compare_codes(true: Sequence[Tensor], found: Sequence[Tensor]) -> dict[str, float]:
    """Entropy and number of distinct runs of four codes of songs [frames], over those of the true songs.

    Of each song as many frames count as both have, as either figure grows with them.
    """
    frames = [min(len(own), len(made)) for own, made in zip(true, found, strict=True)]
    true, found = ([codes[:k] for codes, k in zip(side, frames, strict=True)] for side in (true, found))
    size = 1 + int(torch.cat([*true, *found]).max())
    entropy, other = (unigram_entropy_bits(code_counts(torch.cat([*songs]), size)) for songs in (found, true))
    runs, others = (
        len({tuple(run) for codes in songs for run in codes.unfold(0, _RUN, 1).tolist()})
        for songs in (found, true)
    )
    return {"entropy": entropy / max(other, _NORM_EPSILON), "distinct_4_grams": runs / others}


def compare_styles(
    bands: Mapping[str, np.ndarray], styles: Mapping[str, str], *, patches: int, seed: int
) -> dict[str, float]:
    """The distances of `compare_sets` between the bands of one half of the styles and those of the other.

    bands: song -> [patches, features]; styles: song -> style. Mean over random halves; nothing where there
    is one style only.
    """
    names = sorted(set(styles.values()))
    if len(names) < 2:
        return {}
    rng = np.random.default_rng(seed)
    deviation = np.concatenate(list(bands.values())).std(axis=0) + _NORM_EPSILON
    kernel, frechet = [], []
    for _ in range(DRAWS):
        half = _halve(names, rng)[0]
        sides = [
            np.concatenate([bands[song] for song in sorted(bands) if (styles[song] in half) == inside])
            for inside in (True, False)
        ]
        kernel.append(kernel_distance(*sides))
        rows = [side[rng.permutation(len(side))[:patches]] / deviation for side in sides]
        frechet.append(frechet_distance(*rows))
    return {"kernel_distance": float(np.mean(kernel)), "frechet_standardized": float(np.mean(frechet))}


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Distances between originals, at `patches` patches a side."""

    patches: int
    same_style: float  # two random halves of the songs of one style
    other_style: float  # random halves of two styles
    same_corpus: float  # two random halves of all songs
    styles: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        """Flat figures."""
        return {
            "frechet_patches": self.patches,
            "frechet_same_style": self.same_style,
            "frechet_other_style": self.other_style,
            "frechet_same_corpus": self.same_corpus,
            "frechet_styles": len(self.styles),
        }


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions of two sets of features (Dowson & Landau, 1982).

    first, second: [samples, features], at least two samples each.
    """
    means = first.mean(axis=0), second.mean(axis=0)
    # With A and B the centred sets over sqrt(samples - 1), the trace of the root of the product of the
    # covariances A'A and B'B is the sum of the singular values of AB', also where they have no full rank.
    centred = [
        (values - mean) / np.sqrt(len(values) - 1)
        for values, mean in zip((first, second), means, strict=True)
    ]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(np.square(values).sum() for values in centred) - 2 * shared
    return float(np.square(means[0] - means[1]).sum() + max(0.0, spread))


def kernel_distance(real: np.ndarray, found: np.ndarray) -> float:
    """Squared distance x 1000 of two sets of features under a cubic kernel, without bias; 0 where alike.

    As the kernel inception distance (Binkowski et al., 2018): kernel (x y / features + 1) ** 3 on features
    over the RMS of the real ones. Sets of any sizes from two samples on, [samples, features]. May come out
    below 0.
    """
    scale = np.sqrt(np.square(real).mean())
    real, found = real / scale, found / scale

    def kernel(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return (first @ second.T / first.shape[1] + 1) ** 3

    def within(values: np.ndarray) -> float:
        products = kernel(values, values)
        return float((products.sum() - np.trace(products)) / (len(values) * (len(values) - 1)))

    return 1000 * (within(real) + within(found) - 2 * float(kernel(real, found).mean()))


def drawn_distance(first: np.ndarray, second: np.ndarray, *, patches: int, seed: int) -> float:
    """Mean Frechet distance of so many randomly drawn rows of each of two sets [samples, features]."""
    rng = np.random.default_rng(seed)
    draws = [[rng.permutation(len(side))[:patches] for side in (first, second)] for _ in range(DRAWS)]
    return float(np.mean([frechet_distance(first[one], second[other]) for one, other in draws]))


def matched_distance(first: np.ndarray, second: np.ndarray, *, patches: int, seed: int) -> float:
    """Mean distance of the same randomly drawn rows of two sets of corresponding rows [samples, features]."""
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(DRAWS):
        rows = rng.permutation(len(first))[:patches]
        distances.append(frechet_distance(first[rows], second[rows]))
    return float(np.mean(distances))


def measure_anchors(
    features: Mapping[str, np.ndarray], styles: Mapping[str, str], *, most_patches: int, seed: int
) -> Anchors | None:
    """Distances between halves of the songs; None where fewer than two styles have four songs.

    features: song -> [patches, features]; styles: song -> style. Both sides always have the same number of
    patches: as many as the smallest half has, and no more than most_patches.
    """
    songs: dict[str, list[str]] = {}
    for song in sorted(features):
        songs.setdefault(styles[song], []).append(song)
    groups = {style: names for style, names in sorted(songs.items()) if len(names) >= _FEWEST_SONGS}
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [{style: _halve(names, rng) for style, names in groups.items()} for _ in range(DRAWS)]
    sizes = [
        sum(len(features[song]) for song in half) for draw in draws for pair in draw.values() for half in pair
    ]
    patches = min(most_patches, *sizes)

    def distance(first: Sequence[str], second: Sequence[str]) -> float:
        sides = [np.concatenate([features[song] for song in side]) for side in (first, second)]
        return frechet_distance(*(side[rng.permutation(len(side))[:patches]] for side in sides))

    same, other, whole = [], [], []
    for draw in draws:
        same += [distance(*pair) for pair in draw.values()]
        other += [distance(draw[a][0], draw[b][0]) for a, b in combinations(draw, 2)]
        whole.append(distance(*_halve(sorted(features), rng)))
    return Anchors(
        patches=patches,
        same_style=float(np.mean(same)),
        other_style=float(np.mean(other)),
        same_corpus=float(np.mean(whole)),
        styles=tuple(groups),
    )


def _halve(names: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    order = [names[int(index)] for index in rng.permutation(len(names))]
    return order[: len(order) // 2], order[len(order) // 2 :]
