"""The diagnostics' measures on models and codes of which the right answer is known."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.recipes.evaluation.lm_part import Windows, cut_pieces, measure_codes, measure_context
from duotok.recipes.research.diagnosis import count_usage, measure_corruption, relative_cost
from duotok.recipes.research.probe import score_majority
from duotok.recipes.research.probe_training import score_classes
from duotok.tokenizer.common.errors import DataError

RATE_HZ = 25.0


def make_windows(count=4, frames=150, codes=64, seed=3) -> Windows:
    vocal = torch.randint(0, codes, (count, frames), generator=torch.Generator().manual_seed(seed))
    return Windows(
        codes={"vocal": vocal, "accompaniment": vocal.clone()},  # the vocal tells everything
        partners=[(index + 1) % count for index in range(count)],
        rate_hz=RATE_HZ,
    )


@pytest.fixture(scope="module")
def listening_lm(tiny_components) -> DualTrackLM:
    """A tiny model that has learned to sing along: the accompaniment repeats the vocal."""
    torch.manual_seed(0)
    lm = DualTrackLM.from_pretrained(tiny_components["lm"])
    lm.sheet = lm.sheet_reader = None  # what a random reader makes of a vocal would be noise in the costs
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for step in range(60):
        codes = make_windows(frames=100, seed=step).codes
        logits = lm(lm.lay_out(codes, "vocal_to_accompaniment"))["accompaniment"]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes["accompaniment"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


def test_a_model_that_listens_pays_for_every_damage(listening_lm):
    found = measure_corruption(listening_lm, make_windows())
    assert list(found.shifts) == [0.04, 0.08, 0.2, 0.5, 1.0, 2.0, 4.0]  # those that fit into 6 s
    for costs in (*found.shifts.values(), found.mismatch, found.masks[1.0]):
        assert costs["whole"].percent > 50 and costs["first_5s"].percent > 50
        assert 0 < costs["whole"].error_percent < costs["whole"].percent
    rising = [found.masks[share]["whole"].percent for share in sorted(found.masks)]
    assert rising == sorted(rising) and rising[0] > 0


def test_costs_are_those_of_the_lm_part(tiny_components):
    lm, windows = DualTrackLM.from_pretrained(tiny_components["lm"]), make_windows()
    here = measure_corruption(lm, windows, seed=5).figures()
    there = measure_codes(lm, windows.codes, windows.partners, RATE_HZ, seed=5)
    for name, other in (("mismatch", "mismatch"), ("shift_1000ms", "shift_1s"), ("mask_50", "mask_half")):
        assert here[f"{name}_cost_percent"] == pytest.approx(there[f"{other}_cost_percent"], abs=1e-4)
        first = there[f"{other}_cost_first_5s_percent"]
        assert here[f"{name}_cost_first_5s_percent"] == pytest.approx(first, abs=1e-4)


def test_the_standard_error_is_that_of_a_ratio_of_means():
    generator = np.random.default_rng(0)
    intact = generator.uniform(3, 5, 400)
    damaged = 1.1 * intact + generator.normal(0, 0.5, 400)
    cost = relative_cost(torch.tensor(damaged), torch.tensor(intact))
    assert cost.percent == pytest.approx(100 * (damaged.mean() / intact.mean() - 1))
    residual = damaged - damaged.mean() / intact.mean() * intact
    assert cost.error_percent == pytest.approx(100 * residual.std() / intact.mean() / 20, rel=0.02)
    assert relative_cost(torch.tensor([2.0]), torch.tensor([1.0])).error_percent == 0


def test_pieces_cover_the_windows_and_name_their_ends():
    codes = {"vocal": torch.arange(60).view(2, 30), "accompaniment": torch.arange(60).view(2, 30)}
    pieces, ends = cut_pieces(codes, 20)  # does not divide 30: the two pieces overlap
    assert pieces["vocal"][:, 0].tolist() == [0, 30, 10, 40]
    assert pieces["vocal"][ends][:, -1].tolist() == [29, 59]
    whole, ends = cut_pieces(codes, 30)
    assert torch.equal(whole["vocal"], codes["vocal"]) and ends.tolist() == [0, 1]


def test_context_counts_the_same_frames_with_more_of_the_song(tiny_components):
    lm, windows = DualTrackLM.from_pretrained(tiny_components["lm"]), make_windows()
    found = measure_context(lm, windows, lengths_seconds=(4.0, 6.0, 60.0))
    series = {"unconditional_vocal", "unconditional_accompaniment"}
    series |= {"vocal_to_accompaniment", "accompaniment_to_vocal"}
    assert set(found.whole) == set(found.last) == series
    assert all(list(curve) == [4.0, 6.0] for curve in found.whole.values())
    assert found.last_seconds == 2.0
    scores = score_batch(lm, windows.codes["vocal"], windows.codes["accompaniment"], "unconditional")
    bits = scores.loss_nats["vocal"][:, -50:].mean().item() / np.log(2) / 6
    assert found.last["unconditional_vocal"][6.0] == pytest.approx(bits, rel=1e-5)
    figures = found.figures()
    short, long = (figures[f"cnbpt_vocal_to_accompaniment_same_frames_{s}s"] for s in (4, 6))
    assert figures["gain_vocal_to_accompaniment_percent"] == pytest.approx(100 * (1 - long / short))


def test_usage_of_uniform_and_of_collapsed_codes():
    codes = {"vocal": torch.arange(64).repeat(10), "accompaniment": torch.tensor([0] * 600 + [5] * 40)}
    usage = count_usage([codes, codes], {"vocal": 64, "accompaniment": 64})
    vocal, band = usage["vocal"].figures(), usage["accompaniment"].figures()
    assert vocal["vocal_utilization"] == vocal["vocal_normalized_entropy"] == 1
    assert vocal["vocal_perplexity_codes"] == pytest.approx(64)
    assert band["accompaniment_utilization"] == 2 / 64
    assert band["accompaniment_share_of_most_used_tenth"] == 1
    assert band["accompaniment_perplexity_codes"] < 2
    few = count_usage([{track: rows[:64] for track, rows in codes.items()}], dict.fromkeys(codes, 64))
    # 64 draws of 64 equally likely codes reach about 1 - 1/e of them.
    assert few["vocal"].figures()["vocal_utilization_of_uniform_codes"] == pytest.approx(
        1 - np.exp(-1), abs=0.01
    )


def test_scores_leave_out_what_cannot_be_tested():
    truth = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [np.nan] * 3], dtype=np.float32)
    scores = np.array([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]])
    found = score_classes(truth, scores)
    assert found.recordings == 3
    assert found.accuracy == pytest.approx(1 / 3)
    # Class 2 has no positive: means over the other two.
    assert found.roc_auc == pytest.approx(0.5)
    each = (([1, 0, 1], [0.9, 0.6, 0.2]), ([0, 1, 0], [0.1, 0.4, 0.8]))
    expected = np.mean([average_precision_score(*one) for one in each])
    assert found.average_precision == pytest.approx(expected)
    with pytest.raises(DataError, match="more test items"):
        score_classes(truth[:1], scores[:1])


def test_the_anchor_answers_the_most_frequent_class():
    train = np.eye(2, dtype=np.float32)[[0, 0, 1]]
    test = np.eye(2, dtype=np.float32)[[0, 1, 1, 1]]
    found = score_majority(train, test)
    assert (found.accuracy, found.roc_auc, found.average_precision) == (0.25, 0.5, 0.5)
