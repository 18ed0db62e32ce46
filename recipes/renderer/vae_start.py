"""A VAE that begins where another one ended: its middle, better where it missed most, and a new side."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.renderer.vae_linear import SMALLEST_DEVIATION, Moments, principal_components
from duotok.renderer.vae import SpectralVAE
from duotok.tokenizer.common.errors import ConfigError, DataError

_SAME = ("fft_size", "hop_samples", "low_bins", "group", "power", "corner_hz")
_CODING = ("mid_latents", "side_latents", "side_coding", "side_bands")  # beside those
_SAME_DECODER = ("decoder_blocks", "dim", "kernel_frames")
_BASS_HZ = 320.0  # where single partials carry the most and few bins hold them
_TREBLE_WEIGHT = 0.25  # of an error above


@torch.no_grad()
def fit_from_start(vae: SpectralVAE, start: SpectralVAE, waves: Iterable[Tensor]) -> None:
    """Take over the start's coding of the middle and its decoder; add components; fit the side.

    The added components are those of what the start's decoding misses of the middle, below 320 Hz above all;
    along them the decoder's correction is taken out, so that their latents alone decide. waves [2, samples].
    Where the coding is the same as the start's it is kept to the last bit, side and all: only the decoder
    goes on, and latents made by the start stay good.
    """
    _require_same(vae, start)
    if all(getattr(vae.config, name) == getattr(start.config, name) for name in _CODING):
        _take_over_all(vae, start)
        return
    mid_dim, known = vae.features.mid_dim, start.config.mid_latents
    weight = vae.feature_weight[:mid_dim]
    frequencies = vae.features.pooled.frequencies_hz().to(weight)
    emphasis = torch.where(frequencies < _BASS_HZ, 1.0, _TREBLE_WEIGHT)
    middle, missed, side = Moments(mid_dim), Moments(mid_dim), Moments(vae.features.side_dim)
    for wave in waves:
        features = vae.features(wave[None])
        centred = (features[..., :mid_dim] - start.feature_mean[:mid_dim]) * weight
        middle.add(centred[0])
        error = centred - _decode_middle(start, centred)
        error = error - (error @ start.mid_basis) @ start.mid_basis.T
        missed.add(error[0] * emphasis)
        side.add(features[0, :, mid_dim:] * vae.feature_weight[mid_dim:])
    if side.count < 2:
        raise DataError("no audio to fit the coding on; check the manifest")
    side_basis, side_scale = principal_components(side.covariance(), vae.config.side_latents)
    added = principal_components(missed.covariance(), vae.config.mid_latents - known)[0]
    added = added * emphasis[:, None]
    added = torch.linalg.qr(added - start.mid_basis @ (start.mid_basis.T @ added))[0]
    mid_mean = start.feature_mean[:mid_dim] + added @ (added.T @ middle.mean().float()) / weight
    variance = (added.double() * (middle.covariance() @ added.double())).sum(dim=0)
    added_scale = variance.clamp_min(SMALLEST_DEVIATION**2).sqrt().float()
    side_mean = side.mean().float() / vae.feature_weight[mid_dim:]
    vae.set_linear(
        mean=torch.cat([mid_mean, side_mean]),
        mid_basis=torch.cat([start.mid_basis, added], dim=1),
        side_basis=side_basis,
        scale=torch.cat([start.latent_scale[:known], added_scale, side_scale]),
    )
    if vae.decoder is not None:
        _take_over_decoder(vae, start, added)


def _take_over_all(vae: SpectralVAE, start: SpectralVAE) -> None:
    """Copy coding and decoder; the energy gains are left at 1, for they are fitted after training."""
    vae.set_linear(
        mean=start.feature_mean,
        mid_basis=start.mid_basis,
        side_basis=start.side_basis,
        scale=start.latent_scale,
    )
    if vae.decoder is not None and start.decoder is not None:
        vae.decoder.load_state_dict(start.decoder.state_dict())


def _decode_middle(start: SpectralVAE, centred: Tensor) -> Tensor:
    """Weighted middle [1, frames, mid_dim] through the start's coding, the side at its mean."""
    linear = centred @ start.mid_basis
    found = linear @ start.mid_basis.T
    if start.decoder is None:
        return found
    latents = linear / start.latent_scale[: start.config.mid_latents]
    latents = functional.pad(latents, (0, start.config.side_latents))
    return found + start.decoder(latents)[..., : centred.shape[-1]]


def _take_over_decoder(vae: SpectralVAE, start: SpectralVAE, added: Tensor) -> None:
    """Copy the correction of the middle: blind to the new latents, and without a part along `added`."""
    assert vae.decoder is not None and start.decoder is not None
    weights = dict(start.decoder.state_dict())
    known, mid_dim = start.config.mid_latents, vae.features.mid_dim
    for name, value in vae.decoder.state_dict().items():
        if name == "enter.weight":
            value.zero_()[:, :known] = weights[name][:, :known]
        elif name.startswith("leave."):
            mid = weights[name][:mid_dim]
            value.zero_()[:mid_dim] = mid - added @ (added.T @ mid)
        else:
            value.copy_(weights[name])


def _require_same(vae: SpectralVAE, start: SpectralVAE) -> None:
    names = (*_SAME, *(_SAME_DECODER if vae.config.decoder_blocks or start.config.decoder_blocks else ()))
    for name in names:
        here, there = getattr(vae.config, name), getattr(start.config, name)
        if here != there:
            raise ConfigError(f"model.{name} is {here} but {there} in the start; set it to {there}")
    if start.encoder is not None or vae.encoder is not None:
        raise ConfigError("model.encoder_blocks must be 0, here and in the VAE to start from")
    if vae.config.mid_latents < start.config.mid_latents:
        raise ConfigError(
            f"model.mid_latents must be at least the {start.config.mid_latents} of the VAE to start from"
        )
