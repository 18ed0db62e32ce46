"""Semantic tokens at 50 Hz: both encoders, any length, stored with their encoder, k-means."""

import pytest
import torch
from transformers import HubertConfig, HubertModel

from duotok.recipes.lm.accompgen import fit_semantic
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.semantic import SemanticTokenizer, fit_centroids

HUBERT = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
    conv_dim=[8] * 7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip


def save_hubert(folder, **changes):
    torch.manual_seed(0)
    HubertModel(HubertConfig(**(HUBERT | changes))).save_pretrained(folder)
    return folder


@pytest.fixture(params=["duotok", "hubert"])
def semantic(request, small_tokenizer_folder, tmp_path):
    torch.manual_seed(0)
    if request.param == "hubert":
        return SemanticTokenizer.on_hubert(save_hubert(tmp_path / "hubert"), clusters=6, layer=1)
    return SemanticTokenizer.on_tokenizer(DuoTokenizer.from_pretrained(small_tokenizer_folder), clusters=6)


def test_one_code_every_20_ms_whatever_the_level_and_after_saving(semantic, make_singing, tmp_path):
    wave = torch.from_numpy(make_singing(1.03).T)[None]
    features = semantic.features(wave)
    semantic.centroids.copy_(fit_centroids(features[0], 6))
    codes = semantic.encode(wave)
    assert codes.shape == (1, 52) and len(codes.unique()) > 1 and int(codes.max()) < 6
    assert torch.equal(semantic.encode(0.3 * wave), codes)
    semantic.save_pretrained(tmp_path / "semantic")
    opened = SemanticTokenizer.from_pretrained(tmp_path / "semantic")
    assert torch.equal(opened.encode(wave), codes) and opened.fingerprint == semantic.fingerprint
    assert semantic.encode(wave[..., :1]).shape == (1, 1)


def test_later_sound_gives_later_codes(semantic, make_singing):
    wave = torch.from_numpy(make_singing(2.0).T)[None]
    later = torch.nn.functional.pad(wave, (960, 0))
    first, second = semantic.features(wave)[0, 20:80], semantic.features(later)[0, 21:81]
    moved, still = (second - first).norm(), (semantic.features(wave)[0, 21:81] - first).norm()
    assert moved < 0.2 * still


def test_our_encoder_is_heard_at_the_middle_of_each_frame(small_tokenizer_folder, make_singing):
    tokenizer = DuoTokenizer.from_pretrained(small_tokenizer_folder)
    semantic = SemanticTokenizer.on_tokenizer(tokenizer, clusters=4)
    mono = torch.from_numpy(make_singing(1.0).T[:1])
    encoded = tokenizer.encoder(tokenizer.normalize(tokenizer.log_mel(mono[:, 480 : 480 + 20 * 1920])))
    found = semantic.encoder.features(mono)[:, 1::2]
    assert torch.allclose(found[:, :12], encoded[:, :12], atol=1e-4)  # beyond, one sees the end


def test_k_means_finds_what_lies_together():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    rng = torch.Generator().manual_seed(0)
    points = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=rng)).flatten(0, 1)
    found = fit_centroids(points, 3)
    assert torch.cdist(found, centres).min(dim=0).values.max() < 0.1
    assert fit_centroids(points[:4].repeat(5, 1), 6).isfinite().all()  # more clusters than points
    with pytest.raises(DataError, match="2 frames are too few for 3 clusters"):
        fit_centroids(points[:2], 3)


def test_the_command_fits_hubert_too(tiny_corpus, tmp_path):
    hubert = str(save_hubert(tmp_path / "hubert"))
    command = ["--hubert", hubert, "--layer", "2", "--clusters", "5", "--frames", "1000"]
    command += ["--manifest", str(tiny_corpus / "train.jsonl"), "--out"]
    assert fit_semantic.main([*command, str(tmp_path / "one")]) == 0
    assert fit_semantic.main([*command, str(tmp_path / "two")]) == 0
    one, two = (SemanticTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint and one.config.clusters == 5 and one.config.layer == 2


def test_encoders_that_cannot_serve_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="no HubertModel can be read") as caught:
        SemanticTokenizer.on_hubert(tmp_path / "nothing", clusters=4)
    assert "\n" not in str(caught.value)
    other = save_hubert(tmp_path / "other", conv_stride=(5, 2, 2, 2, 2, 2, 1))
    with pytest.raises(ConfigError, match="gives 100 frames per second, semantic tokens need 50"):
        SemanticTokenizer.on_hubert(other, clusters=4)
    with pytest.raises(ConfigError, match="layer must be from -2 to 2"):
        SemanticTokenizer.on_hubert(save_hubert(tmp_path / "hubert"), clusters=4, layer=3)
