"""The latents recipe: codes and latents are aligned, and what does not fit is refused."""

import numpy as np
import pytest
import torch

from duotok.recipes.renderer.latents import LatentShards, ShardOrigin, encode_item, main, write_shard
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common.errors import CheckpointError, DataError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig


class NoiseItem:
    """An item of any length without files."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def read(self, part: str) -> torch.Tensor:
        return torch.randn(2, self.samples, generator=torch.Generator().manual_seed(len(part)))


@pytest.mark.parametrize("samples", [1, 960, 961, 1920, 100_001])
def test_two_latent_frames_per_code(tmp_path, samples):
    torch.manual_seed(0)
    tokenizer = DuoTokenizer(
        DuoTokenizerConfig(
            mel_bands=32, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=8, code_dim=4,
            vocal_codes=8, accompaniment_codes=8, head_dim=16,
        )
    ).eval()  # fmt: skip
    vae = SpectralVAE(SpectralVAEConfig(low_bins=64, group=64, decoder_blocks=0))
    with torch.inference_mode():
        codes, latents = encode_item(NoiseItem(samples), "accompaniment", tokenizer, vae)
    assert len(codes) == -(-samples // 1920) and latents.shape == (2 * len(codes), 64)
    origin = ShardOrigin(track="accompaniment", tokenizer_fingerprint="t", vae_fingerprint="v")
    write_shard(tmp_path, 0, {"one": (codes, latents)}, origin)
    shards = LatentShards(tmp_path)
    shards.require(origin)
    assert shards.frames == {"one": len(codes)}
    cut = shards.draw_cut(np.random.default_rng(0), ["one"], 1, 0)
    assert cut.codes.shape == (1,) and cut.latents.shape == (64, 2)
    with pytest.raises(CheckpointError, match="made by"):
        shards.require(ShardOrigin(track="vocal", tokenizer_fingerprint="t", vae_fingerprint="v"))


def test_misaligned_pairs_are_refused(tmp_path):
    origin = ShardOrigin(track="vocal", tokenizer_fingerprint="t", vae_fingerprint="v")
    with pytest.raises(DataError, match="item x"):
        write_shard(tmp_path, 0, {"x": (torch.zeros(3), torch.zeros(5, 64))}, origin)


def test_a_vae_of_another_rate_is_refused(tmp_path, tiny_components, tiny_corpus, capsys):
    vae = SpectralVAE(
        SpectralVAEConfig(
            mid_latents=6, side_latents=2, hop_samples=480, low_bins=64, group=64, decoder_blocks=0, dim=16
        )
    )
    vae.save_pretrained(tmp_path / "vae")
    command = ["--tokenizer", str(tiny_components["tokenizer"]), "--vae", str(tmp_path / "vae")]
    command += ["--manifest", str(tiny_corpus / "test.jsonl"), "--out", str(tmp_path / "latents")]
    assert main(command) == 1
    message = capsys.readouterr().err.strip()
    assert "latents at 100 Hz, the decoder needs 2 per code, 50 Hz" in message and "\n" not in message
