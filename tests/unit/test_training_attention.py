"""Flash-attention 2 where it can run, SDPA elsewhere, said once."""

import importlib.util
import logging

import pytest
import torch

from duotok.lm.dual_track import model as attention
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig, choose_attention

CUDA, HALF = torch.device("cuda", 0), torch.bfloat16


@pytest.fixture
def flash_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an Ampere card with flash-attn installed; neither is here."""
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_without_the_package_it_is_sdpa():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    assert choose_attention(torch.device("cpu"), HALF, 64).name == "sdpa"
    choice = choose_attention(CUDA, HALF, 64)
    assert choice.name == "sdpa" and "not installed" in choice.reason


def test_flash_attention_where_everything_fits(flash_installed):
    for dtype in (torch.float16, torch.bfloat16):
        assert choose_attention(CUDA, dtype, 128).name == "flash_attention_2"


def test_each_thing_missing_is_the_reason(flash_installed, monkeypatch):
    assert "needs CUDA" in choose_attention(torch.device("mps"), HALF, 64).reason
    assert "half precision, this is float32" in choose_attention(CUDA, torch.float32, 64).reason
    assert "256" in choose_attention(CUDA, HALF, 512).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    choice = choose_attention(CUDA, HALF, 64)
    assert choice.name == "sdpa" and "Tesla T4" in choice.reason


def test_the_choice_is_logged_once(caplog):
    sizes = dict(vocal_codes=5, accompaniment_codes=5, code_dim=4, embedding_dim=8, hidden_dim=16)
    lm = DualTrackLM(
        DualTrackLMConfig(**sizes, layers=1, heads=2, key_value_heads=1, feed_forward_dim=16)
    ).eval()
    codes = {track: torch.zeros(1, 4, dtype=torch.int64) for track in ("vocal", "accompaniment")}
    layout = lm.lay_out(codes, "unconditional")
    with caplog.at_level(logging.INFO, logger="duotok.lm.dual_track.model"), torch.no_grad():
        for _ in range(3):
            lm(layout)
    told = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert told == ["attention: sdpa (flash-attention 2 needs CUDA, this is cpu)"]
    assert lm.backbone.config._attn_implementation == "sdpa"
