"""Figures of the renderer on test accompaniments: the VAE alone, and codes -> latents -> sound."""

import numpy as np
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.bundle import read_bundle_description
from duotok.recipes.evaluation.audio_metrics import compare_spectra
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.rebuilding import match_level, rebuild_by_vae, rebuild_from_codes
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.sound import loudness_difference_lu, stereo_width_db
from duotok.recipes.evaluation.whole_song import measure_whole_song
from duotok.recipes.settings import resolve_settings
from duotok.renderer.song import Renderer
from duotok.tokenizer.model import DuoTokenizer

_ITEMS, _SECONDS = 12, 8.0


def measure_renderer(settings: Settings) -> dict[str, float]:
    """Figures of vae_… and round_trip_… (true codes to sound): chroma, fine structure, mel, width, loudness.

    The loudness error is of the VAE alone.
    """
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    renderer = Renderer.from_pretrained(settings.bundle / "renderer")
    renderer.require_tokenizer(tokenizer.fingerprint)
    generation = resolve_settings(read_bundle_description(settings.bundle).get("defaults") or {}, {})
    excerpts = choose_excerpts(
        read_test_items(settings.corpus),
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
    rows: list[dict[str, float]] = []
    for excerpt in tqdm(excerpts, desc="renderer", disable=None):
        wave = excerpt.read("accompaniment")
        through_vae = rebuild_by_vae(renderer, wave)
        rendered = rebuild_from_codes(tokenizer, renderer, wave, "accompaniment", generation, settings.seed)
        sounds = {"vae": through_vae, "round_trip": match_level(rendered, wave)}
        row = {
            f"{sound}_{name}": value
            for sound, found in sounds.items()
            for name, value in (compare_spectra(wave, found) | compare_width(wave, found)).items()
        }
        rows.append(row | {"vae_loudness_error_lu": abs(loudness_difference_lu(through_vae, wave))})
    figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    figures |= measure_whole_song(tokenizer, renderer, excerpts, generation, settings)
    return figures | {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}


def compare_width(wave: Tensor, found: Tensor) -> dict[str, float]:
    """How far the stereo width is off, both waves [2, samples]."""
    return {"stereo_width_error_db": abs(stereo_width_db(found) - stereo_width_db(wave))}
