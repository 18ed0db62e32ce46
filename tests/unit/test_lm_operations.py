"""The operations of a training step of the language model are those that torch counts."""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective
from duotok.recipes.lm.data import DataConfig, WindowSource
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.recipes.lm.train import batch_flops

SIZES = {"vocal": 40, "accompaniment": 56}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("tokens")
    index = TokenIndex(tokenizer_fingerprint="x", codebook_sizes=SIZES, frame_rate_hz=25.0)
    codes = {track: torch.randint(size, (200,)) for track, size in SIZES.items()}
    append_shard(folder, index, {"item": ("song", "train", codes)})
    return TokenShards(folder)


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_operations_are_those_that_torch_counts(mode: str, prompt_weight: float, shards: TokenShards) -> None:
    sizes = {f"{track}_codes": size for track, size in SIZES.items()}
    widths = dict(code_dim=12, embedding_dim=24, hidden_dim=48, heads=4, key_value_heads=2)
    lm = DualTrackLM(DualTrackLMConfig(**sizes, **widths, layers=3, feed_forward_dim=80))
    data = DataConfig(tokens="", windows=((1.6, 1.0),), **{name: float(name == mode) for name in MODES})
    batch = WindowSource(shards, data, lm, batch_size=2).make_batch(np.random.default_rng(0))
    counter = FlopCounterMode(display=False)
    # The fused attention of CPUs is not among the operations that torch counts.
    with counter, sdpa_kernel(SDPBackend.MATH):
        LMObjective(lm, prompt_weight)(**batch)["total"].backward()
    assert batch_flops(lm.config, batch, prompt_weight) == counter.get_total_flops()
