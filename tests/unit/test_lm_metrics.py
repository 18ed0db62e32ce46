"""The measures of P A.1 to A.4 and E.1 against cases worked out by hand."""

import math

import pytest
import torch

from duotok.lm import metrics
from duotok.lm.dual_track.scoring import Scores
from duotok.recipes.evaluation.lm_part import describe_predictability, severity_figures
from duotok.tokenizer.common.errors import DataError


def bits_per_token(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return metrics.nats_to_bits(metrics.loss_nats(logits, targets).mean().item())


def test_a_uniform_guess_costs_the_index_length() -> None:
    logits, targets = torch.zeros(2, 3, 16), torch.zeros(2, 3, dtype=torch.long)
    bits = bits_per_token(logits, targets)
    assert bits == pytest.approx(4.0)
    assert metrics.codebook_normalized_bits(bits, [16]) == pytest.approx(1.0)


def test_a_perfect_prediction_costs_nothing() -> None:
    targets = torch.tensor([[3, 0, 1]])
    logits = 1000.0 * torch.nn.functional.one_hot(targets, 4)
    bits = bits_per_token(logits, targets)
    assert metrics.codebook_normalized_bits(bits, [4]) == 0.0
    assert metrics.accuracy_at(metrics.target_ranks(logits, targets), 1) == 1.0


def test_a_uniform_guess_is_right_as_often_as_chance() -> None:
    # Ties are broken by the code's number, as a top-k of sorted codes breaks them.
    targets = torch.arange(16)[None]
    ranks = metrics.target_ranks(torch.zeros(1, 16, 16), targets)
    assert [metrics.accuracy_at(ranks, k) for k in (1, 4, 16)] == [1 / 16, 4 / 16, 1.0]


def test_bits_per_token_by_hand() -> None:
    # Probabilities 1/2, 1/4, 1/8, 1/8: targets 0 and 2 cost 1 and 3 bits.
    logits = torch.log(torch.tensor([0.5, 0.25, 0.125, 0.125])).expand(1, 2, 4)
    targets = torch.tensor([[0, 2]])
    assert bits_per_token(logits, targets) == pytest.approx(2.0)
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


def test_the_two_ways_to_enbpt_agree() -> None:
    # Counts 4, 2, 1, 1 of 8 codes: entropy 1.75 bits, normalized 1.75 / 3; eq. 16 and eq. 17.
    counts = torch.tensor([4, 2, 1, 1, 0, 0, 0, 0])
    entropy, normalized = metrics.unigram_entropy_bits(counts), metrics.normalized_entropy(counts)
    assert (entropy, normalized) == (pytest.approx(1.75), pytest.approx(1.75 / 3))
    bits = 1.4
    ratio = metrics.codebook_normalized_bits(bits, [8])
    assert metrics.entropy_normalized_bits(bits, entropy) == pytest.approx(0.8)
    assert ratio / normalized == pytest.approx(0.8)
    # Guessing by the unigram distribution costs exactly the entropy: enBPT 1.
    logits = torch.log(counts.double().clamp_min(1e-300) / 8).expand(1, 8, 8)
    targets = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 3]])
    cost = bits_per_token(logits, targets)
    assert metrics.entropy_normalized_bits(cost, entropy) == pytest.approx(1.0)


def test_rates_of_the_paper() -> None:
    # Table 6, DuoTok: 25 + 25 tokens per second, 0.75 kbps, 24 normalized units per second at cnBPT 0.48.
    assert metrics.token_rate_hz(25, 1) == 25
    assert metrics.token_rate_hz(75, 8) == 600
    assert metrics.index_bit_rate(25, [32_768]) == pytest.approx(375)
    assert metrics.codebook_normalized_rate([0.48, 0.48], [25, 25]) == pytest.approx(24.0)
    # DAC: 75 Hz, 8 codebooks of 1,024: 6 kbps; eq. 22 with cnBPT 0.76 gives its 456.
    assert metrics.index_bit_rate(75, [1024] * 8) == pytest.approx(6000)
    assert metrics.codebook_normalized_rate([0.76], [metrics.token_rate_hz(75, 8)]) == pytest.approx(456)
    # Codebooks of different sizes add up (eq. 19), and so do streams (eq. 20, 23).
    assert metrics.index_bit_rate(25, [4, 16]) == pytest.approx(25 * 6)
    assert metrics.cross_entropy_rate([2.0, 3.0], [25, 50]) == pytest.approx(200)
    # eq. 23's equivalent: all tokens per second times their mean cnBPT.
    assert metrics.codebook_normalized_rate([0.4, 0.7], [25, 50]) == pytest.approx(75 * (0.4 + 2 * 0.7) / 3)


def test_ranks_and_accuracy() -> None:
    logits = torch.tensor([[[3.0, 2.0, 1.0, 0.0]]]).expand(1, 4, 4)
    ranks = metrics.target_ranks(logits, torch.tensor([[0, 1, 2, 3]]))
    assert ranks.tolist() == [[0, 1, 2, 3]]
    assert metrics.accuracy_at(ranks, 1) == pytest.approx(0.25)
    assert metrics.accuracy_at(ranks, 3) == pytest.approx(0.75)


def test_frequencies_of_other_songs_cost_more_than_the_entropy() -> None:
    codes, others = torch.randint(64, (2, 200), generator=torch.Generator().manual_seed(0))
    counts = metrics.code_counts(others, 64)
    assert metrics.unigram_bits(torch.tensor([0, 1]), torch.tensor([2, 0])) == pytest.approx(
        (0.415 + 2) / 2, abs=1e-3
    )
    assert (
        metrics.unigram_entropy_bits(metrics.code_counts(codes, 64))
        < 5.9
        < 6
        < metrics.unigram_bits(codes, counts)
    )


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


def test_gains_and_rising_steps() -> None:
    # P 5.2: 0.464 with the vocal, 0.506 without, 8.3 % lower.
    assert metrics.relative_gain_percent(0.464, 0.506) == pytest.approx(8.3, abs=0.01)
    assert metrics.rising_share([1.0, 2.0, 2.0, 5.0]) == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="one value"):
        metrics.rising_share([1.0])


def constant_scores(**bits: list[float]) -> Scores:
    """Two windows of 100 frames; each track costs its bits in the frames 0-49 and 50-99."""
    halves = torch.tensor([0] * 50 + [1] * 50)
    nats = {t: (torch.tensor(b)[halves] * math.log(2)).expand(2, 100) for t, b in bits.items()}
    ranks = {track: torch.arange(100).expand(2, 100) for track in bits}
    return Scores(loss_nats=nats, ranks=ranks, prefix_frames=0)


def test_all_figures_of_a_hand_made_case() -> None:
    codes = {
        "vocal": torch.arange(4).repeat(2, 25),
        "accompaniment": torch.arange(32).repeat(7)[:200].view(2, 100),
    }
    scores = {
        "unconditional": constant_scores(vocal=[2.0, 2.0], accompaniment=[4.0, 2.0]),
        "vocal_to_accompaniment": constant_scores(accompaniment=[9.0, 1.5]),
        "mismatch": constant_scores(accompaniment=[9.0, 9.0]),  # no mode of its own: left alone
    }
    found = describe_predictability(scores, codes, {"vocal": 16, "accompaniment": 32}, rate_hz=25.0)
    expected = {
        "bpt_unconditional_vocal": 2.0,
        "cnbpt_unconditional_vocal": 0.5,
        "enbpt_unconditional_vocal": 1.0,  # four codes alike: 2 bits of entropy
        "utilization_vocal": 0.25,
        "normalized_entropy_vocal": 0.5,
        "cnbpt_unconditional_accompaniment": 0.6,
        "cnbpt_vocal_to_accompaniment": 0.3,  # without the 2 s of prefix
        "conditional_gain_percent": 50.0,
        "conditional_gain_same_frames_percent": 25.0,
        "acc_at_10_unconditional_vocal": 0.1,
        "acc_at_50_vocal_to_accompaniment": 0.0,
        "cnbpt_unconditional_average": 2.5 / 4.5,
        "token_rate_hz": 50.0,
        "index_kbps_vocal": 0.1,
        "index_kbps": 0.225,
        "model_kbps_unconditional": 0.125,
        "cnbps_unconditional": 27.5,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    average = (found["enbpt_unconditional_vocal"] + found["enbpt_unconditional_accompaniment"]) / 2
    assert found["enbpt_unconditional_average"] == pytest.approx(average)


def test_severity_says_whether_every_step_counts() -> None:
    expected = {
        "shift_cost_least_x_percent": 1.0,
        "shift_cost_rise_x_percent": 3.0,
        "shift_cost_rising_share_x": 0.5,
    }
    assert severity_figures("shift", "_x", [1.0, 5.0, 4.0]) == expected
    assert severity_figures("mask", "", [2.0]) == {"mask_cost_least_percent": 2.0}


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(DataError, match="0..7"):
        metrics.code_counts(torch.tensor([8]), 8)
    with pytest.raises(DataError, match="not defined"):
        metrics.entropy_normalized_bits(1.0, 0.0)
    with pytest.raises(DataError, match="no codes"):
        metrics.unigram_entropy_bits(torch.zeros(4))
    assert math.isfinite(metrics.normalized_entropy(torch.tensor([1, 1])))
