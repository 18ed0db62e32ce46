"""A long song through the renderer: its joints, and the seconds it takes."""

import time
from collections.abc import Sequence

import torch

from duotok.recipes.accompany.request import GenerationSettings
from duotok.recipes.evaluation.excerpts import Excerpt
from duotok.recipes.evaluation.joints import flux_ratios, level_jumps_db
from duotok.recipes.evaluation.settings import Settings
from duotok.recipes.evaluation.speed import CORES
from duotok.renderer.renderer import Renderer, plan_windows
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer

_SECONDS_PER_EXCERPT_SECOND = 15  # 120 s by default: four joints of windows, eleven of decoded chunks
_STEP_SECONDS = 0.1  # between the places that stand for anywhere


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
    parts: list[torch.Tensor] = []
    while sum(part.shape[1] for part in parts) < samples:
        parts.append(excerpts[len(parts) % len(excerpts)].item.read("accompaniment"))
    wave = torch.cat(parts, dim=1)[:, :samples]
    codes = tokenizer.encode(wave[None], "accompaniment")
    features = tokenizer.features(codes, "accompaniment")[0]
    ends: list[int] = []  # of the decoded chunks, in latent frames
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, CORES))
    try:
        began = time.perf_counter()
        latents = renderer.render_latents(
            features, steps=generation.steps, guidance=generation.render_guidance, seed=settings.seed
        )
        drawn = time.perf_counter()
        rendered = renderer.decode(latents, samples, ends.append).cpu()
        finished = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
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
