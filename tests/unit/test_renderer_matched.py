"""The matched-decoder protocol: codecs give the vectors their own decoders see; one command compares."""

import json
import math
from pathlib import Path

import pytest
import soxr
import torch

from duotok.recipes.research import matched
from duotok.recipes.research.matched import (
    CodecConfig,
    CodeVectors,
    fit_mel_centres,
    make_mel_codec,
    mel_vectors,
    open_codec,
    wrap_residual_codec,
)
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.spectra import LogMel

TINY = Path(matched.__file__).parent / "matched" / "tiny.yaml"


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    return 0.1 * torch.randn(2, 48_000 + 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def encodec():
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    config = EncodecConfig(
        num_filters=2, upsampling_ratios=[8, 5, 4, 2], hidden_size=8, codebook_size=16, codebook_dim=8,
        num_lstm_layers=1, target_bandwidths=[0.6], sampling_rate=24_000,
    )  # fmt: skip
    model = EncodecModel(config).eval()
    for layer in model.quantizer.layers:  # a new model's codebooks are zero
        layer.codebook.embed.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def dac():
    from transformers import DacConfig, DacModel

    torch.manual_seed(0)
    config = DacConfig(
        encoder_hidden_size=4, downsampling_ratios=[2, 4, 8, 8], decoder_hidden_size=16, n_codebooks=3,
        codebook_size=16, codebook_dim=4, hidden_size=8, sampling_rate=44_100,
    )  # fmt: skip
    return DacModel(config).eval()


def test_encodec_features_are_what_its_decoder_sees(encodec, wave):
    """At 75 Hz each frame of 40 ms holds three codec frames, each once."""
    codec = wrap_residual_codec(encodec, codebooks=2)
    codes = codec.encode(wave)
    assert codes.shape == (26, 6) and codec.source.dim == 3 * 8
    assert codec.bits_per_second == pytest.approx(75 * 2 * math.log2(16))
    features = codec.source.features(codes[None], "vocal")
    own = codes.view(26 * 3, 2).T[:, None]  # [codebooks, batch, codec frames]
    assert torch.allclose(features.view(78, 8).T, encodec.quantizer.decode(own)[0], atol=1e-6)
    mono = torch.from_numpy(soxr.resample(wave.mean(dim=0).numpy(), 48_000, 24_000))
    hidden = encodec.encoder(mono[None, None])
    first = encodec.quantizer.layers[0].encode(hidden)[0]
    assert torch.equal(codes.view(78, 2)[: len(first), 0], first[:78])


def test_dac_features_are_what_its_decoder_sees(dac, wave):
    with pytest.raises(ConfigError, match="has 3 codebooks, 4"):
        wrap_residual_codec(dac, codebooks=4)
    codec = wrap_residual_codec(dac)
    codes = codec.encode(wave)
    assert codes.shape == (26, 4 * 3)  # 86 Hz: four parts of 40 ms
    features = codec.source.features(codes[None], "vocal")
    with torch.no_grad():
        expected = dac.quantizer.from_codes(codes.view(26 * 4, 3).T[None])[0][0]  # [dim, codec frames]
    assert torch.allclose(features.view(104, 8).T, expected, atol=1e-5)


def test_every_codec_frame_is_seen_where_the_rates_do_not_divide(dac, wave):
    mono = torch.from_numpy(soxr.resample(wave.mean(dim=0).numpy(), 48_000, 44_100))
    with torch.no_grad():
        own = dac.encode(mono[None, None]).audio_codes[0].T
    codes = wrap_residual_codec(dac).encode(wave).view(-1, 3)
    kept = torch.unique_consecutive(codes, dim=0)
    # The last codec frame may lie beyond the wave's end.
    assert torch.equal(kept, torch.unique_consecutive(own[: int(own.shape[0])], dim=0)[: len(kept)])
    assert len(kept) >= len(torch.unique_consecutive(own, dim=0)) - 1


def test_mel_codec_takes_the_nearest_centre(wave):
    config = CodecConfig(kind="mel_k_means", codebook_size=8, mel_bands=16)
    centres = fit_mel_centres([wave, 2 * wave.flip(1)], config)
    codec = make_mel_codec(centres, 16)
    codes = codec.encode(wave)
    frames = mel_vectors(wave, LogMel(16))
    assert torch.equal(codes[:, 0], torch.cdist(frames, centres).argmin(dim=1))
    assert torch.equal(codec.source.features(codes[None], "vocal")[0], centres[codes[:, 0]])
    assert codec.bits_per_second == 25 * 3
    assert torch.equal(codec.encode(4 * wave), codes)  # gain does not change the codes


def test_duotok_codes_are_its_own(tiny_components, wave):
    from duotok.tokenizer.model import DuoTokenizer

    folder = tiny_components["tokenizer"]
    tokenizer = DuoTokenizer.from_pretrained(folder)
    expected = tokenizer.encode(wave[None], "vocal")
    plain = open_codec(CodecConfig(kind="duotok", weights=str(folder)), "vocal", list)
    codes = plain.encode(wave)
    assert torch.equal(codes[:, 0], expected[0])
    assert torch.equal(
        plain.source.features(codes[None], "vocal")[0], tokenizer.code_vectors("vocal")[expected[0]]
    )
    contextual = open_codec(CodecConfig(kind="duotok_contextual", weights=str(folder)), "vocal", list)
    assert torch.equal(
        contextual.source.features(contextual.encode(wave)[None], "vocal"),
        tokenizer.features(expected, "vocal"),
    )
    assert plain.bits_per_second == contextual.bits_per_second == 25 * 6


def test_code_vectors_survive_storing(tmp_path):
    vectors = CodeVectors.from_tables(torch.randn(2, 5, 3), per_frame=2)
    vectors.save_pretrained(tmp_path / "codec")
    loaded = CodeVectors.from_pretrained(tmp_path / "codec")
    assert torch.equal(loaded.tables, vectors.tables) and loaded.fingerprint == vectors.fingerprint
    codes = torch.tensor([[[0, 1, 2, 3]]])
    expected = torch.cat([vectors.tables[0, a] + vectors.tables[1, b] for a, b in ((0, 1), (2, 3))])
    assert torch.allclose(loaded.features(codes, "vocal")[0, 0], expected)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kind": "mp3"}, "kind must be one of"),
        ({"kind": "duotok"}, "needs weights"),
        ({"kind": "mel_k_means", "weights": "x"}, "takes no weights"),
        ({"kind": "mel_k_means", "codebook_size": 1}, "codebook_size"),
    ],
)
def test_bad_codecs_are_named(settings, told):
    with pytest.raises(ConfigError, match=told):
        CodecConfig(**settings)


def test_missing_weights_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        open_codec(CodecConfig(kind="encodec", weights=str(tmp_path / "none")), "vocal", list)
    assert "\n" not in str(caught.value)


def test_one_command_compares_under_one_budget(tiny_components, tiny_corpus, tmp_path, capsys):
    out = tmp_path / "matched"
    settings = [f"vae={tiny_components['vae']}", f"codecs.duotok.weights={tiny_components['tokenizer']}"]
    settings += [f"data.corpus={tiny_corpus}", f"data.train={tiny_corpus / 'train.jsonl'}"]
    command = [str(TINY), "--out", str(out), *(word for one in settings for word in ("--set", one))]
    assert matched.main(command) == 0
    table = (out / "matched.md").read_text()
    rows = {row["codec"]: row for row in json.loads((out / "matched.json").read_text())}
    assert list(rows) == ["latents themselves", "duotok", "k-means of mel"]
    assert rows["duotok"]["bits_per_second"] == 150 and rows["k-means of mel"]["bits_per_second"] == 125
    assert all(math.isfinite(row["chroma_correlation"]) for row in rows.values())
    widths = {name: row.get("feature_dim") for name, row in rows.items()}
    assert widths == {"latents themselves": None, "duotok": 8, "k-means of mel": 64}
    assert "3 steps of training each" in table and table in capsys.readouterr().out
    # Again: nothing is trained anew; other settings are another comparison.
    weights = out / "duotok" / "run" / "final" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert matched.main(command) == 0 and weights.stat().st_mtime_ns == before
    with pytest.raises(DataError, match="made by other settings"):
        config = matched.load_config(matched.Config, TINY, [*settings, "guidance=3.0"])
        matched.run_comparison(config, out, None)
