"""A song of any length from its latents: chunks that go on where the sound so far ends."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..tokenizer.common.errors import ConfigError
from ..tokenizer.common.long_waves import let_go, new_wave

if TYPE_CHECKING:
    from .vae import SpectralVAE

CHUNK_FRAMES = 500  # 10 s
OVERLAP_FRAMES = 24  # of a chunk that repeat the one before
TAIL_FRAMES = 6  # of a chunk that lack the future and are made again by the next one
FADE_FRAMES = 2  # crossfade, inside sound that both chunks share


def decode_in_chunks(
    vae: "SpectralVAE",
    latents: Tensor,
    samples: int,
    progress: Callable[[int], None] | None = None,
    *,
    chunk_frames: int = CHUNK_FRAMES,
) -> Tensor:
    """latents [latent_dim, frames] -> wave [2, samples] on the CPU; memory grows with the wave alone.

    The frames of a chunk that the finished sound already fills keep that sound's spectrum during the phase
    search, and the next phases start from it: both sides of a joint are the same wave, so nothing cancels.
    """
    hop, frames = vae.hop_samples, latents.shape[-1]
    if not 0 < samples <= frames * hop:
        raise ConfigError(f"{frames} latent frames give 1 to {frames * hop} samples, not {samples}")
    if chunk_frames <= OVERLAP_FRAMES + TAIL_FRAMES:
        raise ConfigError(f"chunk_frames must be above {OVERLAP_FRAMES + TAIL_FRAMES}, got {chunk_frames}")
    wave = new_wave(2, frames * hop)
    done = 0  # frames whose sound is final
    while done < frames:
        start = max(0, done - OVERLAP_FRAMES)
        stop = min(frames, start + chunk_frames)
        if frames - stop < OVERLAP_FRAMES:
            stop = frames  # no tiny last chunk
        chunk = _decode_chunk(vae, latents, start, stop, wave[:, start * hop : done * hop]).cpu()
        final = stop if stop == frames else stop - TAIL_FRAMES
        chunk = chunk[:, : (final - start) * hop]
        if done:
            fade = FADE_FRAMES * hop
            joint, rise = done * hop, torch.linspace(0, 1, fade)
            within = (done - start) * hop
            wave[:, joint - fade : joint].lerp_(chunk[:, within - fade : within], rise)
            chunk = chunk[:, within:]
        wave[:, done * hop : final * hop] = chunk
        let_go(wave)
        if progress is not None:
            progress(final - done)
        done = final
    return wave[:, :samples]


def _decode_chunk(vae: "SpectralVAE", latents: Tensor, start: int, stop: int, past: Tensor) -> Tensor:
    """Decode frames start..stop to [2, (stop - start) * hop]; past [2, k * hop] is how their sound begins."""
    low, high = max(0, start - vae.reach_frames), min(latents.shape[-1], stop + vae.reach_frames)
    features = vae.decode_features(latents[None, :, low:high])[:, start - low : stop - low]
    held = None
    if past.shape[-1]:
        stft = vae.features.stft
        # Only frames whose whole window lies inside the finished sound are known.
        known = past.shape[-1] // vae.hop_samples - -(-stft.fft_size // (2 * vae.hop_samples))
        mid = past.mean(dim=0, keepdim=True).to(features.device)
        held = stft(mid)[..., :known]
    return vae.synthesize(features, held)[0]
