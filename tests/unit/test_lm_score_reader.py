"""What the language model is asked of the written score while it trains."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.lm.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.objective import LMObjective
from duotok.lm.score_reader import BAR_PLACES, CHORDS, UNKNOWN, ScoreReader
from duotok.recipes.corpus.manifest import Item, read_manifest, write_manifest
from duotok.recipes.lm import train
from duotok.recipes.lm.data import DataConfig, WindowSource
from duotok.recipes.lm.score_labels import ScoreLabels, label_frames
from duotok.tokenizer.common.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def item(tiny_corpus: Path) -> Item:
    """Four seconds: bars of 1 s and 2 s from 0.5 s on, and three chords."""
    return replace(
        read_manifest(tiny_corpus / "train.jsonl")[0],
        id="item0",
        seconds=4.0,
        downbeats_seconds=[0.5, 1.5, 3.5],
        chords=[(0.0, 1.0, "C:maj"), (1.0, 2.0, "A:min7"), (2.0, 3.0, "N"), (3.0, 4.0, "C:sus4")],
    )


def test_places_and_chords_follow_the_score(item: Item) -> None:
    labels = label_frames(item, 32.0)  # two frames per place in the bar of 1 s, four in that of 2 s
    place, chord = labels["bar_place"], labels["chord"]
    assert place.shape == chord.shape == (128,)
    assert place[:16].eq(UNKNOWN).all() and place[112:].eq(UNKNOWN).all()
    assert place[16:48].tolist() == sorted([*range(BAR_PLACES)] * 2)
    assert place[48:112].tolist() == sorted([*range(BAR_PLACES)] * 4)
    assert chord.tolist() == [0] * 32 + [12 + 9] * 32 + [24] * 32 + [UNKNOWN] * 32


def test_labels_are_cut_as_codes_are(tmp_path: Path, make_shards, item: Item) -> None:
    shards = make_shards(tmp_path / "tokens")
    write_manifest(tmp_path / "some.jsonl", [item])
    labels, whole = ScoreLabels(tmp_path / "some.jsonl", shards), label_frames(item, 25.0)
    for start, frames in ((0, 30), (13, 20)):
        cut = labels.cut("item0", start, frames)
        assert all(torch.equal(cut[name], whole[name][start : start + frames]) for name in whole)
    beyond = labels.cut("item0", 90, 20)["chord"]
    assert len(beyond) == 20 and beyond[10:].eq(UNKNOWN).all()
    assert labels.cut("item1", 0, 10)["bar_place"].eq(UNKNOWN).all()  # not in the manifest
    batch = WindowSource(
        shards,
        DataConfig(tokens="", manifest=str(tmp_path / "some.jsonl"), windows=((1.2, 1),)),
        make_lm(),
        batch_size=8,
    ).make_batch(np.random.default_rng(0))
    assert batch["bar_place"].shape == batch["chord"].shape == batch["target_vocal"].shape


def test_a_manifest_of_other_items_is_refused(tmp_path: Path, make_shards, item: Item) -> None:
    write_manifest(tmp_path / "other.jsonl", [replace(item, id="nothing")])
    with pytest.raises(DataError, match=r"no item of .*other\.jsonl is in .*tokens"):
        ScoreLabels(tmp_path / "other.jsonl", make_shards(tmp_path / "tokens"))


def make_lm() -> DualTrackLM:
    torch.manual_seed(0)
    settings = dict(vocal_codes=11, accompaniment_codes=13, code_dim=4, embedding_dim=8, hidden_dim=16)
    return DualTrackLM(
        DualTrackLMConfig(**settings, layers=1, heads=2, key_value_heads=1, feed_forward_dim=16)
    )


def test_an_ignorant_reader_costs_the_logarithm_of_the_classes() -> None:
    reader = ScoreReader(6)
    for parameter in reader.parameters():
        torch.nn.init.zeros_(parameter)
    labels = {name: torch.tensor([[0, UNKNOWN, 3], [UNKNOWN, 2, 1]]) for name in ("bar_place", "chord")}
    for steps in (3, 6):  # the target segment alone, and behind its prompt
        found = reader(torch.randn(2, steps, 6), labels)
        assert found["bar_place"].item() == pytest.approx(np.log(BAR_PLACES))
        assert found["chord"].item() == pytest.approx(np.log(CHORDS))
    unknown = {name: torch.full((2, 3), UNKNOWN) for name in labels}
    assert all(value == 0 for value in reader(torch.randn(2, 3, 6), unknown).values())


@pytest.mark.parametrize("mode", ["vocal_to_accompaniment", "unconditional"])
def test_the_total_has_the_score_in_it(mode: str) -> None:
    lm = make_lm()
    codes = {track: torch.randint(0, 8, (2, 6)) for track in ("vocal", "accompaniment")}
    layout = lm.lay_out(codes, mode)
    batch = {name: getattr(layout, name) for name in ("vocal", "accompaniment", "segment", "position")}
    batch |= {f"target_{track}": value for track, value in codes.items()}
    batch |= {"weight_vocal": torch.zeros(2, 6), "weight_accompaniment": torch.ones(2, 6)}
    labels = {"bar_place": torch.randint(BAR_PLACES, (2, 6)), "chord": torch.randint(CHORDS, (2, 6))}
    objective = LMObjective(lm, score_weight=0.5)
    found = objective(**batch, **labels)
    plain = LMObjective(lm)(**batch, **labels)
    assert "chord_nats" not in plain
    added = 0.5 * (found["bar_place_nats"] + found["chord_nats"])
    assert torch.allclose(found["total"], plain["total"] + added)
    # It reaches the backbone, where the band can use it, and is no part of the model that is saved.
    (found["total"] - plain["total"].detach()).backward()
    assert lm.backbone.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert not any("score" in name for name in lm.state_dict())


def test_a_weight_without_scores_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"score_weight needs data\.manifest"):
        train.Config(tokenizer="", data=DataConfig(tokens=""), score_weight=0.3)
    with pytest.raises(ConfigError, match="must not be negative"):
        train.Config(tokenizer="", data=DataConfig(tokens="", manifest=""), score_weight=-1)
