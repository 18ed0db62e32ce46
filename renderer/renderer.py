"""A whole song from codes' features: overlapping windows of latents, then the wave (DESIGN: long songs)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tokenizer.acoustic_codec import AcousticCodec
from ..tokenizer.common.checkpoint import open_component
from ..tokenizer.common.errors import CheckpointError, ConfigError
from ..tokenizer.common.precision import native_autocast
from .autoencoder import Autoencoder
from .diffusion import LATENTS_PER_FEATURE, DiffusionDecoder
from .spectral_vae import SpectralVAE
from .waveform_vae import OobleckVAE

Progress = Callable[[int], None]

WINDOW_FRAMES = 750  # 30 s at 25 Hz
OVERLAP_FRAMES = 75  # 3 s
LATENT_RATE_HZ = 25 * LATENTS_PER_FEATURE


def open_vae(folder: str | Path) -> Autoencoder:
    """Read a folder (CPU, eval) by the kind in its config.json; CheckpointError if it has no known one."""
    return open_component(folder, (SpectralVAE, OobleckVAE))


class Window(NamedTuple):
    """Feature frames start..stop of a song, of which the first `known` are rendered already."""

    start: int
    stop: int
    known: int


def plan_windows(frames: int, window: int = WINDOW_FRAMES, overlap: int = OVERLAP_FRAMES) -> list[Window]:
    """Cover frames with the fewest windows, equal ones, as a short one would have little to look at."""
    if not 0 <= overlap < window:
        raise ConfigError(f"the overlap must be in 0..{window - 1} frames, got {overlap}")
    if frames < 1:
        raise ConfigError("there is nothing to render: give at least 1 frame")
    count = max(1, -(-(frames - overlap) // (window - overlap)))
    fresh = frames - overlap  # frames that begin a window's own part, the first overlap apart
    stops = [overlap + fresh * (number + 1) // count for number in range(count)]
    windows = [Window(start=0, stop=stops[0], known=0)]
    for previous, stop in zip(stops[:-1], stops[1:], strict=True):
        windows.append(Window(start=max(0, previous - overlap), stop=stop, known=min(overlap, previous)))
    return windows


class Renderer:
    """Features of one track's codes -> latents -> 48 kHz stereo wave, for songs of any length."""

    def __init__(self, vae: Autoencoder, decoders: Mapping[str, DiffusionDecoder]) -> None:
        for track, decoder in decoders.items():
            decoder.require(vae=vae.known_as, track=track)
            if (decoder.config.latent_dim, LATENT_RATE_HZ) != (vae.latent_dim, vae.latent_rate_hz):
                raise CheckpointError(
                    f"the {track} decoder makes {decoder.config.latent_dim} latents at {LATENT_RATE_HZ} Hz, "
                    f"the VAE has {vae.latent_dim} at {vae.latent_rate_hz:g} Hz; use the parts of one bundle"
                )
        self.vae = vae
        self.decoders = dict(decoders)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Renderer":
        """Read vae/, accompaniment/ and, where there is one, vocal/ of a folder."""
        folder = Path(folder)
        tracks = ["accompaniment", *(["vocal"] if (folder / "vocal").is_dir() else [])]
        decoders = {track: DiffusionDecoder.from_pretrained(folder / track) for track in tracks}
        return cls(open_vae(folder / "vae"), decoders)

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles that the accompaniment's decoder can be told by a chart; none: it is told none."""
        decoder = self.decoders.get("accompaniment")
        return () if decoder is None else decoder.config.styles

    def to(self, device: str | torch.device) -> "Renderer":
        """Move all weights."""
        self.vae.to(device)
        for decoder in self.decoders.values():
            decoder.to(device)
        return self

    def require_tokenizer(self, fingerprint: str | None) -> None:
        """Raise CheckpointError unless the decoders were trained on the tokenizer of this fingerprint."""
        for decoder in self.decoders.values():
            decoder.require(tokenizer=fingerprint)

    @torch.no_grad()
    def render_latents(
        self,
        features: Tensor,
        *,
        steps: int,
        guidance: float,
        seed: int,
        progress: Progress | None = None,
        track: str = "accompaniment",
        chart: Tensor | None = None,
        before: Tensor | None = None,
        after: Tensor | None = None,
    ) -> Tensor:
        """Return latents [latent_dim, 2 * frames25] of features [frames25, dim], at least one frame.

        Windows of 30 s; each continues the last 3 s of the one before. progress is called after each window
        with the number of feature frames it added. chart [frames25, 5]: what is known of the music, see
        `chart`. before, after [latent_dim, up to 150]: the latents that these are to begin and to end with.
        """
        decoder = self._decoder(track)
        hear = self.vae.hear_chroma if isinstance(self.vae, SpectralVAE) else None
        generator = torch.Generator().manual_seed(seed)
        rendered: list[Tensor] = []
        tail: Tensor | None = None
        for window in plan_windows(len(features)):
            known = None if before is None else before[None]
            if tail is not None:
                known = tail[:, :, tail.shape[2] - window.known * LATENTS_PER_FEATURE :]
            end = {} if after is None or window.stop < len(features) else {"latents_after": after[None]}
            part = features[None, window.start : window.stop]
            told = None if chart is None else chart[None, window.start : window.stop]
            with native_autocast(features.device):
                tail = decoder.sample(
                    part,
                    steps=steps,
                    guidance=guidance,
                    generator=generator,
                    chart=told,
                    known_latents=known,
                    hear=hear,
                    **end,
                )
            rendered.append(tail[0, :, window.known * LATENTS_PER_FEATURE :])
            if progress is not None:
                progress(window.stop - window.start - window.known)
        return torch.cat(rendered, dim=1)

    def decode(self, latents: Tensor, samples: int, progress: Progress | None = None) -> Tensor:
        """Return the wave [2, samples] of latents [latent_dim, frames], computed in overlapping chunks."""
        if latents.ndim != 2 or latents.shape[0] != self.vae.latent_dim:
            raise ConfigError(
                f"the VAE needs latents [{self.vae.latent_dim}, frames], got {tuple(latents.shape)}"
            )
        return self.vae.decode_song(latents, samples, progress)

    def decode_between(
        self, latents: Tensor, before: Tensor, after: Tensor, progress: Progress | None = None
    ) -> Tensor:
        """Return the wave of latents as `decode` does, which goes on from a wave and leads into another.

        before, after [2, whole frames of latents]: what the wave begins and ends with, and be it nothing.
        """
        return self.vae.decode_between(latents, before, after, progress)

    def refuse_settings(self, **asked: float | None) -> None:
        """Do nothing: all settings of a rendering are this renderer's."""

    def _decoder(self, track: str) -> DiffusionDecoder:
        if track not in self.decoders:
            known = ", ".join(self.decoders)
            raise ConfigError(
                f"this model has no {track} decoder, only {known}; give a model with renderer/{track}"
            )
        return self.decoders[track]


class CodecRenderer:
    """Codes of an acoustic codec -> wave: what `Renderer` is to features, with nothing to sample."""

    def __init__(self, codec: AcousticCodec[Any]) -> None:
        self.codec = codec

    def to(self, device: str | torch.device) -> "CodecRenderer":
        """Move all weights."""
        self.codec.to(device)
        return self

    def refuse_settings(self, **asked: float | None) -> None:
        """Raise ConfigError for settings of a diffusion decoder, where any is not None."""
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise ConfigError(f"this model renders by a codec, in one pass; leave out {', '.join(given)}")

    def render_latents(self, features: Tensor, *, progress: Progress | None = None, **_: Any) -> Tensor:
        """Return the codes [codebooks, frames] of features [frames, codebooks], which are the codes."""
        if progress is not None:
            progress(len(features))
        return features.T

    def decode(self, latents: Tensor, samples: int, progress: Progress | None = None) -> Tensor:
        """Return the wave [2, samples] of codes [codebooks, frames]."""
        wave = self.codec.decode(latents[None], samples)[0]
        if progress is not None:
            progress(latents.shape[1])
        return wave
