"""The measures of P A.1 to A.4 and E.1 against cases worked out by hand."""

import math

import pytest
import torch

from duotok.lm import metrics
from duotok.tokenizer.common.errors import DataError


def test_a_uniform_guess_costs_the_index_length() -> None:
    logits, targets = torch.zeros(2, 3, 16), torch.zeros(2, 3, dtype=torch.long)
    bits = metrics.bits_per_token(logits, targets).item()
    assert bits == pytest.approx(4.0)
    assert metrics.codebook_normalized_bits(bits, [16]) == pytest.approx(1.0)


def test_bits_per_token_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8: targets 0 and 2 cost 1 and 3 bits.
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125])).expand(1, 2, 4)
    targets = torch.tensor([[0, 2]])
    assert metrics.bits_per_token(logits, targets).item() == pytest.approx(2.0)
    nats = metrics.loss_nats(logits, targets)
    assert nats.shape == (1, 2)
    assert metrics.nats_to_bits(nats[0, 1].item()) == pytest.approx(3.0)


def test_several_codebooks_are_normalized_by_their_mean_index_length() -> None:
    # eq. 13 to 15: (3 + 6) / 2 bits over (10 + 11) / 2 bits, not the mean of 3/10 and 6/11.
    assert metrics.mean_index_bits([1024, 2048]) == pytest.approx(10.5)
    assert metrics.codebook_normalized_bits([3.0, 6.0], [1024, 2048]) == pytest.approx(4.5 / 10.5)


def test_the_paper_s_own_table_follows() -> None:
    # Table 5, DuoTok unconditional vocal: 6.911 bits of 15; eq. 17 with the normalized entropy 0.9188.
    ratio = metrics.codebook_normalized_bits(6.911, [32_768])
    assert ratio == pytest.approx(0.461, abs=5e-4)
    assert metrics.entropy_normalized_bits(6.911, 0.9188 * 15) == pytest.approx(0.501, abs=6e-4)


def test_rates_of_the_paper() -> None:
    # Table 6, DuoTok: 25 + 25 tokens per second, 0.75 kbps, 24 normalized units per second at cnBPT 0.48.
    assert metrics.token_rate_hz(25, 1) == 25
    assert metrics.token_rate_hz(75, 8) == 600
    assert metrics.index_bit_rate(25, [32_768]) == pytest.approx(375)
    assert metrics.codebook_normalized_rate([0.48, 0.48], [25, 25]) == pytest.approx(24.0)


def test_ranks_and_accuracy() -> None:
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]).expand(1, 4, 4)
    ranks = metrics.target_ranks(logits, torch.tensor([[0, 1, 2, 3]]))
    assert ranks.tolist() == [[0, 1, 2, 3]]
    assert metrics.accuracy_at(ranks, 1) == pytest.approx(0.25)
    assert metrics.accuracy_at(ranks, 3) == pytest.approx(0.75)


def test_codebook_use() -> None:
    counts = metrics.code_counts(torch.tensor([[0, 0, 1, 2]]), 8)
    assert counts.tolist() == [2, 1, 1, 0, 0, 0, 0, 0]
    assert metrics.unigram_entropy_bits(counts) == pytest.approx(1.5)
    assert metrics.normalized_entropy(counts) == pytest.approx(0.5)
    assert metrics.utilization(counts) == pytest.approx(3 / 8)
    assert metrics.unigram_entropy_bits(torch.tensor([5, 0])) == 0.0


def test_relative_cost_does_not_depend_on_the_normalization() -> None:
    cost = metrics.corruption_cost_percent(8.0, 6.4)
    assert cost == pytest.approx(25.0)
    normalized = [metrics.codebook_normalized_bits(bits, [2048]) for bits in (8.0, 6.4)]
    assert metrics.corruption_cost_percent(*normalized) == pytest.approx(cost)


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(DataError, match="0..7"):
        metrics.code_counts(torch.tensor([8]), 8)
    with pytest.raises(DataError, match="not defined"):
        metrics.entropy_normalized_bits(1.0, 0.0)
    with pytest.raises(DataError, match="no codes"):
        metrics.unigram_entropy_bits(torch.zeros(4))
    assert math.isfinite(metrics.normalized_entropy(torch.tensor([1, 1])))
