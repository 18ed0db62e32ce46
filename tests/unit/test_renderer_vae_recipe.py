"""The recipes of both autoencoders: whose gradients are whose, excerpts, fits, and a tiny run of each."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from duotok.recipes.accompany.bundle import assemble_bundle, load_bundle
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.renderer import latents, train_diffusion, train_spectral_vae
from duotok.recipes.renderer import train_waveform_vae as recipe
from duotok.recipes.renderer.train_spectral_vae import Moments, principal_components
from duotok.recipes.renderer.train_waveform_vae import WaveformObjective
from duotok.recipes.training.batches import MicroBatch, MicroBatches
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.diffusion import DiffusionDecoder
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.renderer.waveform_vae import OobleckVAE
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError, DataError, DuoTokError
from duotok.tokenizer.model import DuoTokenizer

RECIPES = Path(recipe.__file__).parent / "train_waveform_vae"
TINY = RECIPES / "tiny.yaml"
ADVERSARY = {"adversarial", "feature_matching", "discriminator"}


def load(corpus: Path, *overrides: str) -> recipe.Config:
    return load_config(recipe.Config, TINY, [f"data.manifest={corpus / 'train.jsonl'}", *overrides])


def run(corpus: Path, out: Path, *overrides: str) -> int:
    settings = [f"data.manifest={corpus / 'train.jsonl'}", *overrides]
    return recipe.main([str(TINY), "--out", str(out), *(part for one in settings for part in ("--set", one))])


def rows_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def task(tiny_corpus) -> Task:
    return recipe.build(load(tiny_corpus))


@pytest.fixture(scope="module")
def batch(task) -> dict[str, torch.Tensor]:
    found = MicroBatches(task, TrainConfig(), process=0)[4]
    assert isinstance(found, MicroBatch)
    return found.tensors


def objective_of(task: Task) -> WaveformObjective:
    assert isinstance(task.objective, WaveformObjective)
    task.objective.zero_grad()
    return task.objective


def has_gradients(module: torch.nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.any()) for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "learner"),
    [
        ("reconstruction", "vae"),
        ("kl", "vae"),
        ("adversarial", "vae"),
        ("feature_matching", "vae"),
        ("discriminator", "discriminators"),
    ],
)
def test_each_loss_is_learned_by_one_side(task, batch, name, learner):
    objective = objective_of(task)
    objective(**batch)[name].backward()
    for side in ("vae", "discriminators"):
        assert has_gradients(getattr(objective, side)) == (side == learner)


def test_the_total_has_the_gradients_of_both_sides(task, batch):
    objective = objective_of(task)
    loss, adversary = objective.loss, objective.adversary

    def gradients(of) -> dict[str, torch.Tensor]:
        objective.zero_grad()
        torch.manual_seed(0)
        of(objective(**batch)).backward()
        zeros = {n: torch.zeros_like(p) for n, p in objective.named_parameters()}
        return zeros | {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}

    whole = gradients(lambda losses: losses["total"])
    own = gradients(
        lambda losses: (
            losses["reconstruction"]
            + loss.kl * losses["kl"]
            + adversary.adversarial * losses["adversarial"]
            + adversary.feature_matching * losses["feature_matching"]
        )
    )
    others = gradients(lambda losses: losses["discriminator"])
    for name, gradient in whole.items():
        wanted = own[name] if name.startswith("vae.") else others[name]
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-5)


def test_the_adversary_starts_at_its_step(task, batch):
    objective = objective_of(task)
    for step, on in ((0, False), (2, False), (3, True), (4, True)):
        losses = objective(batch["wave"], torch.tensor(step))
        assert (ADVERSARY <= set(losses)) == on and (ADVERSARY & set(losses) != set()) == on
    objective(batch["wave"], torch.tensor(0))["total"].backward()
    assert has_gradients(objective.vae) and not has_gradients(objective.discriminators)
    # Data parallelism waits for all of them.
    assert all(p.grad is not None for p in objective.parameters())


def load_spectral(corpus: Path, *overrides: str) -> train_spectral_vae.Config:
    manifest = f"data.manifest={corpus / 'train.jsonl'}"
    return load_config(
        train_spectral_vae.Config, RECIPES.parent / "train_spectral_vae" / "tiny.yaml", [manifest, *overrides]
    )


BOTH = [(recipe, load, 10 * 960), (train_spectral_vae, load_spectral, 0.21 * 48_000)]


@pytest.mark.parametrize(("module", "load", "samples"), BOTH)
def test_excerpts_depend_on_the_generator_alone(tiny_corpus, tmp_path, module, load, samples):
    make_batch = module.build(load(tiny_corpus, "data.seconds=0.21")).make_batch
    one, two, other = (make_batch(np.random.default_rng(seed))["wave"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (2, 2, samples)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        module.build(load(tmp_path))


def test_a_step_draws_its_latents(task, batch):
    objective = objective_of(task)
    first, second = (objective(**batch)["reconstruction"].item() for _ in range(2))
    assert first != second


def test_the_recipe_lowers_the_loss(tiny_corpus, tmp_path):
    config = load(tiny_corpus, "train.steps=16", "train.learning_rate=0.003", "adversary.start_step=12")
    task = recipe.build(config)
    drawn = task.make_batch(np.random.default_rng(5))
    run_training(dataclasses.replace(task, make_batch=lambda rng: dict(drawn)), config.train, tmp_path)
    rows = rows_of(tmp_path)
    assert rows[-1]["reconstruction"] < 0.8 * rows[0]["reconstruction"]
    assert [ADVERSARY <= set(row) for row in rows] == [False] * 12 + [True] * 4


def test_the_command_exports_what_opens(tiny_corpus, tmp_path):
    assert run(tiny_corpus, tmp_path) == 0
    assert any("discriminators" in n for n in load_file(tmp_path / "checkpoint/weights.safetensors"))
    assert not any("discriminators" in n for n in load_file(tmp_path / "final/model.safetensors"))
    vae = OobleckVAE.from_pretrained(tmp_path / "final")
    wave = 0.1 * torch.randn(1, 2, 9600)
    with torch.no_grad():
        latents = vae.encode(wave)
        assert latents.shape == (1, 4, 10) and vae.decode(latents).shape == wave.shape


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adversary.start_step=-1", "adversary.start_step must not be negative"),
        ("loss.correlation=-0.5", "loss.correlation must not be negative"),
        ("adversary.discriminators.fft_sizes=[10]", "fft_sizes must be multiples of 4"),
        ("model.sample_rate_hz=44100", "model.sample_rate_hz must be the corpus's 48000"),
        ("loss.fft_sizes=[16384]", "raise data.seconds"),
        ("data.seconds=0.1", "data.seconds must be at least 0.2"),
        ("model.strides=[2,4]", "strides and channel_multiples"),
    ],
)
def test_wrong_settings_end_in_one_line(tiny_corpus, tmp_path, capsys, override, told):
    assert run(tiny_corpus, tmp_path / "out", override) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]
    assert not (tmp_path / "out" / "final").exists()


def test_the_base_recipe_has_the_papers_rates():
    config = load_config(recipe.Config, RECIPES / "base.yaml")
    model = config.model
    assert np.prod(model.strides) == 960 and model.latent_dim == 64 and config.data.seconds == 1.5
    with pytest.raises(ConfigError, match="no_such"):
        load_config(recipe.Config, RECIPES / "base.yaml", ["adversary.no_such=1"])


def test_tiny_recipe_lowers_the_loss_and_exports(tiny_corpus, tmp_path):
    config = load_spectral(tiny_corpus, "train.steps=25", "train.learning_rate=0.001")
    task = train_spectral_vae.build(config)
    batch = task.make_batch(np.random.default_rng(5))

    @torch.no_grad()
    def loss() -> float:
        torch.manual_seed(1)
        return float(task.objective(**batch)["total"])

    before = loss()
    same_batch = dataclasses.replace(task, make_batch=lambda rng: dict(batch))
    run_training(same_batch, config.train, tmp_path)
    assert loss() < 0.97 * before
    vae = SpectralVAE.from_pretrained(tmp_path / "final")
    with torch.no_grad():
        assert vae.decode(vae.encode(batch["wave"])).shape == batch["wave"].shape


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, tiny_components, tiny_corpus) -> Path:
    """Latents that the tiny decoder drew of the tiny corpus."""
    folder = tmp_path_factory.mktemp("drawn") / "latents"
    command = ["--tokenizer", tiny_components["tokenizer"], "--vae", tiny_components["vae"], "--out", folder]
    command += ["--manifest", tiny_corpus / "train.jsonl", "--drawn-by", tiny_components["accompaniment"]]
    assert latents.main(list(map(str, command))) == 0
    return folder


def test_drawn_latents_are_of_the_same_codes_and_are_no_recordings(
    drawn, tiny_components, tiny_corpus, tmp_path, capsys
):
    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    tokenizer = DuoTokenizer.from_pretrained(tiny_components["tokenizer"])
    vae = SpectralVAE.from_pretrained(tiny_components["vae"])
    decoder = DiffusionDecoder.from_pretrained(tiny_components["accompaniment"])
    with torch.inference_mode():
        codes, own = latents.encode_item(item, "accompaniment", tokenizer, vae)
        again, made = latents.encode_item(item, "accompaniment", tokenizer, vae, decoder)
    shards = latents.LatentShards(drawn)
    frames = len(codes)
    stored = shards.cut(item.id, 0, frames, context_start=0, context_frames=frames)
    assert torch.equal(codes, again) and torch.equal(codes, stored.codes)
    assert torch.equal(stored.latents, made.half().float().T) and not torch.allclose(own, made, atol=0.1)
    settings = [f"tokenizer={tiny_components['tokenizer']}", f"data.latents={drawn}"]
    tiny = RECIPES.parent / "train_diffusion" / "tiny.yaml"
    command = [str(tiny), "--out", str(tmp_path / "out"), *(p for one in settings for p in ("--set", one))]
    assert train_diffusion.main(command) == 1
    assert "were drawn by a decoder" in capsys.readouterr().err


def test_a_decoder_learns_on_against_an_adversary_and_latents_stay(
    tiny_corpus, tiny_components, drawn, tmp_path
):
    first = SpectralVAE.from_pretrained(tiny_components["vae"])
    settings = [f"start_from={tiny_components['vae']}", f"data.drawn={drawn}"]
    settings += ["adversary.adversarial=0.5", "adversary.width=2", "train.steps=3", "loss.noise=0"]
    config = load_spectral(tiny_corpus, *settings)
    task = train_spectral_vae.build(config)
    batch = task.make_batch(np.random.default_rng(3))
    assert batch["drawn"].shape == (1, 8, 50) and batch["played"].shape == (1, 2, 48_000)
    objective = task.objective
    for name, sides in (
        ("feature", {"vae"}),
        ("adversarial", {"vae"}),
        ("feature_matching", {"vae"}),
        ("discriminator", {"discriminators"}),
    ):
        objective.zero_grad()
        objective(**batch)[name].backward()
        assert {
            side for side in ("vae", "discriminators") if has_gradients(getattr(objective, side))
        } == sides
    without = objective(batch["wave"])  # what is drawn is judged, and need not be alike
    assert objective(**batch)["adversarial"] != without["adversarial"]
    assert objective(**batch)["feature_matching"].item() == pytest.approx(
        without["feature_matching"].item(), rel=1e-4
    )
    run_training(task, config.train, tmp_path / "run")
    again = SpectralVAE.from_pretrained(tmp_path / "run" / "final")
    with torch.no_grad():
        assert torch.equal(first.encode(batch["wave"]), again.encode(batch["wave"]))
        assert not torch.allclose(first.decode(batch["drawn"]), again.decode(batch["drawn"]))
    assert again.fingerprint != again.known_as == first.fingerprint
    bundle = assemble_bundle(
        tmp_path / "bundle", half=True, **{**tiny_components, "vae": tmp_path / "run" / "final"}
    )
    assert load_bundle(bundle).renderer.decoders["accompaniment"].vae_fingerprint == first.fingerprint


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["data.drawn=DRAWN"], "no latents of the VAE None"),
        (["data.drawn=DRAWN", "start_from=VAE"], "set adversary.adversarial"),
        (["data.drawn=EMPTY", "start_from=VAE"], "make its latents first"),
        (["data.drawn=DRAWN", "start_from=VAE", "data.seconds=0.21"], "in whole codes of 40 ms"),
        (["start_from=EMPTY"], "config.json"),
        (["adversary.adversarial=-1"], "must not be negative"),
    ],
)
def test_a_start_that_cannot_be_gone_on_from_is_one_error(
    tiny_corpus, tiny_components, drawn, tmp_path, overrides, told
):
    places = {"DRAWN": str(drawn), "VAE": str(tiny_components["vae"]), "EMPTY": str(tmp_path)}
    for name, place in places.items():
        overrides = [one.replace(name, place) for one in overrides]
    with pytest.raises(DuoTokError, match=told):
        train_spectral_vae.build(load_spectral(tiny_corpus, *overrides))


def test_linear_start_is_the_same_each_time(tiny_corpus):
    states = []
    for _ in range(2):
        torch.manual_seed(0)  # as the loop does
        states.append(train_spectral_vae.build(load_spectral(tiny_corpus)).objective.state_dict())
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_moments_and_components_are_those_of_all_vectors():
    values = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.randn(6, 6) + 3
    moments = Moments(6)
    for piece in values.split(70):
        moments.add(piece)
    torch.testing.assert_close(
        moments.covariance().float(), torch.cov(values.T, correction=0), rtol=1e-3, atol=1e-3
    )
    basis, deviations = principal_components(moments.covariance(), 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(((values - values.mean(0)) @ basis).std(0), deviations, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("override", ["seconds=0", "parts={piano: 1}", "fit_excerpts=0"])
def test_wrong_data_settings_are_refused(tiny_corpus, override):
    with pytest.raises(ConfigError, match="data"):
        load_spectral(tiny_corpus, f"data.{override}")
