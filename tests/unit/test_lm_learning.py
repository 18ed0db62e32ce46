"""On made-up songs whose accompaniment follows the vocal, the model learns to listen to the vocal."""

import numpy as np
import pytest
import torch
from torch import Tensor

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective, score_batch
from duotok.recipes.lm.data import CodeDropout, DataConfig, WindowSource
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig

NOTES = 8


def make_song(rng: np.random.Generator, frames: int = 120) -> dict[str, Tensor]:
    """Notes of 2 to 6 frames; the accompaniment is note * 2 + its own pulse, one code in ten at random."""
    lengths = rng.integers(2, 7, size=frames)
    vocal = np.repeat(rng.integers(NOTES, size=frames), lengths)[:frames]
    accompaniment = vocal * 2 + np.arange(frames) // 2 % 2
    noisy = rng.random(frames) < 0.1
    accompaniment = np.where(noisy, rng.integers(2 * NOTES, size=frames), accompaniment)
    return {"vocal": torch.from_numpy(vocal), "accompaniment": torch.from_numpy(accompaniment)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> DualTrackLM:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lm_learning")
    rng = np.random.default_rng(0)
    index = TokenIndex(
        tokenizer_fingerprint="made-up",
        codebook_sizes={"vocal": NOTES, "accompaniment": 2 * NOTES},
        frame_rate_hz=25.0,
    )
    append_shard(folder / "tokens", index, {f"{n}": (f"{n}", "train", make_song(rng)) for n in range(60)})
    torch.manual_seed(0)
    settings = dict(vocal_codes=NOTES, accompaniment_codes=2 * NOTES, code_dim=8, embedding_dim=32)
    settings |= dict(hidden_dim=64, layers=2, heads=2, key_value_heads=1, feed_forward_dim=128)
    lm = DualTrackLM(DualTrackLMConfig(**settings))
    data = DataConfig(
        tokens=str(folder / "tokens"),
        windows=((1.0, 1.0),),
        vocal_to_accompaniment=4,
        unconditional=1,
        prefix_seconds=0.2,
        history_dropout=CodeDropout(probability=0.5),
    )
    source = WindowSource(TokenShards(folder / "tokens"), data, lm, batch_size=16)
    train = TrainConfig(steps=100, learning_rate=5e-3, warmup_steps=10, precision="fp32", log_every=50)
    task = Task(objective=LMObjective(lm), make_batch=source.make_batch, export=lm.save_pretrained)
    run_training(task, train, folder / "run")
    return DualTrackLM.from_pretrained(folder / "run" / "final")


def make_test_songs(count: int = 12, frames: int = 50) -> dict[str, Tensor]:
    rng = np.random.default_rng(1)
    songs = [make_song(rng, frames) for _ in range(count)]
    return {track: torch.stack([song[track] for song in songs]) for track in songs[0]}


def test_another_song_s_vocal_costs(trained: DualTrackLM) -> None:
    codes = make_test_songs()
    mode = "vocal_to_accompaniment"
    own = score_batch(trained, codes["vocal"], codes["accompaniment"], mode)
    other = score_batch(trained, codes["vocal"].roll(1, dims=0), codes["accompaniment"], mode)
    free = score_batch(trained, codes["vocal"], codes["accompaniment"], "unconditional")
    bits = own.bits_per_token("accompaniment")
    assert bits < 2.2  # 4 bits is a uniform guess; the noise alone costs about 0.9
    assert other.bits_per_token("accompaniment") > 1.3 * bits
    assert free.bits_per_token("accompaniment") > 1.1 * bits
    first = own.bits_per_token("accompaniment", first_frames=10)
    assert other.bits_per_token("accompaniment", first_frames=10) > 1.3 * first


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_follows_the_vocal(trained: DualTrackLM, guidance: float) -> None:
    vocal = torch.cat(list(make_test_songs()["vocal"]))[:200]
    sampling = SamplingConfig(guidance=guidance, window_frames=25, overlap_frames=5)
    codes = trained.compose(vocal, seeds=[0], sampling=sampling).codes[0]
    follows = (codes // 2 == vocal).float().mean().item()
    assert follows > 0.6  # 1/8 is chance
    assert len(codes) == 200
