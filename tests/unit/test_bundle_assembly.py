import json
import shutil
from pathlib import Path

import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.accompany import bundle as bundles
from duotok.recipes.accompany.bundle import COMPONENTS, assemble_bundle, load_bundle, main
from duotok.tokenizer.common.checkpoint import SHARD_BYTES
from duotok.tokenizer.common.errors import CheckpointError


@pytest.fixture
def copy(tiny_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_the_parts_fit_each_other_as_stored(tiny_bundle, tiny_components):
    bundle = load_bundle(tiny_bundle)
    source = DualTrackLM.from_pretrained(tiny_components["lm"])
    assert bundle.name == "tiny"
    assert bundle.lm.tokenizer_fingerprint == bundle.tokenizer.fingerprint != source.tokenizer_fingerprint
    for parameter, stored in zip(source.parameters(), bundle.lm.parameters(), strict=True):
        assert torch.equal(parameter.half().float(), stored)
    assert len(bundle.fingerprint) == 16


def test_nothing_in_a_bundle_is_large_or_unlisted(tiny_bundle):
    listed = json.loads((tiny_bundle / "bundle.json").read_text())["files"]
    found = {
        path.relative_to(tiny_bundle).as_posix(): path for path in tiny_bundle.rglob("*") if path.is_file()
    }
    assert set(found) == {*listed, "bundle.json"}
    assert {f"{component}/config.json" for component in COMPONENTS} <= set(listed)
    assert all(path.stat().st_size <= SHARD_BYTES + 100_000 for path in found.values())


def test_assembling_twice_gives_the_same_bytes(tiny_bundle, tiny_components, tmp_path):
    again = assemble_bundle(tmp_path / "again", name="tiny", **tiny_components)
    for path in tiny_bundle.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again / path.relative_to(tiny_bundle)).read_bytes()


def test_every_missing_file_is_named(copy):
    for path in sorted(copy.rglob("*.*")):
        if path.is_file():
            kept = path.read_bytes()
            path.unlink()
            with pytest.raises(CheckpointError, match=path.name):
                load_bundle(copy)
            path.write_bytes(kept)
    load_bundle(copy)


@pytest.mark.parametrize(
    "name", ["lm/model.safetensors", "tokenizer/config.json", "renderer/vae/config.json"]
)
def test_one_changed_byte_is_noticed(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-2] ^= 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=f"{Path(name).name} is damaged"):
        load_bundle(copy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format": 1}', "lists no files"),
        ('{"files": {}, "format": 99}', "99"),
    ],
)
def test_a_strange_description_is_one_line(copy, text, message):
    (copy / "bundle.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_bundle(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("component", ["lm", "renderer/accompaniment"])
def test_parts_of_another_tokenizer_are_refused(copy, component):
    path = copy / component / "config.json"
    path.write_text(path.read_text().replace(load_bundle(copy).tokenizer.fingerprint, "0" * 16))
    description = json.loads((copy / "bundle.json").read_text())
    description["files"][f"{component}/config.json"] = bundles._sha256(path)
    (copy / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="tokenizer 0000000000000000"):
        load_bundle(copy)


def test_assembling_refuses_parts_that_do_not_belong_together(
    tiny_components, tmp_path, make_tiny_components
):
    others = make_tiny_components(tmp_path / "others", seed=1)
    for part in ("tokenizer", "lm", "vae", "accompaniment"):
        with pytest.raises(CheckpointError, match="one training run"):
            assemble_bundle(tmp_path / "out", **{**tiny_components, part: others[part]})
    assert [path.name for path in tmp_path.iterdir()] == ["others"]


def test_a_bundle_that_is_too_large_is_not_written(tiny_components, tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "LARGEST_BYTES", 10_000)
    with pytest.raises(CheckpointError, match="0 MB"):
        assemble_bundle(tmp_path / "out", **tiny_components)
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_16_bits_are_not_written(tiny_components, tmp_path):
    lm = DualTrackLM.from_pretrained(tiny_components["lm"])
    with torch.no_grad():
        lm.project.weight[0, 0] = 1e6
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="project.weight"):
        assemble_bundle(tmp_path / "out", **{**tiny_components, "lm": tmp_path / "lm"})


def test_command(tiny_components, tmp_path, capsys):
    parts = [text for name, folder in tiny_components.items() for text in (f"--{name}", str(folder))]
    out = tmp_path / "out"
    assert main([*parts, "--out", str(out), "--half", "--name", "mine", "--default", "guidance=2.5"]) == 0
    bundle = load_bundle(out)
    assert (bundle.name, bundle.defaults) == ("mine", {"guidance": 2.5})
    assert str(out) in capsys.readouterr().out
    assert main([*parts[:-1], str(tmp_path / "nothing"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert load_bundle(out).name == "mine"
