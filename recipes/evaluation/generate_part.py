"""Figures of the whole pipeline: coherence of generated accompaniments, their sound, speed and memory."""

import tempfile
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.evaluation.audio_metrics import (
    longest_silence_seconds,
    loudness_difference_lu,
    measure_peak,
)
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, join_items, read_items
from duotok.recipes.evaluation.heard_coherence import (
    Backing,
    Coherence,
    Singing,
    listen_to,
    measure_coherence,
    pair_with_others,
    pitches_of_notes,
    pitches_of_wave,
)
from duotok.recipes.evaluation.speed import time_in_subprocess
from duotok.recipes.evaluation.tokenizer_part import frame_correlation
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, write_audio

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist

_SPEED_SECONDS = (30, 180)


def measure_generate(settings: Settings) -> dict[str, float]:
    """Coherence of generated, real, mismatched and silent accompaniments; then sound, speed and memory."""
    from duotok.recipes.accompany.pipeline import Accompanist

    accompanist = Accompanist.from_pretrained(settings.bundle)
    items = read_items(settings)
    excerpts = excerpts_of(settings)
    singings = [listen_to_singer(excerpt) for excerpt in excerpts]
    backings, sounds = [], []
    for index, excerpt in enumerate(tqdm(excerpts, desc="generate: accompaniments", disable=None)):
        backing, sound = _accompany(accompanist, excerpt, settings.seed + index)
        backings.append(backing)
        sounds.append(sound)
    figures: dict[str, float] = {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}
    songs = [excerpt.item.song for excerpt in excerpts]
    figures |= compare_pairs(singings, backings, songs, "")
    figures |= measure_real_pairs(excerpts, singings)
    figures["token_chroma_correlation"] = float(np.mean([sound["token_chroma"] for sound in sounds]))
    differences = np.array([sound["loudness_difference_lu"] for sound in sounds])
    figures["loudness_difference_lu"] = float(differences.mean())
    figures["loudness_difference_largest_lu"] = float(np.abs(differences).max())
    for name in ("peak", "longest_silence_seconds", "wrong_lengths"):
        figures[name] = float(max(sound[name] for sound in sounds))
    if settings.speed:
        figures |= measure_speed(items, settings.bundle)
    return figures


def measure_real_pairs(excerpts: list[Excerpt], singings: list[Singing]) -> dict[str, float]:
    """The same figures of the corpus' own accompaniments (…_real, …_real_mismatched) and of silence."""
    backings, silences = [], []
    for excerpt in tqdm(excerpts, desc="generate: real pairs", disable=None):
        wave = excerpt.read("accompaniment")
        backings.append(listen_to(wave))
        silences.append(longest_silence_seconds(wave))
    figures = compare_pairs(singings, backings, [excerpt.item.song for excerpt in excerpts], "_real")
    silence = listen_to(torch.zeros(2, excerpts[0].samples))
    figures |= _mean([measure_coherence(singing, silence) for singing in singings], "_silence")
    figures["longest_silence_real_seconds"] = float(max(silences))
    return figures


def compare_pairs(
    singings: list[Singing], backings: list[Backing], songs: list[str], suffix: str
) -> dict[str, float]:
    """Mean coherence of the right pairs (suffix) and of a fixed derangement (suffix + "_mismatched")."""
    partners = pair_with_others(songs)
    right = [measure_coherence(s, b) for s, b in zip(singings, backings, strict=True)]
    wrong = [measure_coherence(singings[partner], b) for partner, b in zip(partners, backings, strict=True)]
    return _mean(right, suffix) | _mean(wrong, f"{suffix}_mismatched")


def listen_to_singer(excerpt: Excerpt) -> Singing:
    """Pitch from the manifest's notes, or from the recording where it has none, and the song's beats."""
    if excerpt.item.notes:
        pitches = pitches_of_notes(excerpt.item.notes, excerpt.samples, excerpt.start_seconds)
    else:
        pitches = pitches_of_wave(excerpt.read("vocal"))
    return Singing(pitches=pitches, beats_seconds=excerpt.beats_seconds)


def measure_speed(items: list[Item], bundle: Path) -> dict[str, float]:
    """Computing time per second of audio and peak memory for vocals of 30 s and 180 s, on two CPU cores.

    Loading and first sound are those of the longer one.
    """
    figures: dict[str, float] = {}
    vocal = join_items(items, "vocal", max(_SPEED_SECONDS))
    with tempfile.TemporaryDirectory() as folder:
        for seconds in tqdm(_SPEED_SECONDS, desc="generate: speed", disable=None):
            path = Path(folder) / f"vocal_{seconds}s.wav"
            write_audio(path, vocal[:, : seconds * SAMPLE_RATE_HZ])
            is_longest = seconds == max(_SPEED_SECONDS)
            timing = time_in_subprocess(path, bundle, first_sound=is_longest)
            figures[f"rtf_{seconds}s"] = timing["compute_seconds"] / timing["audio_seconds"]
            figures[f"peak_memory_{seconds}s_gb"] = timing["peak_memory_gb"]
            if is_longest:
                figures |= {name: timing[name] for name in ("load_seconds", "first_sound_seconds")}
    figures["peak_memory_gb"] = figures[f"peak_memory_{max(_SPEED_SECONDS)}s_gb"]
    return figures


def _accompany(accompanist: "Accompanist", excerpt: Excerpt, seed: int) -> tuple[Backing, dict[str, float]]:
    """What can be heard in the accompaniment made for one excerpt, and facts about its sound."""
    vocal = excerpt.read("vocal")
    result = accompanist.accompany(vocal, seed=seed)
    wave = result.accompaniment
    tokenizer = accompanist.bundle.tokenizer
    told = tokenizer.read_out(result.codes[None], "accompaniment").chroma[0]
    heard = tokenizer.targets(wave[None]).chroma[0]
    sound = {
        "token_chroma": frame_correlation(told, heard),
        "loudness_difference_lu": loudness_difference_lu(wave, vocal),
        "peak": max(measure_peak(wave), measure_peak(result.mix)),
        "longest_silence_seconds": longest_silence_seconds(wave),
        "wrong_lengths": float(wave.shape != (2, excerpt.samples) or result.mix.shape != wave.shape),
    }
    return listen_to(wave), sound


def _mean(results: list[Coherence], suffix: str) -> dict[str, float]:
    values = np.array([astuple(result) for result in results]).mean(axis=0)
    return {f"{field.name}{suffix}": float(v) for field, v in zip(fields(Coherence), values, strict=True)}
