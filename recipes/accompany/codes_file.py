"""Codes of one track as a file: one safetensors tensor "codes" [frames] int32, with its origin."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.tokenizer.model import DuoTokenizer

KIND = "duotok-codes"


@dataclass(frozen=True, kw_only=True)
class TrackCodes:
    """The codes of one track of one recording."""

    codes: "Tensor"  # [frames] int64
    track: str
    samples: int  # length of the recording at 48 kHz; the last frame may reach beyond it


def write_codes(path: Path, found: TrackCodes, tokenizer: "DuoTokenizer") -> None:
    """Write a codes file; the tokenizer's rate and fingerprint go along."""
    import torch
    from safetensors.torch import save_file

    header = {
        "kind": KIND,
        "track": found.track,
        "samples": str(found.samples),
        "frame_rate_hz": f"{tokenizer.frame_rate_hz:g}",
        "tokenizer_fingerprint": str(tokenizer.fingerprint),
    }
    try:
        save_file({"codes": found.codes.to(torch.int32).contiguous()}, path, metadata=header)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_codes(path: Path, tokenizer: "DuoTokenizer") -> TrackCodes:
    """Read a codes file; raise DataError where it is damaged or not of this tokenizer."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            codes = file.get_tensor("codes")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path} is no codes file; make one by duotok.recipes.accompany.render --audio"
        ) from error
    expected = {
        "kind": KIND,
        "frame_rate_hz": f"{tokenizer.frame_rate_hz:g}",
        "tokenizer_fingerprint": str(tokenizer.fingerprint),
    }
    for name, value in expected.items():
        if header.get(name) != value:
            raise DataError(
                f"{path} has the {name.replace('_', ' ')} {header.get(name)}, this model needs {value}; "
                f"encode the recording again"
            )
    track, samples = header.get("track", ""), header.get("samples", "")
    size = tokenizer.codebook_size(track)
    if codes.ndim != 1 or len(codes) < 1 or codes.is_floating_point():
        raise DataError(
            f"{path} must hold a row of at least one code, got {codes.dtype} {tuple(codes.shape)}"
        )
    codes = codes.long()
    if int(codes.min()) < 0 or int(codes.max()) >= size:
        raise DataError(
            f"{path} has codes from {int(codes.min())} to {int(codes.max())}, this model's {track} codebook "
            f"has 0 to {size - 1}"
        )
    longest = len(codes) * tokenizer.hop_samples
    if not samples.isdecimal() or not longest - tokenizer.hop_samples < int(samples) <= longest:
        raise DataError(f"{path} has {len(codes)} codes, which do not fit its {samples or 'unknown'} samples")
    return TrackCodes(codes=codes, track=track, samples=int(samples))
