"""SimVQ: vector quantization by a frozen codebook under one learned linear map."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common.errors import ConfigError

DISTANCES_AT_A_TIME = 2**25  # of k-means: bounds its memory to a few times 128 MB


class Quantized(NamedTuple):
    """Codes and what trains them."""

    codes: Tensor  # [batch, frames] int64
    vectors: Tensor  # [batch, frames, code_dim]; value of the codes, gradient of the features
    commitment: Tensor  # scalar
    usage: Tensor  # scalar, nats below the entropy of uniform use of the codes


class VectorQuantizer(nn.Module):
    """Nearest code of each feature, straight-through gradients, and what trains the codes.

    A subclass says what the codes are: `basis` [codebook_size, code_dim] and the entries made of it.
    """

    basis: Tensor
    commitment_weight: float

    def entries(self) -> Tensor:
        """Return the code vectors [codebook_size, code_dim]."""
        return self.basis

    def encode(self, features: Tensor) -> Tensor:
        """Return the nearest code of each frame: features [batch, frames, code_dim] -> [batch, frames]."""
        return squared_distances(features, self.entries()).argmin(dim=-1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize features [batch, frames, code_dim]."""
        entries = self.entries()
        distances = squared_distances(features, entries)
        codes = distances.argmin(dim=-1)
        vectors = functional.embedding(codes, entries)
        commitment = (vectors - features.detach()).square().mean()
        commitment = commitment + self.commitment_weight * (vectors.detach() - features).square().mean()
        # Soft assignments, as sharp as the distances to the nearest codes are typical.
        temperature = distances.detach().amin(dim=-1).mean().clamp_min(1e-6)
        soft = torch.softmax(-distances / temperature * 2.0, dim=-1).flatten(0, -2).mean(dim=0)
        usage = math.log(len(entries)) + (soft * soft.clamp_min(1e-12).log()).sum()
        # Straight-through: the value is the code's, the gradient is the feature's.
        straight = features + (vectors - features).detach()
        return Quantized(codes=codes, vectors=straight, commitment=commitment, usage=usage)

    @torch.no_grad()
    def fit_to(self, features: Tensor, iterations: int = 12) -> None:
        """Start the codes from the k-means centres of features [n, code_dim]."""
        self.basis.copy_(k_means(features, len(self.basis), iterations))


class SimVQ(VectorQuantizer):
    """Quantize by a frozen codebook under one learned linear map (P 3.3, eq. 4).

    The codebook is random until `fit_to` gives it a start from data.
    """

    def __init__(self, codebook_size: int, code_dim: int, commitment_weight: float = 0.25) -> None:
        super().__init__()
        self.commitment_weight = commitment_weight
        self.register_buffer("basis", torch.randn(codebook_size, code_dim))
        self.map = nn.Linear(code_dim, code_dim)

    def entries(self) -> Tensor:
        """Return the code vectors [codebook_size, code_dim]."""
        return self.map(self.basis)

    @torch.no_grad()
    def fit_to(self, features: Tensor, iterations: int = 12) -> None:
        """Take the k-means centres of features [n, code_dim] as the frozen codebook, under the identity map.

        A codebook drawn from a normal distribution leaves most of its codes where there are no features; from
        centres every code is in use from the first step on.
        """
        super().fit_to(features, iterations)
        self.map.weight.copy_(torch.eye(self.basis.shape[1]))
        self.map.bias.zero_()


@torch.no_grad()
def k_means(features: Tensor, count: int, iterations: int) -> Tensor:
    """Return `count` centres [count, dim] of features [n, dim], the same for the same features.

    Raises ConfigError when there are fewer features than centres.
    """
    if len(features) < count:
        raise ConfigError(f"{count} codes need at least as many frames, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    centres = features[order[:count]].clone()
    rows = max(1, DISTANCES_AT_A_TIME // count)
    for _ in range(iterations):
        parts = [squared_distances(part, centres).min(dim=-1) for part in features.split(rows)]
        nearest = torch.cat([part.indices for part in parts])
        counts = torch.bincount(nearest, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, nearest, features)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        # Codes that nothing chose move to the frames that are served worst.
        unused = counts == 0
        worst = torch.cat([part.values for part in parts]).topk(int(unused.sum())).indices
        centres[unused] = features[worst]
    return centres


def squared_distances(features: Tensor, entries: Tensor) -> Tensor:
    """Return the squared distances [..., entries] of features [..., dim] to entries [entries, dim]."""
    features = features.float()
    norms = features.square().sum(dim=-1, keepdim=True) + entries.square().sum(dim=-1)
    return (norms - 2 * features @ entries.T).clamp_min(0)
