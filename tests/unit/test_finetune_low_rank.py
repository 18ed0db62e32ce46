"""Low-rank adapters: they start as no change, and merging them keeps the logits."""

import sys

import pytest
import torch

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.recipes.finetuning.learning import TARGETS, add_adapters, merge_adapters
from duotok.tokenizer.common.errors import ConfigError

CODES = 32


@pytest.fixture
def lm() -> DualTrackLM:
    torch.manual_seed(0)
    config = DualTrackLMConfig(
        vocal_codes=CODES,
        accompaniment_codes=CODES,
        code_dim=8,
        embedding_dim=16,
        hidden_dim=32,
        layers=2,
        heads=2,
        key_value_heads=1,
        feed_forward_dim=48,
    )
    return DualTrackLM(config).eval()


@torch.no_grad()
def logits_of(lm: DualTrackLM) -> torch.Tensor:
    torch.manual_seed(1)
    codes = {track: torch.randint(CODES, (2, 20)) for track in TRACKS}
    return lm(lm.lay_out(codes, "vocal_to_accompaniment"))["accompaniment"]


def test_new_adapters_change_nothing_and_alone_are_trained(lm: DualTrackLM) -> None:
    before = logits_of(lm)
    add_adapters(lm, rank=4)
    torch.testing.assert_close(logits_of(lm), before)
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * lm.config.layers
    assert all("lora_" in name and name.startswith("backbone.") for name in trained)


def test_merged_adapters_give_the_same_logits_in_an_ordinary_model(lm: DualTrackLM, tmp_path) -> None:
    names = set(lm.state_dict())
    before = logits_of(lm)
    add_adapters(lm, rank=4)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = logits_of(lm)
    assert (adapted - before).abs().max() > 1e-4
    merge_adapters(lm)
    torch.testing.assert_close(logits_of(lm), adapted, rtol=1e-4, atol=1e-5)
    assert set(lm.state_dict()) == names and all(p.requires_grad for p in lm.parameters())
    lm.save_pretrained(tmp_path / "lm")
    torch.testing.assert_close(logits_of(DualTrackLM.from_pretrained(tmp_path / "lm")), logits_of(lm))


def test_adapters_start_alike_for_a_seed(lm: DualTrackLM) -> None:
    twin = DualTrackLM(lm.config)
    add_adapters(lm, rank=2, seed=3)
    add_adapters(twin, rank=2, seed=3)
    state, other = lm.state_dict(), twin.state_dict()
    names = [name for name in state if "lora_A" in name]
    assert names and all(torch.equal(state[name], other[name]) for name in names)


def test_without_peft_one_line_says_so(lm: DualTrackLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft") as error:
        add_adapters(lm, rank=2)
    assert "\n" not in str(error.value)
    assert all(parameter.requires_grad for parameter in lm.parameters())
