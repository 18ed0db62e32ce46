"""What the renderer makes of a recording: through the VAE alone, and from the recording's codes."""

import torch
from torch import Tensor

from duotok.recipes.accompany.request import GenerationSettings
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.renderer import Renderer
from duotok.tokenizer.model import DuoTokenizer


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
) -> Tensor:
    """wave [2, samples] of one track -> the sound of its codes, of the same shape but any level."""
    codes = tokenizer.encode(wave[None], track)
    features = tokenizer.features(codes, track)[0]
    latents = renderer.render_latents(
        features, steps=generation.steps, guidance=generation.render_guidance, seed=seed, track=track
    )
    return renderer.decode(latents, wave.shape[-1])
