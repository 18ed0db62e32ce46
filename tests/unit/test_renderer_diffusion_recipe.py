"""Latents and the diffusion decoder's recipe on them: aligned, learned from; foreign parts are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import Item, item_to_line
from duotok.recipes.renderer import latents as latents_recipe
from duotok.recipes.renderer import train_diffusion as recipe
from duotok.recipes.renderer.latents import LatentShards, ShardOrigin, encode_item, write_shard
from duotok.recipes.renderer.train_spectral_vae import fit_linear
from duotok.recipes.training.loop import run_training
from duotok.renderer.diffusion import DiffusionDecoder
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.heads import STEMS
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

RECIPES = Path(recipe.__file__).parent / "train_diffusion"
CODES = 8


def make_pair(frames: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes that stay for a few frames, and latents that are a function of the code."""
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(np.repeat(rng.integers(CODES, size=frames), 4)[:frames])
    table = torch.randn(CODES, 2, 64, generator=torch.Generator().manual_seed(7))
    return codes, table[codes].flatten(0, 1) * 1.5 + 0.3


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("parts") / "tokenizer"
    DuoTokenizer(
        DuoTokenizerConfig(
            mel_bands=32, dim=32, heads=2, feed_forward_dim=64, blocks=1, attention_window=8, code_dim=8,
            vocal_codes=CODES, accompaniment_codes=CODES, head_dim=16,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def latents_folder(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("latents")
    fingerprint = str(DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint)
    origin = ShardOrigin(track="accompaniment", tokenizer_fingerprint=fingerprint, vae_fingerprint="vae")
    write_shard(folder, 0, {"a/1": make_pair(120, 1), "a/2": make_pair(90, 2)}, origin)
    write_shard(folder, 1, {"b": make_pair(200, 3), "too short": make_pair(30, 4)}, origin)
    return folder


def load(tokenizer_folder, latents_folder, *overrides):
    settings = [f"tokenizer={tokenizer_folder}", f"data.latents={latents_folder}", *overrides]
    return load_config(recipe.Config, RECIPES / "tiny.yaml", settings)


def test_tiny_recipe_lowers_the_loss_and_exports(tmp_path, tokenizer_folder, latents_folder):
    task = recipe.build(load(tokenizer_folder, latents_folder))
    batch = task.make_batch(np.random.default_rng(123))

    def validate() -> dict[str, float]:
        torch.manual_seed(1)
        with torch.no_grad():
            return {name: float(loss) for name, loss in task.objective(**batch).items()}

    before = validate()
    run_training(task, load(tokenizer_folder, latents_folder, "train.steps=80").train, tmp_path / "run")
    after = validate()
    assert after["diffusion"] < 0.8 * before["diffusion"]
    assert after["regression"] < before["regression"] - 0.1
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "run/final")
    assert decoder.vae_fingerprint == "vae"
    assert decoder.tokenizer_fingerprint == DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint
    assert abs(float(decoder.latent_mean.mean()) - 0.3) < 0.5 and float(decoder.latent_deviation.mean()) > 1


def test_batches_align_codes_with_latents(tokenizer_folder, latents_folder):
    config = load(tokenizer_folder, latents_folder)
    batch = recipe.build(config).make_batch(np.random.default_rng(0))
    table = torch.randn(CODES, 2, 64, generator=torch.Generator().manual_seed(7))
    for codes, offset, latents in zip(batch["codes"], batch["offset"], batch["latents"], strict=True):
        assert codes.shape == (70,) and latents.shape == (64, 100)
        expected = table[codes[offset : offset + 50]].flatten(0, 1).T * 1.5 + 0.3
        assert torch.allclose(latents, expected, atol=1e-2)  # stored as float16


def test_tokenizer_is_not_trained(tokenizer_folder, latents_folder):
    objective = recipe.build(load(tokenizer_folder, latents_folder)).objective.train()
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("decoder.") for name in trained)
    assert not objective.tokenizer.training


def test_shards_of_another_tokenizer_are_refused(tmp_path, tokenizer_folder):
    origin = ShardOrigin(track="accompaniment", tokenizer_fingerprint="other", vae_fingerprint="vae")
    write_shard(tmp_path, 0, {"a": make_pair(100, 1)}, origin)
    with pytest.raises(CheckpointError, match="tokenizer other"):
        recipe.build(load(tokenizer_folder, tmp_path))


def test_mixed_empty_and_damaged_shards_are_refused(tmp_path, tokenizer_folder):
    with pytest.raises(DataError, match="no shards"):
        recipe.build(load(tokenizer_folder, tmp_path))
    for number, vae in enumerate(("one", "two")):
        origin = ShardOrigin(track="vocal", tokenizer_fingerprint="t", vae_fingerprint=vae)
        write_shard(tmp_path, number, {f"item {vae}": make_pair(40, number)}, origin)
    with pytest.raises(CheckpointError, match="different"):
        LatentShards(tmp_path)
    (tmp_path / "shard-00001.safetensors").write_bytes(b"not a shard")
    with pytest.raises(DataError, match="damaged"):
        LatentShards(tmp_path)


def test_wrong_widths_are_named(tokenizer_folder, latents_folder):
    with pytest.raises(ConfigError, match="feature_dim"):
        recipe.build(load(tokenizer_folder, latents_folder, "model.feature_dim=48"))


def test_the_vocal_decoder_is_the_same_model_on_vocal_shards(tmp_path, tokenizer_folder):
    fingerprint = str(DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint)
    origin = ShardOrigin(track="vocal", tokenizer_fingerprint=fingerprint, vae_fingerprint="vae")
    write_shard(tmp_path / "latents", 0, {"a": make_pair(120, 1)}, origin)
    settings = [f"tokenizer={tokenizer_folder}", f"data.latents={tmp_path / 'latents'}", "train.steps=1"]
    config = load_config(recipe.Config, RECIPES / "vocal/tiny.yaml", settings)
    assert config.model == load_config(recipe.Config, RECIPES / "tiny.yaml").model
    run_training(recipe.build(config), config.train, tmp_path / "run")
    assert DiffusionDecoder.from_pretrained(tmp_path / "run/final").track == "vocal"


def test_the_papers_objective_trains_and_draws(tmp_path, tokenizer_folder, latents_folder):
    config = load(tokenizer_folder, latents_folder, "model.objective=v", "train.steps=2")
    assert load_config(recipe.Config, RECIPES / "v_prediction/small.yaml").model.objective == "v"
    run_training(recipe.build(config), config.train, tmp_path / "run")
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "run/final")
    generator = torch.Generator().manual_seed(0)
    latents = decoder.sample(torch.randn(1, 5, 32), steps=3, guidance=2.0, generator=generator)
    assert latents.shape == (1, 64, 10) and latents.isfinite().all()


@pytest.mark.parametrize("setting", ["data.seconds=0.03", "data.context_seconds=-1"])
def test_a_window_shorter_than_a_token_is_refused(setting, tokenizer_folder, latents_folder):
    with pytest.raises(ConfigError, match="data.seconds must be at least 0.04"):
        load(tokenizer_folder, latents_folder, setting)


def test_base_is_the_papers_size():
    config = load_config(recipe.Config, RECIPES / "base.yaml")
    with torch.device("meta"):
        decoder = DiffusionDecoder(config.model)
    assert 380e6 < sum(parameter.numel() for parameter in decoder.parameters()) < 420e6


def test_a_start_is_gone_on_from(tmp_path, tokenizer_folder, latents_folder):
    first = load(tokenizer_folder, latents_folder, "train.steps=2")
    run_training(recipe.build(first), first.train, tmp_path / "first")
    start = f"start_from={tmp_path / 'first' / 'final'}"
    objective = recipe.build(load(tokenizer_folder, latents_folder, start)).objective
    known = DiffusionDecoder.from_pretrained(tmp_path / "first" / "final").state_dict()
    for name, weight in objective.decoder.state_dict().items():
        torch.testing.assert_close(weight, known[name])
    with pytest.raises(ConfigError, match="another model"):
        recipe.build(load(tokenizer_folder, latents_folder, start, "model.blocks=1", "model.dim=48"))
    other = tmp_path / "other-latents"
    fingerprint = str(DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint)
    origin = ShardOrigin(track="accompaniment", tokenizer_fingerprint=fingerprint, vae_fingerprint="new")
    write_shard(other, 0, {"a": make_pair(120, 1)}, origin)
    with pytest.raises(CheckpointError, match="trained on the VAE vae"):
        recipe.build(load(tokenizer_folder, other, start))


@pytest.fixture
def vae_and_latents(tmp_path, tokenizer_folder):
    """A VAE, and latents of chords that it made: each code is a chord."""
    vae = SpectralVAE(SpectralVAEConfig(low_bins=400, group=64, decoder_blocks=0))
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(np.repeat(rng.integers(CODES, size=25), 8))
    times = torch.arange(len(codes) * 1920) / 48_000
    pitches = 48 + 3 * codes.repeat_interleave(1920)
    wave = 0.3 * torch.sin(2 * torch.pi * times * 440 * 2 ** ((pitches - 69) / 12))
    fit_linear(vae, [wave.expand(2, -1)])
    vae.save_pretrained(tmp_path / "vae")
    vae = SpectralVAE.from_pretrained(tmp_path / "vae")
    origin = ShardOrigin(
        track="accompaniment",
        tokenizer_fingerprint=str(DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint),
        vae_fingerprint=str(vae.known_as),
    )
    latents = vae.encode_song(wave.expand(2, -1)).T
    write_shard(tmp_path / "latents", 0, {"a": (codes, latents)}, origin)
    return tmp_path / "vae", tmp_path / "latents"


def test_with_a_vae_the_chroma_is_foretold(tmp_path, tokenizer_folder, vae_and_latents):
    vae, latents = vae_and_latents
    config = load(tokenizer_folder, latents, f"vae={vae}", "train.steps=60", "loss.drop_features=0")
    task = recipe.build(config)
    trained = {name for name, p in task.objective.named_parameters() if p.requires_grad}
    assert all(name.startswith("decoder.") for name in trained) and not task.objective.train().vae.training
    batch = task.make_batch(np.random.default_rng(5))
    with torch.no_grad():
        before = float(task.objective(**batch)["chroma"])
    run_training(task, config.train, tmp_path / "run")
    decoder = DiffusionDecoder.from_pretrained(tmp_path / "run/final")
    assert decoder.config.foretells_chroma
    with torch.no_grad():
        after = float(task.objective(**batch)["chroma"])
    assert before > 0.8 and after < 0.5 * before
    start = f"start_from={tmp_path / 'run' / 'final'}"
    recipe.build(load(tokenizer_folder, latents, f"vae={vae}", start))
    with pytest.raises(ConfigError, match="foretells chroma.*give vae"):
        recipe.build(load(tokenizer_folder, latents, start))


def test_a_decoder_may_learn_to_foretell_later(tmp_path, tokenizer_folder, vae_and_latents):
    vae, latents = vae_and_latents
    first = load(tokenizer_folder, latents, "train.steps=2")
    run_training(recipe.build(first), first.train, tmp_path / "first")
    start = DiffusionDecoder.from_pretrained(tmp_path / "first/final")
    assert not start.config.foretells_chroma
    settings = (f"vae={vae}", f"start_from={tmp_path / 'first/final'}")
    decoder = recipe.build(load(tokenizer_folder, latents, *settings)).objective.decoder
    assert decoder.config.foretells_chroma
    for name, weight in start.state_dict().items():
        torch.testing.assert_close(decoder.state_dict()[name], weight)


def test_the_vae_must_be_the_latents_own(tmp_path, tokenizer_folder, latents_folder, tiny_components):
    with pytest.raises(CheckpointError, match="the VAE vae made the latents, .* give that one"):
        recipe.build(load(tokenizer_folder, latents_folder, f"vae={tiny_components['vae']}"))


class NoiseItem:
    """An item of any length without files."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def read(self, part: str) -> torch.Tensor:
        return torch.randn(2, self.samples, generator=torch.Generator().manual_seed(len(part)))


@pytest.mark.parametrize("samples", [1, 960, 961, 1920, 100_001])
def test_two_latent_frames_per_code(tmp_path, samples, tokenizer_folder):
    tokenizer = DuoTokenizer.from_pretrained(tokenizer_folder)
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
    with pytest.raises(DataError, match="item x"):
        write_shard(tmp_path, 1, {"x": (torch.zeros(3), torch.zeros(5, 64))}, origin)
    with pytest.raises(CheckpointError, match="made by"):
        shards.require(ShardOrigin(track="vocal", tokenizer_fingerprint="t", vae_fingerprint="v"))


def test_a_vae_of_another_rate_is_refused(tmp_path, tiny_components, tiny_corpus, capsys):
    vae = SpectralVAE(
        SpectralVAEConfig(
            mid_latents=6, side_latents=2, hop_samples=480, low_bins=64, group=64, decoder_blocks=0, dim=16
        )
    )
    vae.save_pretrained(tmp_path / "vae")
    command = ["--tokenizer", str(tiny_components["tokenizer"]), "--vae", str(tmp_path / "vae")]
    command += ["--manifest", str(tiny_corpus / "test.jsonl"), "--out", str(tmp_path / "latents")]
    assert latents_recipe.main(command) == 1
    message = capsys.readouterr().err.strip()
    assert "latents at 100 Hz, the decoder needs 2 per code, 50 Hz" in message and "\n" not in message


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Path:
    """Of three of the items: the chord goes up by a half tone each second, each song has its own style."""
    path = tmp_path_factory.mktemp("manifest") / "train.jsonl"
    names = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    items = []
    for number, (name, seconds) in enumerate((("a/1", 4.8), ("a/2", 3.6), ("b", 8.0))):
        chords = [(float(k), min(k + 1.0, seconds), f"{names[k]}:maj") for k in range(int(np.ceil(seconds)))]
        items.append(
            Item(
                id=name, split="train", source="test", song=name, seconds=seconds, sample_rate_hz=48_000,
                stems=dict.fromkeys(STEMS, "none.flac"), mix="none.flac", tempo_bpm=120.0,
                beats_seconds=[], downbeats_seconds=[], chords=chords, key=None, notes=[], voice="v",
                style=f"style {number}", root=path.parent,
            )
        )  # fmt: skip
    path.write_text("".join(f"{item_to_line(item)}\n" for item in items))
    return path


def test_charts_stand_beside_the_frames_they_are_of(tokenizer_folder, latents_folder, manifest):
    task = recipe.build(load(tokenizer_folder, latents_folder, f"data.manifest={manifest}"))
    styles = task.objective.decoder.config.styles
    assert styles == ("style 0", "style 1", "style 2")
    rng, seen = np.random.default_rng(0), set()
    known = LatentShards(latents_folder)
    for _ in range(8):
        batch = task.make_batch(rng)
        for chart, latents in zip(batch["chart"], batch["latents"], strict=True):
            name, start = find_latents(known, latents)
            assert (chart[:, 1] == ["a/1", "a/2", "b"].index(name)).all()
            assert chart[:, 0].tolist() == [(start + frame) // 25 for frame in range(50)]
            seen.add(name)
    assert seen == {"a/1", "a/2", "b"}


def find_latents(shards: LatentShards, latents: torch.Tensor) -> tuple[str, int]:
    """The item and the code frame from which latents [64, frames] were cut."""
    for name, frames in shards.frames.items():
        whole = shards.cut(name, 0, frames, context_start=0, context_frames=frames).latents
        for start in range(frames - latents.shape[1] // 2 + 1):
            if torch.equal(whole[:, 2 * start : 2 * start + latents.shape[1]], latents):
                return name, start
    raise AssertionError("no item has these latents")


def test_a_manifest_of_other_items_is_refused(tokenizer_folder, latents_folder, manifest, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(manifest.read_text().replace('"id":"', '"id":"not '))
    with pytest.raises(DataError, match="no item of .*other.jsonl is in"):
        recipe.build(load(tokenizer_folder, latents_folder, f"data.manifest={other}"))


def test_a_decoder_that_was_told_nothing_goes_on_with_charts(
    tmp_path, tokenizer_folder, latents_folder, manifest
):
    first = load(tokenizer_folder, latents_folder, "train.steps=2")
    run_training(recipe.build(first), first.train, tmp_path / "first")
    told = (f"start_from={tmp_path / 'first/final'}", f"data.manifest={manifest}")
    decoder = recipe.build(load(tokenizer_folder, latents_folder, *told)).objective.decoder
    known = DiffusionDecoder.from_pretrained(tmp_path / "first/final")
    features = torch.randn(1, 20, 32)
    chart = torch.zeros(1, 20, 5, dtype=torch.int64)
    for each in (None, chart):  # what it has learned stays, and a chart says nothing yet
        expected = known.encode_condition(features)
        torch.testing.assert_close(decoder.encode_condition(features, chart=each), expected)


def test_new_styles_come_after_those_that_a_decoder_knows(
    tmp_path, tokenizer_folder, latents_folder, manifest
):
    first = load(tokenizer_folder, latents_folder, f"data.manifest={manifest}", "train.steps=3")
    run_training(recipe.build(first), first.train, tmp_path / "first")
    other = tmp_path / "other.jsonl"
    other.write_text(manifest.read_text().replace("style 1", "a new one"))
    told = (f"start_from={tmp_path / 'first/final'}", f"data.manifest={other}")
    decoder = recipe.build(load(tokenizer_folder, latents_folder, *told)).objective.decoder
    assert decoder.config.styles == ("style 0", "style 1", "style 2", "a new one")
    known = DiffusionDecoder.from_pretrained(tmp_path / "first/final")
    table, before = (each.chart.tables[1].weight for each in (decoder, known))
    assert before.any() and torch.equal(table[:4], before) and not table[4].any()


def test_a_chart_tells_what_codes_do_not(tmp_path, tokenizer_folder, manifest):
    """Latents that follow the chord alone, under codes that are all the same."""
    torch.manual_seed(0)
    fingerprint = str(DuoTokenizer.from_pretrained(tokenizer_folder).fingerprint)
    origin = ShardOrigin(track="accompaniment", tokenizer_fingerprint=fingerprint, vae_fingerprint="vae")
    sounds, pairs = torch.randn(12, 64), {}
    for name, frames in (("a/1", 120), ("a/2", 90), ("b", 200)):
        latents = sounds[torch.arange(2 * frames) // 50] + 0.1 * torch.randn(2 * frames, 64)
        pairs[name] = torch.zeros(frames, dtype=torch.int64), latents
    write_shard(tmp_path / "latents", 0, pairs, origin)
    losses = {}
    for told in (None, manifest):
        config = load(
            tokenizer_folder,
            tmp_path / "latents",
            "train.steps=80",
            f"data.manifest={told or 'null'}",
            "loss.drop_chart=0",
            "loss.drop_column=0",
            "loss.know_prefix=0",
        )
        task = recipe.build(config)
        run_training(task, config.train, tmp_path / f"run-{told is None}")
        batch = task.make_batch(np.random.default_rng(5))
        with torch.no_grad():
            torch.manual_seed(1)
            losses[told] = float(task.objective.eval()(**batch)["diffusion"])
    assert losses[manifest] < 0.7 * losses[None]
