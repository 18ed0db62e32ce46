"""Stored numbers of a seeded model guard the mathematics of the language model.

Remake after a wanted change: python tests/golden/test_lm_golden.py
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import score_batch

GOLDEN = Path(__file__).with_name("lm_golden.json")


def compute() -> dict[str, list]:
    """Losses and codes of a model whose weights are sines, free of any random generator."""
    settings = dict(vocal_codes=10, accompaniment_codes=12, code_dim=4, embedding_dim=8, hidden_dim=16)
    settings |= dict(layers=2, heads=2, key_value_heads=1, feed_forward_dim=24)
    lm = DualTrackLM(DualTrackLMConfig(**settings)).eval()
    tensors: list[torch.Tensor | nn.Parameter] = [*lm.parameters()]
    tensors += [lm.codes_of(track).vectors for track in ("vocal", "accompaniment")]
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            values = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) * 1.7 + number)
            tensor.copy_((0.5 * values).view(tensor.shape))
    vocal, accompaniment = torch.arange(9) * 3 % 10, torch.arange(9) * 5 % 12
    result: dict[str, list] = {}
    for mode in ("vocal_to_accompaniment", "accompaniment_to_vocal", "unconditional"):
        scores = score_batch(lm, vocal[None], accompaniment[None], mode)
        for track, losses in scores.loss_nats.items():
            result[f"{mode}.{track}"] = [round(value, 5) for value in losses[0].tolist()]
    sampling = SamplingConfig(temperature=0, window_frames=10, overlap_frames=3)
    result["greedy"] = lm.compose(vocal.repeat(3), seeds=[0], sampling=sampling).codes[0].tolist()
    return result


def test_golden() -> None:
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found = compute()
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=2e-4), name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(compute(), indent=1) + "\n", encoding="utf-8")
