"""How near the VAE alone comes to a sound: on test songs, and on real recordings, which it never heard."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.corpus.song_files import SongFile, find_songs
from duotok.recipes.evaluation.audio_metrics import compare_spectra
from duotok.recipes.evaluation.rebuilding import rebuild_by_vae
from duotok.recipes.evaluation.sound import loudness_difference_lu, stereo_width_db
from duotok.renderer.autoencoder import Autoencoder
from duotok.tokenizer.common.audio import audio_seconds, read_audio
from duotok.tokenizer.common.errors import DataError

_PIECES = 4  # of a recording that is long enough, spread over it
_SHORTEST_SECONDS = 1.0
_SILENT_PEAK = 1e-4
Figures = dict[str, float]


def compare_sounds(wave: Tensor, found: Tensor) -> Figures:
    """Chroma correlation, log10-mel L1, fine structure and error of width of found [2, samples]."""
    width = abs(stereo_width_db(found) - stereo_width_db(wave))
    return compare_spectra(wave, found) | {"stereo_width_error_db": width}


def measure_vae(vae: Autoencoder, wave: Tensor) -> Figures:
    """Figures of wave [2, samples] at 48 kHz through the VAE: those of compare_sounds, and the loudness."""
    found = rebuild_by_vae(vae, wave)
    loudness = abs(loudness_difference_lu(found, wave))
    return compare_sounds(wave, found) | {"loudness_error_lu": loudness}


def measure_recordings(vae: Autoencoder, source: Path, seconds: float) -> Figures:
    """Figures recordings_vae_… (mean), recording_<name>_vae_… and the number of recordings.

    source: a folder of recordings, or of songs' stems, whose sum is then the recording. Of each, up to four
    stretches of so many seconds, spread evenly, are put through the VAE; every recording counts the same.
    Raises DataError for a folder without recordings and for one that is silent or below 1 s.
    """
    songs = find_songs(source)
    rows: dict[str, Figures] = {}
    for song in tqdm(songs, desc="recordings", disable=None):
        name = _short_name(song, source)
        rows[f"{name}_{song.key}" if name in rows else name] = mean_figures(
            measure_vae(vae, wave) for wave in read_pieces(song, seconds)
        )
    figures = {f"recordings_vae_{key}": value for key, value in mean_figures(rows.values()).items()}
    for name, row in rows.items():
        figures |= {f"recording_{name}_vae_{key}": value for key, value in row.items()}
    return figures | {"recordings": len(rows)}


def mean_figures(rows: Iterable[Mapping[str, float]]) -> Figures:
    """The mean of each figure over rows of one kind."""
    rows = list(rows)
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def read_pieces(song: SongFile, seconds: float) -> Sequence[Tensor]:
    """Stretches [2, samples] of a recording, spread evenly over it, less those that are silent."""
    paths = [song.mix] if song.mix is not None else list(song.stems.values())
    whole = min(audio_seconds(path) for path in paths)
    if whole < _SHORTEST_SECONDS:
        raise DataError(f"{paths[0]} lasts {whole:.2f} s; give recordings of {_SHORTEST_SECONDS:g} s or more")
    length = min(whole, seconds)
    count = min(_PIECES, int(whole / length))
    pieces = []
    for number in range(count):
        start = max(0.0, (number + 0.5) * whole / count - length / 2)
        waves = [read_audio(path, start_seconds=start, seconds=length) for path in paths]
        samples = min(wave.shape[-1] for wave in waves)
        wave = torch.stack([wave[:, :samples] for wave in waves]).sum(dim=0)
        if wave.abs().max() > _SILENT_PEAK:
            pieces.append(wave)
    if not pieces:
        raise DataError(f"{paths[0]} is silent; leave it out of the recordings")
    return pieces


def _short_name(song: SongFile, source: Path) -> str:
    name = song.name if song.name != "." else source.resolve().stem
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or song.key
