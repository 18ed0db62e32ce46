"""Acoustic codecs: the contract, residual codes of latents, published ones, the recipe, the measures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duotok.recipes.evaluation import score
from duotok.recipes.evaluation.results import read_results
from duotok.recipes.renderer import train_acoustic_codec as recipe
from duotok.recipes.renderer.latents import ShardOrigin, write_shard
from duotok.recipes.training.loop import run_training
from duotok.renderer.latent_codec import LatentCodec, open_codec
from duotok.renderer.renderer import open_vae
from duotok.tokenizer.acoustic_codec import AcousticCodec
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import AudioError, CheckpointError, ConfigError, DuoTokError
from duotok.tokenizer.published_codecs import PublishedCodec
from duotok.tokenizer.quantizers import MovingAverageVQ, ResidualQuantizer

SAMPLES = 30_001


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def wave() -> Tensor:
    """Noise [2, 2, samples]."""
    return 0.1 * torch.randn(2, 2, SAMPLES, generator=torch.Generator().manual_seed(0))


def save_published(name: str, folder: Path, **more: Any) -> Path:
    """A tiny random codec as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    if name == "encodec":
        config = transformers.EncodecConfig(
            hidden_size=8, num_filters=4, num_lstm_layers=1, codebook_size=16, **more
        )
        model = transformers.EncodecModel(config)
    elif name == "dac":
        config = transformers.DacConfig(
            encoder_hidden_size=4, decoder_hidden_size=32, n_codebooks=9, codebook_size=16, codebook_dim=4,
            downsampling_ratios=[2, 4, 5], sampling_rate=16_000, **more,
        )  # fmt: skip
        model = transformers.DacModel(config)
    else:
        config = transformers.MimiConfig(
            hidden_size=16, num_filters=2, codebook_size=16, codebook_dim=8, num_quantizers=10,
            vector_quantization_hidden_dimension=8, num_hidden_layers=1, intermediate_size=16,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, upsample_groups=16, **more,
        )  # fmt: skip
        model = transformers.MimiModel(config)
    for buffer_name, buffer in model.named_buffers():  # else all of its entries are alike
        if buffer_name.endswith(("embed", "embed_sum")):
            buffer.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random codecs of transformers."""
    root = tmp_path_factory.mktemp("published")
    return {name: save_published(name, root / name) for name in ("encodec", "dac", "mimi")}


def check_contract(codec: AcousticCodec[Any], wave: Tensor) -> Tensor:
    """Hold what the contract says; the codes of the wave."""
    codes = codec.encode(wave)
    assert codes.shape == (len(wave), codec.codebooks, codec.frames(wave.shape[-1]))
    assert codes.dtype == torch.int64 and 0 <= int(codes.min()) <= int(codes.max()) < codec.codebook_size
    assert len(codes.unique()) > 1
    for levels in (1, codec.codebooks):
        sound = codec.decode(codes[:, :levels], wave.shape[-1])
        assert sound.shape == (len(wave), 2, wave.shape[-1]) and sound.isfinite().all()
    assert codec.decode(codes).shape[-1] >= wave.shape[-1]
    return codes


@pytest.mark.parametrize("latents_per_frame", [1, 2])
def test_a_codec_on_latents_keeps_the_contract(
    tiny_components: dict[str, Path], tmp_path: Path, wave: Tensor, latents_per_frame: int
):
    vae = open_vae(tiny_components["vae"])
    settings = {"levels": 3, "codebook_size": 8, "dim": 8, "latents_per_frame": latents_per_frame}
    codec = LatentCodec.on_vae(vae, blocks=1, **settings).eval()
    assert codec.frame_rate_hz == 50 / latents_per_frame
    assert codec.bits_per_second(2) == codec.frame_rate_hz * 2 * 3
    codes = check_contract(codec, wave)
    codec.save_pretrained(tmp_path / "codec")
    again = open_codec(tmp_path / "codec")
    assert again.fingerprint == codec.fingerprint and isinstance(again, LatentCodec)
    assert again.vae_fingerprint == vae.fingerprint
    assert torch.equal(again.encode(wave), codes)
    mono = wave.mean(dim=1, keepdim=True)
    assert torch.equal(codec.encode(mono), codec.encode(mono.expand(-1, 2, -1)))


def test_chunks_of_a_codec_on_latents_are_one_pass(tiny_codec: Path, monkeypatch: pytest.MonkeyPatch):
    codec = open_codec(tiny_codec)
    assert isinstance(codec, LatentCodec)
    for branch in (codec.encoder, codec.decoder):
        torch.nn.init.normal_(branch.leave.weight, std=0.5)  # type: ignore[union-attr]  # else it adds nothing
    latents = torch.randn(1, codec.vae.latent_dim, 41)
    whole = codec.encode_latents(latents)
    found = codec.decode_latents(whole)
    monkeypatch.setattr("duotok.renderer.latent_codec.CHUNK_FRAMES", 7)
    assert torch.equal(codec.encode_latents(latents), whole)
    torch.testing.assert_close(codec.decode_latents(whole), found)


@pytest.mark.parametrize(("name", "rate_hz"), [("encodec", 75), ("dac", 400), ("mimi", 12.5)])
def test_a_published_codec_keeps_the_contract(
    published: dict[str, Path], tmp_path: Path, wave: Tensor, name: str, rate_hz: float
):
    codec = open_codec(published[name])
    assert isinstance(codec, PublishedCodec)
    assert (codec.frame_rate_hz, codec.codebooks, codec.codebook_size) == (rate_hz, 8, 16)
    codes = check_contract(codec, wave)
    codec.save_pretrained(tmp_path / name)
    again = open_codec(tmp_path / name)
    assert again.fingerprint == codec.fingerprint
    assert torch.equal(again.encode(wave), codes)
    fewer = PublishedCodec.from_hub(str(published[name]), codebooks=2)
    assert torch.equal(fewer.encode(wave), codes[:, :2])


def test_a_published_codec_is_what_transformers_runs(published: dict[str, Path], wave: Tensor):
    import soxr
    from transformers import EncodecModel

    model = EncodecModel.from_pretrained(published["encodec"]).eval()
    mono = soxr.resample(wave[0].mean(dim=0).numpy(), 48_000, 24_000)
    padded = torch.nn.functional.pad(torch.from_numpy(mono), (0, -len(mono) % 320))[None, None]
    with torch.no_grad():
        wanted = model.encode(padded, bandwidth=24.0, return_dict=False)[0][0]
    assert torch.equal(open_codec(published["encodec"]).encode(wave[:1]), wanted[:, :8])


def test_long_waves_go_through_a_published_codec_by_chunks(
    published: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    codec = open_codec(published["dac"])  # convolutions only: its reach is finite
    wave = 0.1 * torch.randn(1, 1, 48_000)
    whole = codec.encode(wave)
    sound = codec.decode(whole)
    monkeypatch.setattr("duotok.tokenizer.published_codecs.CHUNK_SECONDS", 0.2)
    monkeypatch.setattr("duotok.tokenizer.published_codecs.HALO_SECONDS", 0.25)
    assert torch.equal(codec.encode(wave), whole)
    torch.testing.assert_close(codec.decode(whole), sound, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("codes", "samples", "reason"),
    [
        (torch.zeros(1, 5, 10, dtype=torch.long), None, "4 codebooks"),
        (torch.zeros(4, 10, dtype=torch.long), None, "4 codebooks"),
        (torch.full((1, 4, 10), 8), None, r"0\.\.7"),
        (torch.zeros(1, 4, 10, dtype=torch.long), 9601, "1 to 9600 samples"),
    ],
)
def test_codes_of_another_codec_are_refused(tiny_codec: Path, codes: Tensor, samples: int, reason: str):
    with pytest.raises(ConfigError, match=reason):
        open_codec(tiny_codec).decode(codes, samples)


@pytest.mark.parametrize("shape", [(2, 100), (1, 3, 100), (1, 2, 0)])
def test_what_is_no_wave_is_refused(tiny_codec: Path, shape: tuple[int, ...]):
    with pytest.raises(AudioError, match="needs a wave"):
        open_codec(tiny_codec).encode(torch.zeros(shape))


def test_what_is_no_codec_is_refused(
    tiny_components: dict[str, Path], published: dict[str, Path], tmp_path: Path
):
    with pytest.raises(CheckpointError, match="holds a 'spectral_vae'"):
        open_codec(tiny_components["vae"])
    with pytest.raises(CheckpointError):
        open_codec(tmp_path / "missing")
    with pytest.raises(ConfigError, match="keeps a scale"):
        open_codec(save_published("encodec", tmp_path / "scaled", normalize=True))
    with pytest.raises(ConfigError, match="1 to 9 codebooks, not 10"):
        PublishedCodec.from_hub(str(published["dac"]), codebooks=10)
    (published["dac"] / "model.safetensors").rename(tmp_path / "weights")
    with pytest.raises(ConfigError, match="cannot load the codec"):
        open_codec(published["dac"])
    (tmp_path / "weights").rename(published["dac"] / "model.safetensors")


def make_features(count: int, seed: int = 0) -> Tensor:
    """Features [1, count, 4] around 16 places of different size."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.randn(16, 4, generator=generator) * 3
    chosen = torch.randint(16, (count,), generator=generator)
    return (places[chosen] + 0.3 * torch.randn(count, 4, generator=generator))[None]


@pytest.mark.parametrize("quantizer", ["moving_average", "simvq"])
def test_each_level_refines_those_before(quantizer: str):
    features = make_features(2000)
    residual = ResidualQuantizer(3, 16, 4, quantizer).eval()
    residual.fit_to(features[0])
    codes = residual.encode(features)
    errors = [float((residual.decode(codes[:, :n]).detach() - features).square().mean()) for n in (1, 2, 3)]
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]
    found = residual(features)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.vectors, residual.decode(codes))


def test_dropped_levels_neither_count_nor_learn():
    features = torch.cat([make_features(50), make_features(50, seed=1)])
    residual = ResidualQuantizer(2, 8, 4).train()
    before = [level.basis.clone() for level in (residual.level(0), residual.level(1))]
    found = residual(features, torch.tensor([1, 1]))
    assert torch.equal(residual.level(1).basis, before[1])
    assert not torch.equal(residual.level(0).basis, before[0])
    torch.testing.assert_close(found.vectors, before[0][found.codes[:, 0]])
    found = residual.eval()(features, torch.tensor([2, 1]))
    levels = [residual.level(n).basis[found.codes[:, n]] for n in (0, 1)]
    torch.testing.assert_close(found.vectors[0], levels[0][0] + levels[1][0])
    torch.testing.assert_close(found.vectors[1], levels[0][1])


def test_moving_averages_find_the_centres_and_revive_dead_codes():
    torch.manual_seed(0)
    features = make_features(1000)[0]
    quantizer = MovingAverageVQ(16, 4)
    quantizer.basis.fill_(100.0)  # so far away that one code takes all, and the others die
    quantizer.basis[0] = 0
    for _ in range(1200):
        quantizer.learn(features, quantizer.encode(features))
    codes = quantizer.encode(features)
    assert len(codes.unique()) == 16
    error = (quantizer.basis[codes] - features).square().mean()
    assert error < 0.2 * features.var()
    centre = features[codes == codes[0]].mean(dim=0)
    torch.testing.assert_close(quantizer.basis[codes[0]], centre, atol=0.05, rtol=0)


@pytest.fixture(scope="module")
def shards(tiny_components: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents [frames, 8] that move slowly from place to place, of the tiny VAE."""
    folder = tmp_path_factory.mktemp("shards")
    vae = open_vae(tiny_components["vae"])
    origin = ShardOrigin(
        track="accompaniment", tokenizer_fingerprint="any", vae_fingerprint=str(vae.fingerprint)
    )
    places = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    pairs = {}
    for item in range(3):
        chosen = torch.randint(12, (20,), generator=torch.Generator().manual_seed(item))
        latents = places[chosen].repeat_interleave(10, dim=0) + 0.1 * torch.randn(200, 8)
        pairs[f"item{item}"] = torch.zeros(100, dtype=torch.long), latents
    write_shard(folder, 0, pairs, origin)
    return folder


def load_recipe(shards: Path, vae: Path, *overrides: str) -> recipe.Config:
    path = Path(recipe.__file__).parent / "train_acoustic_codec" / "tiny.yaml"
    return load_config(recipe.Config, path, [f"vae={vae}", f"data.latents=[{shards}]", *overrides])


@pytest.mark.parametrize("settings", [("model.latents_per_frame=2",), ("model.quantizer=simvq",)])
def test_the_recipe_learns_and_keeps_the_vae(
    shards: Path, tiny_components: dict[str, Path], tmp_path: Path, settings: tuple[str, ...]
):
    config = load_recipe(shards, tiny_components["vae"], *settings)
    torch.manual_seed(0)
    task = recipe.build(config)
    batch = task.make_batch(np.random.default_rng(1))

    def error() -> float:
        with torch.no_grad():
            return float(task.objective.eval()(**batch)["error"])

    for level in task.objective.codec.quantizer.levels:  # type: ignore[union-attr]
        level.basis.mul_(0.3)  # type: ignore[operator]  # k-means leaves nothing to learn here
    before = error()
    run_training(task, config.train, tmp_path / "run")
    assert error() < 0.95 * before
    codec = open_codec(tmp_path / "run" / "final")
    vae = open_vae(tiny_components["vae"])
    assert isinstance(codec, LatentCodec) and codec.vae_fingerprint == vae.fingerprint
    assert all(torch.equal(codec.vae.state_dict()[name], t) for name, t in vae.state_dict().items())
    latents = batch["latents"]
    for levels in (1, 3):
        found = codec.decode_latents(codec.encode_latents(latents)[:, :levels])
        assert (found - latents).square().mean() < 0.5 * latents.var()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("vae={other}", "make the latents again or give that VAE"),
        ("data.latents=[{empty}]", "holds no shards"),
        ("data.seconds=60", "no item in"),
        ("model.levels=0", "levels must be from 1"),
        ("model.quantizer=other", "quantizer must be one of moving_average, simvq"),
    ],
)
def test_what_cannot_train_is_one_line(
    shards: Path, tiny_components: dict[str, Path], tmp_path: Path, override: str, reason: str
):
    other = open_vae(tiny_components["vae"])
    torch.nn.init.normal_(other.latent_scale)  # type: ignore[arg-type]
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    given = override.format(other=tmp_path / "other", empty=tmp_path / "empty")
    with pytest.raises(DuoTokError, match=reason):
        recipe.build(load_recipe(shards, tiny_components["vae"], given))


def test_codecs_are_measured_by_levels_beside_duotok(
    tiny_corpus: Path, tiny_bundle: Path, tiny_codec: Path, tmp_path: Path
):
    command = ["codec", "--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle), "--items", "2"]
    command += ["--seconds", "4", "--out", str(tmp_path / "results.json")]
    assert score.main(command) == 1  # this bundle has no codec
    assert score.main([*command, "--codec", str(tiny_codec)]) == 0
    found = read_results(tmp_path / "results.json")
    for levels in (1, 2, 4):
        assert found[f"codec.accompaniment_codec_{levels}_bits_per_second"] == 50 * 3 * levels
        assert f"codec.vocal_codec_{levels}_log10_mel_l1" in found
    assert found["codec.accompaniment_duotok_bits_per_second"] == 25 * 6
    table = (tmp_path / "codec" / "codec.md").read_text(encoding="utf-8")
    assert "| accompaniment_codec_4 | 600 |" in table and "| accompaniment_codec_vae | - |" in table
