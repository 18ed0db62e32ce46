"""Figures of the renderer: the VAE alone on test songs and real recordings, and codes to sound."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.bundle import read_bundle_description
from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.request import GenerationSettings, resolve_settings
from duotok.recipes.corpus.songs.recordings import SongFile, find_songs
from duotok.recipes.evaluation.audio_metrics import (
    compare_spectra,
    flux_ratios,
    level_jumps_db,
    loudness_difference_lu,
    stereo_width_db,
    worst_loss_percent,
)
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of, join_items
from duotok.recipes.evaluation.speed import CORES, on_cores
from duotok.recipes.lm.sheets import write_chart
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.renderer import Renderer, open_vae, plan_windows
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, audio_seconds, read_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer

_PIECES = 4  # of a recording that is long enough, spread over it
_SHORTEST_SECONDS = 1.0
_SILENT_PEAK = 1e-4
_SECONDS_PER_EXCERPT_SECOND = 15  # 120 s by default: four joints of windows, eleven of decoded chunks
_STEP_SECONDS = 0.1  # between the places that stand for anywhere
_MANY_STEPS = 50  # of the paper (P C.4)
_TOLD = "told_round_trip"


@torch.no_grad()
def rebuild_by_vae(vae: Autoencoder, wave: Tensor) -> Tensor:
    """wave [2, samples] -> its latents' sound, of the same shape."""
    return vae.decode(vae.encode(wave[None]), wave.shape[-1])[0]


@torch.no_grad()
def rebuild_from_codes(
    tokenizer: DuoTokenizer,
    renderer: Renderer,
    wave: Tensor,
    track: str,
    generation: GenerationSettings,
    seed: int,
    chart: Tensor | None = None,
) -> Tensor:
    """wave [2, samples] of one track -> the sound of its codes, of the same shape but any level.

    chart [frames25, 5]: what the decoder is told beside them.
    """
    codes = tokenizer.encode(wave[None], track)
    features = tokenizer.features(codes, track)[0]
    latents = renderer.render_latents(
        features,
        steps=generation.steps,
        guidance=generation.render_guidance,
        seed=seed,
        track=track,
        chart=chart,
    )
    return renderer.decode(latents, wave.shape[-1])


def chart_excerpt(excerpt: Excerpt, styles: Sequence[str]) -> Tensor:
    """Return the chart of an excerpt as the corpus knows it [frames25, 5], in which STYLE counts styles."""
    rate_hz, frames = DuoTokenizer.frame_rate_hz, -(-excerpt.samples // HOP_SAMPLES)
    start = round(excerpt.start_seconds * rate_hz)
    return write_chart(excerpt.item, rate_hz, styles, frames=frames, start=start)


def compare_sounds(wave: Tensor, found: Tensor) -> dict[str, float]:
    """Chroma correlation, log10-mel L1, fine structure and error of width of found [2, samples]."""
    width = abs(stereo_width_db(found) - stereo_width_db(wave))
    return compare_spectra(wave, found) | {"stereo_width_error_db": width}


def measure_vae(vae: Autoencoder, wave: Tensor) -> dict[str, float]:
    """Figures of wave [2, samples] at 48 kHz through the VAE: those of compare_sounds, and the loudness."""
    found = rebuild_by_vae(vae, wave)
    loudness = abs(loudness_difference_lu(found, wave))
    return compare_sounds(wave, found) | {"loudness_error_lu": loudness}


def measure_recordings(vae: Autoencoder, source: Path, seconds: float) -> dict[str, float]:
    """Figures recordings_vae_… (mean), recording_<name>_vae_… and the number of recordings.

    source: a folder of recordings, or of songs' stems, whose sum is then the recording. Of each, up to four
    stretches of so many seconds, spread evenly, are put through the VAE; every recording counts the same.
    Raises DataError for a folder without recordings and for one that is silent or below 1 s.
    """
    songs = find_songs(source)
    rows: dict[str, dict[str, float]] = {}
    for song in tqdm(songs, desc="recordings", disable=None):
        name = _short_name(song, source)
        rows[f"{name}_{song.key}" if name in rows else name] = mean_figures(
            measure_vae(vae, wave) for wave in read_pieces(song, seconds)
        )
    figures = {f"recordings_vae_{key}": value for key, value in mean_figures(rows.values()).items()}
    for name, row in rows.items():
        figures |= {f"recording_{name}_vae_{key}": value for key, value in row.items()}
    return figures | {"recordings": len(rows)}


def mean_figures(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
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


@torch.no_grad()
def measure_whole_song(
    tokenizer: DuoTokenizer,
    renderer: Renderer,
    excerpts: Sequence[Excerpt],
    generation: GenerationSettings,
    settings: Settings,
) -> dict[str, float]:
    """Median over joints of flux / median flux and of the level's jump; seconds per second of audio.

    The song is the accompaniments of the excerpts' items end to end. "joint": where one window of latents
    goes on from the one before; "chunk_joint": where the autoencoder's chunks meet; "anywhere": the same of
    places every 0.1 s, which is what an unheard joint has; "..._original": of the recording, at the joints.
    """
    samples = round(_SECONDS_PER_EXCERPT_SECOND * excerpts[0].seconds * SAMPLE_RATE_HZ)
    wave = join_items([excerpt.item for excerpt in excerpts], "accompaniment", samples / SAMPLE_RATE_HZ)
    codes = tokenizer.encode(wave[None], "accompaniment")
    features = tokenizer.features(codes, "accompaniment")[0]
    ends: list[int] = []  # of the decoded chunks, in latent frames
    with on_cores(CORES):
        began = time.perf_counter()
        latents = renderer.render_latents(
            features, steps=generation.steps, guidance=generation.render_guidance, seed=settings.seed
        )
        drawn = time.perf_counter()
        rendered = renderer.decode(latents, samples, ends.append).cpu()
        finished = time.perf_counter()
    chunks = torch.tensor(ends).cumsum(0)[:-1] * renderer.vae.hop_samples
    step = round(_STEP_SECONDS * SAMPLE_RATE_HZ)
    places = {
        "joint": [(part.start + part.known) * HOP_SAMPLES for part in plan_windows(len(features))[1:]],
        "chunk_joint": chunks.tolist(),
        "anywhere": list(range(step, samples - step, step)),
    }
    figures: dict[str, float] = {"song_seconds": samples / SAMPLE_RATE_HZ}
    for name, where in places.items():
        if where:
            figures[f"{name}_flux_ratio"] = float(flux_ratios(rendered, where).median())
            figures[f"{name}_level_jump_db"] = float(level_jumps_db(rendered, where).median())
    if places["joint"]:
        figures["joint_flux_ratio_original"] = float(flux_ratios(wave, places["joint"]).median())
        figures["joints"] = len(places["joint"])
    if settings.speed:
        figures["diffusion_seconds_per_second"] = (drawn - began) / figures["song_seconds"]
        figures["vae_decoding_seconds_per_second"] = (finished - drawn) / figures["song_seconds"]
        figures["seconds_per_second"] = (finished - began) / figures["song_seconds"]
    return figures


def measure_renderer(settings: Settings) -> dict[str, float]:
    """Figures of vae_… and round_trip_… (true codes to sound): chroma, fine structure, mel, width, loudness.

    told_round_trip_… are of a decoder that is told the corpus' own chart beside the codes, if it can be.
    The loudness error is of the VAE alone. round_trip_many_steps_… are of 50 diffusion steps;
    few_steps_loss_percent is what the bundle's own number loses against them by the worst measure. With
    settings.recordings also recordings_vae_…; with settings.vae nothing but the VAE in that folder.
    """
    excerpts = excerpts_of(settings, 12, 8.0)
    if settings.vae is not None:
        vae = open_vae(settings.vae)
        rows = [
            measure_vae(vae, excerpt.read("accompaniment"))
            for excerpt in tqdm(excerpts, desc="VAE", disable=None)
        ]
        figures = _named("vae", mean_figures(rows))
    else:
        renderer = Renderer.from_pretrained(settings.bundle / "renderer")
        vae = renderer.vae
        figures = _measure_whole_renderer(settings, renderer, excerpts)
    if settings.recordings is not None:
        figures |= measure_recordings(vae, settings.recordings, excerpts[0].seconds)
    return figures | {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}


def _measure_whole_renderer(
    settings: Settings, renderer: Renderer, excerpts: Sequence[Excerpt]
) -> dict[str, float]:
    """The VAE alone, codes to sound, and the joints and seconds of a long song."""
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    renderer.require_tokenizer(tokenizer.fingerprint)
    generation = resolve_settings(read_bundle_description(settings.bundle).get("defaults") or {}, {})
    schedules = {"round_trip": generation, "round_trip_many_steps": replace(generation, steps=_MANY_STEPS)}
    if renderer.styles:
        schedules[_TOLD] = generation
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("vae", *schedules)}
    for excerpt in tqdm(excerpts, desc="renderer", disable=None):
        wave = excerpt.read("accompaniment")
        rows["vae"].append(measure_vae(renderer.vae, wave))
        for name, schedule in schedules.items():
            chart = chart_excerpt(excerpt, renderer.styles) if name == _TOLD else None
            rendered = rebuild_from_codes(
                tokenizer, renderer, wave, "accompaniment", schedule, settings.seed, chart
            )
            rows[name].append(compare_sounds(wave, match_level(rendered, wave)))
    means = {name: mean_figures(found) for name, found in rows.items()}
    loss = worst_loss_percent(means["round_trip"], means["round_trip_many_steps"])
    figures = {"steps": float(generation.steps), "few_steps_loss_percent": loss}
    for name, mean in means.items():
        figures |= _named(name, mean)
    return figures | measure_whole_song(tokenizer, renderer, excerpts, generation, settings)


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}
