"""The linear start of the spectral VAE: principal components of weighted spectra, from a stream of waves."""

from collections.abc import Iterable

import torch
from torch import Tensor

from duotok.renderer.vae import SpectralVAE
from duotok.tokenizer.common.errors import DataError

SMALLEST_DEVIATION = 1e-3  # of a latent, so that silence does not become noise


class Moments:
    """Mean and covariance of vectors that come in pieces, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """values [count, dim]."""
        self.count += len(values)
        self.sum += values.sum(dim=0, dtype=torch.float64)
        self.products += (values.T @ values).double()

    def mean(self) -> Tensor:
        return self.sum / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.products / self.count - torch.outer(mean, mean)


@torch.no_grad()
def fit_linear(vae: SpectralVAE, waves: Iterable[Tensor]) -> None:
    """Fit the VAE's linear coding: the principal components of the features of waves [2, samples]."""
    dims = [vae.features.mid_dim, vae.features.side_dim]
    moments = [Moments(dim) for dim in dims]
    for wave in waves:
        weighted = vae.features(wave[None])[0] * vae.feature_weight
        for part, values in zip(moments, weighted.split(dims, dim=-1), strict=True):
            part.add(values)
    if moments[0].count < 2:
        raise DataError("no audio to fit the linear coding on; check the manifest")
    mid_basis, mid_scale = principal_components(moments[0].covariance(), vae.config.mid_latents)
    side_basis, side_scale = principal_components(moments[1].covariance(), vae.config.side_latents)
    mean = torch.cat([part.mean() for part in moments]).float() / vae.feature_weight
    vae.set_linear(
        mean=mean, mid_basis=mid_basis, side_basis=side_basis, scale=torch.cat([mid_scale, side_scale])
    )


def principal_components(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first components [dim, count], largest entry positive, and their deviations [count]."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    deviations = values.clamp_min(SMALLEST_DEVIATION**2).sqrt()
    return (vectors * largest.sign()).float(), deviations.float()
