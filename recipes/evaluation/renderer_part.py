"""Figures of the renderer on test accompaniments: the VAE alone, and codes -> latents -> sound."""

from collections.abc import Sequence

from tqdm import tqdm

from duotok.recipes.bundle import read_bundle_description
from duotok.recipes.evaluation.excerpts import Excerpt, choose_excerpts, read_test_items
from duotok.recipes.evaluation.rebuilding import rebuild_from_codes
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.vae_quality import (
    compare_sounds,
    mean_figures,
    measure_recordings,
    measure_vae,
)
from duotok.recipes.evaluation.whole_song import measure_whole_song
from duotok.recipes.loudness import match_level
from duotok.recipes.settings import resolve_settings
from duotok.renderer.song import Renderer
from duotok.renderer.vae import SpectralVAE
from duotok.tokenizer.model import DuoTokenizer

_ITEMS, _SECONDS = 12, 8.0


def measure_renderer(settings: Settings) -> dict[str, float]:
    """Figures of vae_… and round_trip_… (true codes to sound): chroma, fine structure, mel, width, loudness.

    The loudness error is of the VAE alone. With settings.recordings also those of recordings_vae_…; with
    settings.vae nothing but the VAE in that folder is measured.
    """
    excerpts = choose_excerpts(
        read_test_items(settings.corpus),
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
    if settings.vae is not None:
        vae = SpectralVAE.from_pretrained(settings.vae)
        rows = [
            _named("vae", measure_vae(vae, excerpt.read("accompaniment")))
            for excerpt in tqdm(excerpts, desc="VAE", disable=None)
        ]
        figures = mean_figures(rows)
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
    rows = []
    for excerpt in tqdm(excerpts, desc="renderer", disable=None):
        wave = excerpt.read("accompaniment")
        rendered = rebuild_from_codes(tokenizer, renderer, wave, "accompaniment", generation, settings.seed)
        round_trip = compare_sounds(wave, match_level(rendered, wave))
        rows.append(_named("vae", measure_vae(renderer.vae, wave)) | _named("round_trip", round_trip))
    return mean_figures(rows) | measure_whole_song(tokenizer, renderer, excerpts, generation, settings)


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}
