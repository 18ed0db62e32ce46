"""Figures of the renderer on test accompaniments: the VAE alone, and codes -> latents -> sound."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.bundle import read_bundle_description
from duotok.recipes.evaluation.audio_metrics import chroma_correlation, fine_structure, log10_mel_l1
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.whole_song import measure_whole_song
from duotok.recipes.settings import resolve_settings
from duotok.renderer.song import Renderer
from duotok.tokenizer.model import DuoTokenizer

_ITEMS, _SECONDS = 12, 8.0
_BANDS = ("50_300", "300_1000", "1000_3000")  # Hz


def measure_renderer(settings: Settings) -> dict[str, float]:
    """Chroma correlation, fine structure and log10-mel L1 of vae_… and round_trip_… (true codes to sound)."""
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
        samples = wave.shape[-1]
        with torch.no_grad():
            through_vae = renderer.vae.decode(renderer.vae.encode(wave[None]), samples)[0]
            codes = tokenizer.encode(wave[None], "accompaniment")
            features = tokenizer.features(codes, "accompaniment")[0]
            latents = renderer.render_latents(
                features, steps=generation.steps, guidance=generation.render_guidance, seed=settings.seed
            )
            rendered = renderer.decode(latents, samples)
        # Codes do not know the recording's level: compare at the same loudness.
        rendered = rendered * (wave.square().mean() / rendered.square().mean().clamp_min(1e-12)).sqrt()
        rows.append(_compare(wave, through_vae, "vae") | _compare(wave, rendered, "round_trip"))
    figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    figures |= measure_whole_song(tokenizer, renderer, excerpts, generation, settings)
    return figures | {"excerpts": len(excerpts), "excerpt_seconds": excerpts[0].seconds}


def _compare(wave: Tensor, found: Tensor, prefix: str) -> dict[str, float]:
    fine = fine_structure(wave, found)
    return {
        f"{prefix}_chroma_correlation": chroma_correlation(wave, found),
        f"{prefix}_log10_mel_l1": log10_mel_l1(wave, found),
        **{f"{prefix}_fine_structure_{band}_hz": value for band, value in zip(_BANDS, fine, strict=True)},
    }
