"""Figures of encoding: in chunks or at once, louder or quieter, through a 16-bit file; and its speed."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.excerpts import Settings, choose_excerpts, read_items
from duotok.recipes.evaluation.speed import CORES, on_cores
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.model import TRACKS, DuoTokenizer

_SONG_SECONDS = 180.0
_ITEMS, _SECONDS = 24, 20.0
_GAINS_DB = (6.0, -6.0)
_FILE_RATE_HZ = 44_100
_TIMINGS = 3


def measure_encoding(settings: Settings) -> dict[str, float]:
    """Share of equal tokens per track under each treatment, and seconds of encoding per second of audio.

    Chunks are compared on test songs joined to 180 s, the rest on excerpts of 20 s.
    """
    folder = settings.bundle / "tokenizer"
    tokenizer, one_pass = DuoTokenizer.from_pretrained(folder), OnePassTokenizer.from_pretrained(folder)
    items = read_items(settings)
    song_seconds = min(settings.seconds or _SONG_SECONDS, sum(item.seconds for item in items))
    excerpts = choose_excerpts(
        items, count=settings.items or _ITEMS, seconds=settings.seconds or _SECONDS, seed=settings.seed
    )
    figures: dict[str, float] = {"excerpts": len(excerpts), "song_seconds": song_seconds}
    for track in TRACKS:
        song = join_items(items, track, song_seconds)[None]
        figures[f"{track}_chunked_equal"] = compare_chunks(tokenizer, one_pass, song, track)
        shares: dict[str, list[float]] = {}
        for excerpt in tqdm(excerpts, desc=f"encoding, {track}", disable=None):
            for name, share in compare_treatments(tokenizer, excerpt.read(track), track).items():
                shares.setdefault(name, []).append(share)
        figures |= {f"{track}_{name}": float(np.mean(values)) for name, values in shares.items()}
        if settings.speed:
            seconds = time_encoding(tokenizer, song, track)
            figures[f"{track}_seconds_per_second"] = seconds / song_seconds
            figures[f"{track}_times_real_time"] = song_seconds / seconds
    return figures


def join_items(items: Sequence[Item], track: str, seconds: float) -> Tensor:
    """Audio of a track [2, samples], item after item up to `seconds`."""
    waves, missing = [], round(seconds * SAMPLE_RATE_HZ)
    for item in items:
        if missing <= 0:
            break
        waves.append(item.read(track)[:, :missing])
        missing -= waves[-1].shape[-1]
    return torch.cat(waves, dim=-1)


class OnePassTokenizer(DuoTokenizer):
    """The same tokenizer, all of a recording at once, in as much memory as that takes."""

    CHUNK_FRAMES = 10**9


def compare_chunks(tokenizer: DuoTokenizer, one_pass: DuoTokenizer, wave: Tensor, track: str) -> float:
    """Share of the tokens of wave [1, channels, samples] that are those of one pass over all of it."""
    return share_equal(tokenizer.encode(wave, track), one_pass.encode(wave, track))


def compare_treatments(tokenizer: DuoTokenizer, wave: Tensor, track: str) -> dict[str, float]:
    """Share of the tokens of wave [2, samples] that survive a gain, and a 16-bit file at 44.1 kHz."""
    codes = tokenizer.encode(wave[None], track)
    shares = {
        f"gain_{'plus' if gain_db > 0 else 'minus'}_{abs(gain_db):.0f}_db_equal": share_equal(
            tokenizer.encode(wave[None] * 10 ** (gain_db / 20), track), codes
        )
        for gain_db in _GAINS_DB
    }
    shares["resampled_equal"] = share_equal(tokenizer.encode(through_file(wave)[None], track), codes)
    return shares


def through_file(wave: Tensor) -> Tensor:
    """wave [channels, samples] as it comes back from a 16-bit file at 44.1 kHz."""
    samples = soxr.resample(wave.T.numpy(), SAMPLE_RATE_HZ, _FILE_RATE_HZ, quality="HQ")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wave.wav"
        soundfile.write(path, samples, _FILE_RATE_HZ, subtype="PCM_16")
        back = read_audio(path, channels=len(wave))
    missing = wave.shape[-1] - back.shape[-1]  # resampling twice rounds the length twice
    return torch.nn.functional.pad(back, (0, missing)) if missing > 0 else back[:, : wave.shape[-1]]


def share_equal(first: Tensor, second: Tensor) -> float:
    """Share of equal codes in the frames that both [1, frames] have."""
    frames = min(first.shape[1], second.shape[1])
    return float((first[:, :frames] == second[:, :frames]).float().mean())


def time_encoding(tokenizer: DuoTokenizer, wave: Tensor, track: str) -> float:
    """Seconds of one encoding of wave [1, channels, samples] on two cores: the best of three."""
    timings = []
    with on_cores(CORES):
        for _ in range(_TIMINGS):
            began = time.perf_counter()
            tokenizer.encode(wave, track)
            timings.append(time.perf_counter() - began)
    return min(timings)
