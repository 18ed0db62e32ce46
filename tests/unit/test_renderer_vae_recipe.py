"""The VAE recipe on the synthetic corpus: it learns, repeats, exports."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.renderer import train_spectral_vae as recipe
from duotok.recipes.renderer.train_spectral_vae import Moments, principal_components
from duotok.recipes.training.loop import run_training
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError, DataError

TINY = Path(recipe.__file__).parent / "train_spectral_vae" / "tiny.yaml"


def load(corpus: Path, *overrides: str) -> recipe.Config:
    return load_config(recipe.Config, TINY, [f"data.manifest={corpus / 'train.jsonl'}", *overrides])


def test_tiny_recipe_lowers_the_loss_and_exports(tiny_corpus, tmp_path):
    config = load(tiny_corpus, "train.steps=25", "train.learning_rate=0.001")
    task = recipe.build(config)
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


def test_linear_start_is_the_same_each_time(tiny_corpus):
    states = []
    for _ in range(2):
        torch.manual_seed(0)  # as the loop does
        states.append(recipe.build(load(tiny_corpus)).objective.state_dict())
    first, second = states
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_excerpts_depend_on_the_generator_alone(tiny_corpus):
    make_batch = recipe.build(load(tiny_corpus)).make_batch
    one, two, other = (make_batch(np.random.default_rng(seed))["wave"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert one.shape == (2, 2, 48_000)


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


@pytest.mark.parametrize("override", ["data.seconds=0", "data.parts={piano: 1}", "data.lowest_gain_db=9"])
def test_wrong_data_settings_are_refused(tiny_corpus, override):
    with pytest.raises(ConfigError, match="data"):
        load(tiny_corpus, override)


def test_an_empty_manifest_is_refused(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match="empty"):
        recipe.build(load(tmp_path))


def run(corpus: Path, out: Path, *overrides: str) -> int:
    settings = [f"data.manifest={corpus / 'train.jsonl'}", "train.steps=2", *overrides]
    return recipe.main([str(TINY), "--out", str(out), *(part for one in settings for part in ("--set", one))])


@pytest.fixture(scope="module")
def start_folder(tiny_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("vae")
    assert run(tiny_corpus, out) == 0
    return out / "final"


def test_the_latents_of_an_equal_coding_stay_good(tiny_corpus, start_folder, tmp_path):
    assert run(tiny_corpus, tmp_path, f"start_from={start_folder}") == 0
    start, later = (SpectralVAE.from_pretrained(folder) for folder in (start_folder, tmp_path / "final"))
    wave = recipe.build(load(tiny_corpus)).make_batch(np.random.default_rng(3))["wave"]
    with torch.no_grad():
        latents = start.encode(wave)
        assert torch.equal(latents, later.encode(wave))
        assert not torch.equal(start.decode_features(latents), later.decode_features(latents))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("start_from={start}", "model.power=0.3"), "model.power is 0.3 but 0.2 in"),
        (("start_from={start}", "model.encoder_blocks=1"), "model.encoder_blocks is 1 but 0 in"),
        (("start_from={start}/nothing",), "nothing"),
        (("start_from={tokenizer}",), "tokenizer"),
        (("model.energy_gains=true",), "energy_gains need side_coding bands"),
        (("data.energy_excerpts=0",), "at least 1"),
    ],
)
def test_the_command_ends_in_one_line(
    tiny_corpus, tiny_components, start_folder, tmp_path, capsys, overrides, told
):
    names = {"start": start_folder, "tokenizer": tiny_components["tokenizer"]}
    assert run(tiny_corpus, tmp_path / "out", *(text.format(**names) for text in overrides)) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and told in lines[0]
    assert not (tmp_path / "out" / "final").exists()
