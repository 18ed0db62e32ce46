"""The loss table: CTC by hand, masks, means by kind; and the text vocabulary behind the lyric head."""

import itertools
import math

import numpy as np
import pytest
import torch

from duotok.recipes.tokenizer.cuts import Cut, collate_cuts, draw_runs
from duotok.recipes.tokenizer.train_text_model import train_text_model
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.heads import TextHead
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig
from duotok.tokenizer.objectives import LossWeights, chroma_distances, mask_distances, summarize, text_losses
from duotok.tokenizer.text import (
    SentencePieceVocabulary,
    collapse_alignment,
    open_vocabulary,
    read_vocabulary,
)

LINES = ["la na ti", "ti ta la", "na na ma ti ta"] * 4


def test_ctc_of_one_token_in_two_frames_by_hand():
    # Two frames, tokens {a, blank}, uniform: the paths aa, a-, -a spell "a": probability 3/4.
    loss = text_losses(torch.zeros(1, 2, 2), torch.tensor([[0, -1]]), torch.tensor([[0, 0, 2]]))
    assert float(loss[0]) == pytest.approx(-math.log(0.75), abs=1e-5)


def test_cuts_without_text_take_no_part():
    logits = torch.zeros(3, 4, 3, requires_grad=True)
    text = torch.tensor([[0, 1], [-1, -1], [1, -1]])
    losses = text_losses(logits, text, torch.tensor([[0, 0, 4], [1, 0, 4], [2, 0, 4]]))
    assert losses.isnan().tolist() == [False, True, False]
    summary = summarize({"text": losses}, torch.tensor([1, 2, 0]), LossWeights())
    assert set(summary) == {"total", "text", "text/vocal", "text/mix"}
    summary["text"].backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert not logits.grad[1].any() and logits.grad[0].any() and logits.grad[2].any()


def test_a_text_longer_than_its_frames_counts_as_none():
    assert (
        text_losses(torch.zeros(1, 2, 3), torch.tensor([[0, 1, 0]]), torch.tensor([[0, 0, 2]])).isnan().all()
    )


def test_a_batch_without_text_still_has_a_loss_of_zero():
    logits = torch.zeros(2, 4, 3, requires_grad=True)
    losses = text_losses(logits, torch.full((1, 1), -1), torch.tensor([[0, 0, 1]]))
    summary = summarize({"text": losses}, torch.tensor([0, 3]), LossWeights())
    assert float(summary["text"]) == 0
    summary["text"].backward()
    assert logits.grad is not None and not logits.grad.any()


def test_each_run_of_a_cut_is_aligned_in_its_own_frames():
    # Frames 0..1 say token 0, frames 2..3 token 1, each with 0.8; the others have 0.1.
    logits = torch.full((1, 4, 3), 0.1).log()
    logits[0, :2, 0] = logits[0, 2:, 1] = math.log(0.8)
    runs = text_losses(logits, torch.tensor([[0], [1]]), torch.tensor([[0, 0, 2], [0, 2, 4]]))
    # Of each run, the paths aa, a- and -a: 0.64 + 2 * 0.08; two tokens in the cut.
    assert float(runs[0]) == pytest.approx(-math.log(0.8), abs=1e-5)
    swapped = text_losses(logits, torch.tensor([[1], [0]]), torch.tensor([[0, 0, 2], [0, 2, 4]]))
    assert float(swapped[0]) == pytest.approx(-math.log(0.01 + 2 * 0.01), abs=1e-5)
    beyond = text_losses(logits, torch.tensor([[1]]), torch.tensor([[0, 2, 9]]))
    assert float(beyond[0]) == pytest.approx(-math.log(0.8), abs=1e-5)


def test_runs_join_consecutive_lines_up_to_their_length():
    lines = [(0.0, 0.5, "a"), (0.5, 1.0, "b"), (1.2, 3.0, "c"), (3.0, 3.2, "d")]
    for seed in range(20):
        runs = draw_runs(lines, 2.0, np.random.default_rng(seed))
        assert " ".join(text for *_, text in runs) == "a b c d"
        assert runs[0][0] == 0.0 and runs[-1][1] == 3.2
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(runs))
    assert [text for *_, text in draw_runs(lines, 0.0, np.random.default_rng(0))] == ["a", "b", "c", "d"]


def test_a_batch_tells_where_each_run_is_sung():
    waves = {"vocal": torch.zeros(48_000)}
    cuts = [
        Cut(waves=waves, kind="mix", lines=[(0.1, 0.2, "na")]),
        Cut(waves=waves, kind="vocal", lines=[(0.0, 0.4, "ti"), (0.4, 0.98, "ta")]),
    ]
    text = SentencePieceVocabulary(train_text_model(LINES, 16))
    batch = collate_cuts(cuts, text, 0.0, np.random.default_rng(0))
    assert batch["text_span"].tolist() == [[1, 0, 11], [1, 9, 26]]
    assert [text.decode(row[row >= 0].tolist()) for row in batch["text"]] == ["ti", "ta"]
    nothing = collate_cuts(cuts, None, 0.0, np.random.default_rng(0))
    assert nothing["text"].tolist() == [[-1]] and nothing["text_span"].shape == (1, 3)


def test_a_new_lyric_head_says_blank():
    head = TextHead(4, 11)
    blank = head(torch.randn(3, 4)).softmax(dim=-1)[:, -1]
    torch.testing.assert_close(blank, torch.full((3,), 0.9))


def test_perfect_chroma_and_masks_cost_nothing():
    chroma = torch.rand(2, 5, 12) * 0.98 + 0.01
    assert chroma_distances(torch.logit(chroma), chroma).abs().max() < 1e-5
    masks = torch.rand(2, 5, 4, 3).softmax(dim=2)
    assert mask_distances(masks.log(), masks).abs().max() < 1e-6
    assert (mask_distances(torch.zeros(2, 5, 4, 3), masks) > 0).all()


def test_a_negative_weight_is_refused():
    with pytest.raises(ConfigError, match="masks"):
        LossWeights(masks=-1)


def test_vocabulary_travels_with_the_tokenizer(tmp_path):
    text = SentencePieceVocabulary(train_text_model(LINES, 16))
    assert text.decode(text.encode("la ti ma")) == "la ti ma"
    config = DuoTokenizerConfig(
        mel_bands=16, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=2, code_dim=4,
        vocal_codes=8, accompaniment_codes=8, head_dim=8,
    )  # fmt: skip
    tokenizer = DuoTokenizer(config).with_heads(text=text, masks=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = DuoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert again.text is not None and again.text.encode("na ta") == text.encode("na ta")
    plain = again.with_heads(text=None, masks=False)
    assert plain.text_head is None and plain.mask_head is None
    assert torch.equal(plain.state_dict()["mel_head.out.weight"], again.state_dict()["mel_head.out.weight"])
    with pytest.raises(ConfigError, match="no lyric head"):
        plain.read_text(torch.zeros(1, 3, dtype=torch.int64), "vocal")


def test_best_paths_collapse():
    assert collapse_alignment([9, 1, 1, 9, 1, 2, 2, 9, 9, 3], blank=9) == [1, 1, 2, 3]


def test_bad_text_models_are_told(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(CheckpointError, match="damaged"):
        read_vocabulary(str(tmp_path / "bad.model"))
    with pytest.raises(ConfigError, match="duotok.recipes.tokenizer.train_text_model"):
        read_vocabulary(str(tmp_path / "none.model"))
    with pytest.raises(ConfigError, match="folder or hub name"):
        read_vocabulary(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="unknown kind"):
        open_vocabulary({"kind": "magic"})
    with pytest.raises(DataError, match="no lyrics"):
        train_text_model(["", " "], 16)
