"""Figures of the renderer on test accompaniments: the VAE alone, and codes -> latents -> sound."""

from collections.abc import Sequence
from dataclasses import replace

from tqdm import tqdm

from duotok.recipes.accompany.bundle import read_bundle_description
from duotok.recipes.accompany.mix import match_level
from duotok.recipes.accompany.request import resolve_settings
from duotok.recipes.evaluation.excerpts import Excerpt, choose_excerpts, read_test_items
from duotok.recipes.evaluation.rebuilding import rebuild_from_codes
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.sound_quality import worst_loss_percent
from duotok.recipes.evaluation.vae_quality import (
    compare_sounds,
    mean_figures,
    measure_recordings,
    measure_vae,
)
from duotok.recipes.evaluation.whole_song import measure_whole_song
from duotok.renderer.renderer import Renderer, open_vae
from duotok.tokenizer.model import DuoTokenizer

_ITEMS, _SECONDS = 12, 8.0
_MANY_STEPS = 50  # of the paper (P C.4)


def measure_renderer(settings: Settings) -> dict[str, float]:
    """Figures of vae_… and round_trip_… (true codes to sound): chroma, fine structure, mel, width, loudness.

    The loudness error is of the VAE alone. round_trip_many_steps_… are of 50 diffusion steps;
    few_steps_loss_percent is what the bundle's own number loses against them on the worst of sound_quality's
    measures. With settings.recordings also those of recordings_vae_…; with settings.vae nothing but the VAE
    in that folder is measured.
    """
    excerpts = choose_excerpts(
        read_test_items(settings.corpus),
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
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
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in ("vae", *schedules)}
    for excerpt in tqdm(excerpts, desc="renderer", disable=None):
        wave = excerpt.read("accompaniment")
        rows["vae"].append(measure_vae(renderer.vae, wave))
        for name, schedule in schedules.items():
            rendered = rebuild_from_codes(tokenizer, renderer, wave, "accompaniment", schedule, settings.seed)
            rows[name].append(compare_sounds(wave, match_level(rendered, wave)))
    means = {name: mean_figures(found) for name, found in rows.items()}
    loss = worst_loss_percent(means["round_trip"], means["round_trip_many_steps"])
    figures = {"steps": float(generation.steps), "few_steps_loss_percent": loss}
    for name, mean in means.items():
        figures |= _named(name, mean)
    return figures | measure_whole_song(tokenizer, renderer, excerpts, generation, settings)


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}
