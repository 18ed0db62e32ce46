"""Vector quantizers: SimVQ, plain VQ, VQ by moving averages, and residual VQ, levels of either of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .common.errors import ConfigError

DISTANCES_AT_A_TIME = 2**25  # bounds their memory to a few times 128 MB, however many codes and frames


class Quantized(NamedTuple):
    """Codes and what trains them; how much each loss weighs is for the objective to say."""

    codes: Tensor  # [batch, frames] int64
    vectors: Tensor  # [batch, frames, code_dim]; value of the codes, gradient of the features
    commitment: Tensor  # scalar, mean squared error whose gradient draws the features to their codes
    codebook: Tensor  # scalar, the same error, but its gradient draws the codes to their features
    usage: Tensor  # scalar, nats below the entropy of uniform use of the codes


QUANTIZER_LOSSES = ("commitment", "codebook", "usage")


class VectorQuantizer(nn.Module):
    """Nearest code of each feature, straight-through gradients, and what trains the codes.

    A subclass says what the codes are: `basis` [codebook_size, code_dim] and its entries. Codes are
    chosen in float32, inside of autocast too: bfloat16 distances would choose other codes.
    """

    basis: Tensor

    def entries(self) -> Tensor:
        """Return the code vectors [codebook_size, code_dim], in float32."""
        return self.basis

    def encode(self, features: Tensor) -> Tensor:
        """Return the nearest code of each frame: features [batch, frames, code_dim] -> [batch, frames]."""
        return nearest(features, self.entries())[0]

    def forward(self, features: Tensor) -> Quantized:
        """Quantize features [batch, frames, code_dim]."""
        features, entries = features.float(), self.entries()
        codes, distances = nearest(features, entries)
        vectors = functional.embedding(codes, entries)
        # Soft assignments, as sharp as the distances to the nearest codes are typical.
        temperature = distances.mean().clamp_min(1e-6)
        parts = features.flatten(0, -2).split(rows_at_a_time(entries))
        # Recomputed for the gradient, so that no table [frames, codebook_size] is kept.
        soft = [checkpoint(_soft_use, part, entries, temperature, use_reentrant=False) for part in parts]
        use = torch.stack(soft).sum(dim=0) / codes.numel()
        return Quantized(
            codes=codes,
            # Straight-through: the value is the code's, the gradient is the feature's.
            vectors=features + (vectors - features).detach(),
            commitment=(vectors.detach() - features).square().mean(),
            codebook=(vectors - features.detach()).square().mean(),
            usage=math.log(len(entries)) + (use * use.clamp_min(1e-12).log()).sum(),
        )

    @torch.no_grad()
    def fit_to(self, features: Tensor, iterations: int = 12) -> None:
        """Start the codes from the k-means centres of features [n, code_dim]."""
        self.basis.copy_(k_means(features, len(self.basis), iterations))


class SimVQ(VectorQuantizer):
    """A frozen codebook, random or from `fit_to`, under one learned linear map (P 3.3, eq. 4)."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(codebook_size, code_dim))
        self.map = nn.Linear(code_dim, code_dim)

    def entries(self) -> Tensor:
        """Return the code vectors [codebook_size, code_dim], in float32."""
        with full_precision(self.basis):
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


class PlainVQ(VectorQuantizer):
    """Quantize by a codebook whose entries are learned one by one (VQ-VAE, arXiv 1711.00937, eq. 3).

    Only entries that were chosen get a gradient from the codebook loss, so that entries can die; SimVQ's one
    map moves them all. `fit_to` gives the same k-means start as SimVQ's.
    """

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.basis = nn.Parameter(torch.randn(codebook_size, code_dim))


class MovingAverageVQ(VectorQuantizer):
    """Entries are moving averages of the features that chose them (VQ-VAE, arXiv 1711.00937, A.1).

    An entry that is chosen by less than `DEAD_SHARE` of its even share moves to a random feature of the
    batch (as in Jukebox, arXiv 2005.00341, 3.1). No gradients: `learn` takes the place of a codebook loss.
    """

    DECAY = 0.99
    DEAD_SHARE = 0.03

    share: Tensor  # [codebook_size], of the features that chose each entry, lately

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("basis", torch.randn(codebook_size, code_dim))
        self.register_buffer("share", torch.full((codebook_size,), 1 / codebook_size))

    @torch.no_grad()
    def learn(self, features: Tensor, codes: Tensor) -> None:
        """Move the entries to the features [n, code_dim] that chose them by codes [n]."""
        size = len(self.basis)
        sums = torch.zeros(size, self.basis.shape[1] + 1, device=features.device)
        ones = torch.ones_like(features[:, :1])
        sums.index_add_(0, codes, torch.cat([features, ones], dim=1))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        total, counts = sums[:, :-1], sums[:, -1]
        if not counts.any():
            return
        now = counts / counts.sum()
        # An entry and its share together are the average of EMA sums: chosen often, it moves by 1 - DECAY.
        moved = self.share.mul(self.DECAY) + now * (1 - self.DECAY)
        centres = total / counts.clamp_min(1)[:, None]
        self.basis.lerp_(centres, (now * (1 - self.DECAY) / moved.clamp_min(1e-9))[:, None])
        self.share.copy_(moved)
        if len(features):
            dead = self.share < self.DEAD_SHARE / size
            # Other processes draw others; the first one's hold, for its buffers are sent before each step.
            drawn = torch.randint(len(features), (int(dead.sum()),), device=features.device)
            self.basis[dead] = features[drawn]
            self.share[dead] = 1 / size


class ResidualQuantized(NamedTuple):
    """Codes of all levels, and what trains an encoder before and codes behind them."""

    codes: Tensor  # [batch, levels, frames] int64
    vectors: Tensor  # [batch, frames, dim]; value of the kept levels' codes, gradient of the features
    commitment: Tensor  # scalar, mean squared error whose gradient draws the features to their codes
    codebook: Tensor  # scalar, the same, but its gradient draws the codes to their features


RESIDUAL_QUANTIZERS: dict[str, type[VectorQuantizer]] = {"moving_average": MovingAverageVQ, "simvq": SimVQ}


class ResidualQuantizer(nn.Module):
    """Levels of codebooks, each for what those before it leave (SoundStream, arXiv 2107.03312, III-C)."""

    def __init__(self, levels: int, codebook_size: int, dim: int, quantizer: str = "moving_average") -> None:
        super().__init__()
        make = RESIDUAL_QUANTIZERS[quantizer]
        self.levels = nn.ModuleList(make(codebook_size, dim) for _ in range(levels))

    def level(self, number: int) -> VectorQuantizer:
        """Return the quantizer of a level."""
        level = self.levels[number]
        assert isinstance(level, VectorQuantizer)
        return level

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> codes [batch, levels, frames]."""
        rest, codes = features.float(), []
        for number in range(len(self.levels)):
            codes.append(self.level(number).encode(rest))
            rest = rest - functional.embedding(codes[-1], self.level(number).entries())
        return torch.stack(codes, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [batch, 1..levels, frames] -> the sum of their vectors [batch, frames, dim]."""
        parts = [
            functional.embedding(each, self.level(number).entries())
            for number, each in enumerate(codes.unbind(dim=1))
        ]
        return torch.stack(parts).sum(dim=0)

    def forward(self, features: Tensor, kept: Tensor | None = None) -> ResidualQuantized:
        """Quantize features [batch, frames, dim]; kept [batch]: levels of each example, all by default.

        In training mode the codebooks of moving averages learn, each from the examples that keep its level.
        """
        features = features.float()
        rest, total = features, torch.zeros_like(features)
        codes, commitment, codebook, numbers = [], [], [], 0.0
        for number in range(len(self.levels)):
            quantizer = self.level(number)
            chosen = quantizer.encode(rest)
            vectors = functional.embedding(chosen, quantizer.entries())
            used = torch.ones_like(chosen[:, 0]) if kept is None else (kept > number).long()
            mask = used[:, None, None]
            # Levels that nothing keeps stay in the graph, and learn from nothing: processes must not differ.
            commitment.append(((vectors.detach() - rest) * mask).square().sum())
            codebook.append(((vectors - rest.detach()) * mask).square().sum())
            numbers = numbers + used.sum() * features[0].numel()
            if self.training and isinstance(quantizer, MovingAverageVQ):
                quantizer.learn(rest[used > 0].detach().flatten(0, 1), chosen[used > 0].flatten())
            total = total + vectors * mask
            rest = rest - (vectors * mask).detach()
            codes.append(chosen)
        return ResidualQuantized(
            codes=torch.stack(codes, dim=1),
            # The value is the codes', the gradient goes to the features and to codes that have one.
            vectors=total + features - features.detach(),
            commitment=torch.stack(commitment).sum() / numbers,
            codebook=torch.stack(codebook).sum() / numbers,
        )

    @torch.no_grad()
    def fit_to(self, features: Tensor, iterations: int = 12) -> None:
        """Start each level from the k-means centres of what the levels before leave of features [n, dim]."""
        rest = features.float()
        for number in range(len(self.levels)):
            quantizer = self.level(number)
            quantizer.fit_to(rest, iterations)
            rest = rest - functional.embedding(quantizer.encode(rest), quantizer.entries())


@torch.no_grad()
def nearest(features: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest entry [...] of features [..., dim] and its squared distance, in bounded memory."""
    parts = features.flatten(0, -2).split(rows_at_a_time(entries))
    found = [squared_distances(part, entries).min(dim=-1) for part in parts]
    distances, codes = (torch.cat(each).view(features.shape[:-1]) for each in zip(*found, strict=True))
    return codes, distances


@torch.no_grad()
def k_means(features: Tensor, count: int, iterations: int) -> Tensor:
    """Return centres [count, dim] of features [n, dim], always the same; ConfigError where n < count."""
    if len(features) < count:
        raise ConfigError(f"{count} codes need at least as many frames, got {len(features)}")
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    centres = features[order[:count]].clone()
    for _ in range(iterations):
        codes, distances = nearest(features, centres)
        counts = torch.bincount(codes, minlength=count)
        sums = torch.zeros_like(centres).index_add_(0, codes, features)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        # Codes that nothing chose move to the frames that are served worst.
        unused = counts == 0
        centres[unused] = features[distances.topk(int(unused.sum())).indices]
    return centres


def squared_distances(features: Tensor, entries: Tensor) -> Tensor:
    """Return the squared distances [..., entries] of features [..., dim] to entries [entries, dim]."""
    with full_precision(features):
        features, entries = features.float(), entries.float()
        norms = features.square().sum(dim=-1, keepdim=True) + entries.square().sum(dim=-1)
        return (norms - 2 * features @ entries.T).clamp_min(0)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Return a context in which nothing on the tensor's device is cast to half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def rows_at_a_time(entries: Tensor) -> int:
    """Return how many features may be compared with all entries at once."""
    return max(1, DISTANCES_AT_A_TIME // len(entries))


def _soft_use(features: Tensor, entries: Tensor, temperature: Tensor) -> Tensor:
    """Return how often each entry is chosen [entries] by features [n, dim], each choice being soft."""
    return torch.softmax(-squared_distances(features, entries) / temperature * 2.0, dim=-1).sum(dim=0)
