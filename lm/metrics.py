"""How predictable codes are: the measures of P A.1 to A.4 and E.1, as the paper defines them."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from ..tokenizer.common.errors import DataError


def loss_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [batch, frames] in nats of logits [batch, frames, codes] on targets."""
    flat = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)


def target_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Return how many codes are predicted above each target, [batch, frames]; 0 is a hit at 1.

    Of equally likely codes the lower ones count as above, or a uniform guess would always be right.
    """
    scores = logits.gather(-1, targets[..., None])
    is_lower = torch.arange(logits.shape[-1], device=logits.device) < targets[..., None]
    return ((logits > scores) | ((logits == scores) & is_lower)).sum(dim=-1)


def accuracy_at(ranks: Tensor, k: int) -> float:
    """Return Acc@k: the share of targets among the k likeliest codes (P B.1.5)."""
    return (ranks < k).double().mean().item()


def nats_to_bits(nats: float) -> float:
    """Convert nats to bits: of a mean cross-entropy, bits per token; lower is better (P eq. 9)."""
    return nats / math.log(2)


def mean_index_bits(codebook_sizes: Sequence[int]) -> float:
    """Return the mean fixed index length of the codebooks of a step in bits (P eq. 14)."""
    return sum(math.log2(size) for size in codebook_sizes) / len(codebook_sizes)


def codebook_normalized_bits(bits: float | Sequence[float], codebook_sizes: Sequence[int]) -> float:
    """Return cnBPT: bits per token (of each codebook, or the mean) over the index length (P eq. 11 to 15)."""
    mean = bits if isinstance(bits, (int, float)) else sum(bits) / len(bits)
    return mean / mean_index_bits(codebook_sizes)


def entropy_normalized_bits(bits: float, entropy_bits: float) -> float:
    """Return enBPT: bits per token over the codes' unigram entropy on the evaluation set (P eq. 7, 16)."""
    if entropy_bits <= 0:
        raise DataError("the evaluation set uses a single code: enBPT is not defined")
    return bits / entropy_bits


def token_rate_hz(frame_rate_hz: float, codes_per_frame: int) -> float:
    """Return the token emission rate of a stream in tokens per second (P eq. 18)."""
    return frame_rate_hz * codes_per_frame


def index_bit_rate(frame_rate_hz: float, codebook_sizes: Sequence[int]) -> float:
    """Return the bit rate of a stream under fixed-length indices in bits per second (P eq. 19)."""
    return frame_rate_hz * sum(math.log2(size) for size in codebook_sizes)


def cross_entropy_rate(bits: Sequence[float], rates_hz: Sequence[float]) -> float:
    """Return bits per second: token rate times bits per token, summed over the streams (P A.3)."""
    return sum(each * rate for each, rate in zip(bits, rates_hz, strict=True))


def codebook_normalized_rate(cnbpt: Sequence[float], rates_hz: Sequence[float]) -> float:
    """Return cnBPS: token rate times cnBPT, summed over the streams, per second (P eq. 22, 23)."""
    return sum(ratio * rate for ratio, rate in zip(cnbpt, rates_hz, strict=True))


def code_counts(codes: Tensor, codebook_size: int) -> Tensor:
    """Return how often each code occurs, [codebook_size] int64."""
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= codebook_size):
        raise DataError(f"codes must be in 0..{codebook_size - 1}")
    return torch.bincount(codes.reshape(-1), minlength=codebook_size)


def unigram_entropy_bits(counts: Tensor) -> float:
    """Return the empirical entropy of the code distribution in bits (P E.1)."""
    total = counts.sum()
    if total == 0:
        raise DataError("there are no codes to take the entropy of")
    shares = counts[counts > 0].double() / total
    return -(shares * shares.log2()).sum().item() + 0.0


def unigram_bits(codes: Tensor, counts: Tensor) -> float:
    """Return mean bits of codes under how often each came elsewhere, counts [codebook_size], and once more.

    What a model that knows nothing but frequencies costs. The entropy of the codes themselves is less, and
    far less where they are few: of 1,200 uniform ones of 1,024 it is 9.3 bits, not 10.
    """
    shares = (counts + 1).double() / float((counts + 1).sum())
    return -shares[codes].log2().mean().item()


def normalized_entropy(counts: Tensor) -> float:
    """Return the unigram entropy over log2 of the codebook size, 0 to 1 (P E.1)."""
    return unigram_entropy_bits(counts) / math.log2(len(counts))


def utilization(counts: Tensor) -> float:
    """Return the share of codes that occur at least once (P E.1)."""
    return (counts > 0).double().mean().item()


def relative_gain_percent(bits: float, reference_bits: float) -> float:
    """Return by how many percent a loss is below another one; the same in any normalization (P A.2)."""
    return 100 * (1 - bits / reference_bits)


def rising_share(values: Sequence[float]) -> float:
    """Return the share of the steps from one value to the next that go up, 0 to 1; 1 = rising throughout."""
    if len(values) < 2:
        raise DataError("one value cannot rise or fall")
    return sum(after > before for before, after in pairwise(values)) / (len(values) - 1)


def corruption_cost_percent(corrupted_bits: float, intact_bits: float) -> float:
    """Return by how many percent a damaged source raises the loss; the normalization cancels (P eq. 8)."""
    return 100 * (corrupted_bits / intact_bits - 1)
