"""What the tagger musicnn hears in music: features for Frechet distances, computed without TensorFlow.

musicnn (Pons & Serra, 2019) ships the weights of its network for MagnaTagATune in its PyPI package (ISC
licence). Install it by `pip install --no-deps musicnn`: of its dependencies only librosa is needed here. The
features are its "penultimate" ones: the normalized last hidden layer, 200 numbers per patch of 3 s. The
wiring is that of the graph in the package's .meta file.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import librosa
import numpy as np
import soxr
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.evaluation.tensor_bundle import read_tensor_bundle
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError

PACKAGE = "musicnn"
INSTALL = "pip install --no-deps musicnn"
FEATURES = 200
PATCH_SECONDS = 187 * 256 / 16_000

_MODEL = "MTT_musicnn"
_RATE_HZ = 16_000
_BANDS = 96
_PATCH_FRAMES = 187  # of 256 samples
_PATCHES_AT_ONCE = 8
_NORM_EPSILON = 1e-3


def has_music_features() -> bool:
    """Whether the package with the weights is installed."""
    return find_spec(PACKAGE) is not None


class MusicFeatures:
    """The network, with its weights by their names in TensorFlow's checkpoint."""

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        self._weights = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}

    @classmethod
    def from_package(cls) -> "MusicFeatures":
        """Read the weights of the installed package; raises DataError where it is missing."""
        spec = find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise DataError(f"{PACKAGE} is missing; {INSTALL}")
        return cls(read_tensor_bundle(Path(spec.origin).parent / _MODEL))

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
