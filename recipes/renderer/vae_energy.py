"""Gains that give decoded sound the energy it lost: the best guess of a compressed value is too soft."""

from collections.abc import Iterable

import torch
from torch import Tensor

from duotok.renderer.stereo import band_filters
from duotok.renderer.vae import SpectralVAE
from duotok.tokenizer.common.errors import DataError

_LARGEST_GAIN = 2.0  # of a magnitude
# Of the middle's missing decibels. What is lost is lost from peaks: the whole of it would bring the loudness
# back exactly, but make everything between the peaks too loud (log10-mel L1 0.171 against 0.163 at a half).
_MID_SHARE = 2 / 3


@torch.no_grad()
def fit_energy_gains(vae: SpectralVAE, waves: Iterable[Tensor]) -> None:
    """Set the VAE's feature gains so that waves [2, samples] about keep their mean energy in every band.

    Each wave counts the same whatever its level. The side regains its energy relative to the middle wholly,
    the middle two thirds of its missing decibels.
    """
    features = vae.features
    filters = band_filters(features.pooled.frequencies_hz(), features.part_dim).to(features.band_filters)
    vae.feature_gain.fill_(1)
    sums = torch.zeros(4, features.part_dim, dtype=torch.float64)  # mid, found mid, side, found side
    for wave in waves:
        target = features(wave[None].to(vae.feature_gain))[0]
        found = vae.decode_features(vae.encode_features(target[None]))[0]
        power, found_power = (features.magnitudes(values).square() @ filters for values in (target, found))
        width, found_width = (
            with_mid.square() + beside.clamp_min(0).square()  # as side_spectrum does
            for with_mid, beside in (x[:, features.mid_dim :].chunk(2, dim=-1) for x in (target, found))
        )
        energies = torch.stack([power, found_power, power * width, power * found_width]).sum(dim=1)
        energies = energies.double().cpu()
        if energies[0].sum() > 0:
            sums += energies / energies[0].sum()
    if not sums[0].sum() > 0:
        raise DataError("only silence to fit energy gains on; check the manifest")
    mid, side = ((sums[i] + 1e-9) / (sums[i + 1] + 1e-9) for i in (0, 2))
    mid_gain, side_gain = (x.sqrt().clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN).to(filters) for x in (mid, side))
    vae.feature_gain[: features.mid_dim] = (filters @ mid_gain).pow(_MID_SHARE * features.power)
    vae.feature_gain[features.mid_dim :] = side_gain.repeat(2)
