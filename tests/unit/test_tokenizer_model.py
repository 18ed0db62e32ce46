import json
import os

import pytest
import torch

from duotok.tokenizer.blocks import attend_near
from duotok.tokenizer.common.checkpoint import open_component
from duotok.tokenizer.common.chunks import chunk_size, plan_chunks
from duotok.tokenizer.common.errors import AudioError, CheckpointError, ConfigError, DuoTokError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

TINY = DuoTokenizerConfig(
    mel_bands=32, dim=32, heads=2, feed_forward_dim=64, blocks=2, attention_window=5, code_dim=4,
    vocal_codes=64, accompaniment_codes=32, head_dim=16,
)  # fmt: skip


@pytest.fixture
def tokenizer() -> DuoTokenizer:
    torch.manual_seed(0)
    return DuoTokenizer(TINY).eval()


def noise(samples: int, seed: int = 0) -> torch.Tensor:
    wave = 0.1 * torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(seed))
    return wave * torch.linspace(0.2, 1, samples)


def test_chunks_give_the_codes_of_one_pass(tokenizer):
    wave = noise(48_000 * 6)
    whole = tokenizer.encode(wave, "accompaniment")
    features = tokenizer.features(whole, "accompaniment")
    read_out = tokenizer.read_out(whole, "accompaniment")
    tokenizer.CHUNK_FRAMES = 37
    chunked = tokenizer.encode(wave, "accompaniment")
    assert (whole == chunked).float().mean() > 0.99
    torch.testing.assert_close(tokenizer.features(whole, "accompaniment"), features, atol=1e-4, rtol=0)
    chunked_read_out = tokenizer.read_out(whole, "accompaniment")
    torch.testing.assert_close(chunked_read_out.mel, read_out.mel, atol=1e-4, rtol=0)
    torch.testing.assert_close(chunked_read_out.chroma, read_out.chroma, atol=1e-4, rtol=0)
    assert read_out.mel.shape == (1, 600, 32) and read_out.chroma.shape == (1, 300, 12)


@pytest.mark.parametrize(("frames", "window"), [(1, 4), (4, 4), (5, 4), (9, 4), (23, 4), (700, 128)])
def test_attention_in_blocks_is_that_of_a_dense_mask(frames, window):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, frames, 8)
    positions = torch.arange(frames)
    band = (positions[:, None] - positions).abs() <= window
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=band)
    torch.testing.assert_close(attend_near(query, key, value, window), dense, atol=1e-5, rtol=0)


def test_little_is_computed_for_the_neighbours_alone(tokenizer, monkeypatch):
    seen = []
    for stack in (tokenizer.encoder.transformer, tokenizer.upper):
        stack.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    monkeypatch.setattr(tokenizer, "CHUNK_FRAMES", 10)
    codes = tokenizer.encode(noise(1920 * 900), "vocal")
    assert codes.shape == (1, 900) and len(seen) > 3 and sum(seen) <= 1.3 * 900
    seen.clear()
    tokenizer.features(codes, "vocal")
    assert len(seen) > 3 and sum(seen) <= 1.3 * 900
    # The paper's size, over an hour.
    base = DuoTokenizerConfig()
    halo = base.blocks * base.attention_window + 4
    plan = plan_chunks(90_000, chunk_size(DuoTokenizer.CHUNK_FRAMES, halo), halo)
    assert sum(chunk.high - chunk.low for chunk in plan) <= 1.3 * 90_000


def test_gain_does_not_change_codes(tokenizer):
    wave = noise(96_000)
    codes = tokenizer.encode(wave, "vocal")
    assert (tokenizer.encode(wave * 0.25, "vocal") == codes).float().mean() > 0.97


def test_tracks_have_their_own_codebooks(tokenizer):
    wave = noise(96_000)
    assert tokenizer.codebook_size("accompaniment") == 32
    assert not torch.equal(tokenizer.encode(wave, "vocal"), tokenizer.encode(wave, "accompaniment"))
    with pytest.raises(ConfigError, match="vocal, accompaniment"):
        tokenizer.encode(wave, "drums")


def test_wrong_wave_shape_is_an_error(tokenizer):
    with pytest.raises(AudioError, match="channels"):
        tokenizer.encode(torch.zeros(10), "vocal")


def test_saved_tokenizer_gives_the_same_codes(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = DuoTokenizer.from_pretrained(tmp_path / "tokenizer")
    wave = noise(48_000)
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.fingerprint
    assert torch.equal(loaded.encode(wave, "vocal"), tokenizer.encode(wave, "vocal"))


def test_damaged_weights_are_one_clear_line(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    weights = tmp_path / "tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged") as error:
        DuoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert "\n" not in str(error.value)
    weights.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        DuoTokenizer.from_pretrained(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fingerprint": None}, "holds no fingerprint"),
        ({"extra": [1, 2]}, "holds no extra"),
        ({"extra": {"text": 5}}, "text vocabulary 5"),
        ({"kind": ["tokenizer"]}, "a 'tokenizer' is needed"),
        ({"format": 99}, "99"),
        ({"config": "x"}, "holds no config"),
        ({"config": {"dim": 64}}, r"shape \(4, 64\) where they have \(4, 32\)"),
        ({"config": {"dim": 2_000_000}}, "far more weights"),
        ({"config": {"blocks": 10**9}}, "far more weights"),
        ({"config": {"vocal_codes": 10**9}}, "vocal_codes must be from 2 to 1048576"),
        ({"config": {"head_dim": -1}}, "no model can be built"),
        ({"config": {"heads": [1]}}, "heads must be of type int"),
    ],
)
def test_a_foreign_config_is_one_clear_line(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "config.json"
    description = json.loads(path.read_text())
    if isinstance(change.get("config"), dict):
        change = {"config": description["config"] | change["config"]}
    path.write_text(json.dumps(description | change))
    with pytest.raises(DuoTokError, match=message) as error:
        open_component(tmp_path / "tokenizer", [DuoTokenizer])
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_description_without_bounds_is_one_clear_line(tokenizer, tmp_path, name):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / name
    for text, message in (("[" * 100_000, "JSON"), ("\xff", "JSON"), ("[1, 2]", "mapping")):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(CheckpointError, match=message) as error:
            DuoTokenizer.from_pretrained(tmp_path / "tokenizer")
        assert "\n" not in str(error.value)
    os.truncate(path, 70_000_000)
    with pytest.raises(CheckpointError, match="70 MB"):
        DuoTokenizer.from_pretrained(tmp_path / "tokenizer")
