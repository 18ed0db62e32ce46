import json
import shutil
from pathlib import Path

import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.accompany import bundle as bundles
from duotok.recipes.accompany.bundle import COMPONENTS, assemble_bundle, default_bundle, load_bundle, main
from duotok.tokenizer.common.checkpoint import SHARD_BYTES
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import DuoTokenizerConfig
from duotok.tokenizer.separator import MaskSeparator, SeparatorConfig


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


def test_the_shipped_model_is_listed_and_small_enough_for_a_repository():
    folder = default_bundle()
    listed = json.loads((folder / "bundle.json").read_text())["files"]
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert set(found) - {"README.md"} == {*listed, "bundle.json"}
    assert {f"{component}/config.json" for component in COMPONENTS} <= set(listed)
    sizes = [path.stat().st_size for path in found.values()]
    assert max(sizes) <= SHARD_BYTES + 100_000 and sum(sizes) < 100_000_000


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
    ("change", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"format": 1}', "lists no files"),
        ({"format": 99}, "99"),
        ({"defaults": [1, 2]}, "defaults must be a mapping"),
        ({"name": 7}, "name must be a text"),
        ({"components": None}, "components must be a mapping"),
        ({"components": {}}, "states the fingerprint None of tokenizer"),
        ({"fingerprint": "0" * 16}, "states the fingerprint 0000000000000000"),
        ({"files": {}}, "lists no tokenizer"),
        ({"files": {"/etc/hostname": "0"}}, "not inside the bundle"),
        ({"files": {"lm/../../secret": "0"}}, "not inside the bundle"),
        ({"files": {"C:\\secret": "0"}}, "not inside the bundle"),
    ],
)
def test_a_strange_description_is_one_line(copy, change, message):
    path = copy / "bundle.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_bundle(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lm/model-00002.safetensors", "renderer/vocal/config.json", "separator/x"])
def test_files_that_are_not_listed_are_refused_where_parts_are_read(copy, name):
    (copy / "README.md").write_text("a card is nobody's to check")
    load_bundle(copy)
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"{Path(name).name} is not listed"):
        load_bundle(copy)


@pytest.mark.parametrize("component", ["lm", "renderer/accompaniment"])
@pytest.mark.parametrize(("key", "message"), [("extra", "tokenizer 0000"), ("fingerprint", "which has 0000")])
def test_parts_of_another_training_run_are_refused(copy, component, key, message):
    path = copy / component / "config.json"
    part = json.loads(path.read_text())
    part[key] = "0" * 16 if key == "fingerprint" else part["extra"] | {"tokenizer_fingerprint": "0" * 16}
    path.write_text(json.dumps(part))
    description = json.loads((copy / "bundle.json").read_text())
    description["files"][f"{component}/config.json"] = bundles._sha256(path)
    (copy / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=message):
        load_bundle(copy)


def test_assembling_refuses_parts_that_do_not_belong_together(
    tiny_components, tmp_path, make_tiny_components
):
    others = make_tiny_components(tmp_path / "others", seed=1)
    for part in ("tokenizer", "lm", "vae", "accompaniment"):
        with pytest.raises(CheckpointError, match="one training run"):
            assemble_bundle(tmp_path / "out", **{**tiny_components, part: others[part]})
    assert [path.name for path in tmp_path.iterdir()] == ["others"]


def test_a_model_of_any_size_can_be_bundled(tiny_components, tmp_path):
    torch.manual_seed(0)
    small = dict(mel_bands=16, dim=16, heads=2, feed_forward_dim=16, blocks=1, attention_window=2, head_dim=8)
    many = DuoTokenizerConfig(**small, code_dim=64, vocal_codes=820_000, mask_head=True)
    large = MaskSeparator(SeparatorConfig(tokenizer=many, channels=2, scales=1, coarse_bands=2))
    large.save_pretrained(tmp_path / "large", half=True)
    out = assemble_bundle(tmp_path / "out", **{**tiny_components, "separator": tmp_path / "large"})
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) > 105_000_000
    load_bundle(out)


def test_weights_beyond_16_bits_are_not_written(tiny_components, tmp_path):
    lm = DualTrackLM.from_pretrained(tiny_components["lm"])
    with torch.no_grad():
        lm.project.weight[0, 0] = 1e6
    lm.save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="project.weight"):
        assemble_bundle(tmp_path / "out", **{**tiny_components, "lm": tmp_path / "lm"})


def test_command(tiny_components, tmp_path, capsys):
    names = [(f"--{name.replace('_', '-')}", str(folder)) for name, folder in tiny_components.items()]
    parts = [text for pair in names for text in pair]
    out = tmp_path / "out"
    (tmp_path / "card.md").write_text("# Mine\n")
    card = ["--card", str(tmp_path / "card.md")]
    assert main([*parts, *card, "--out", str(out), "--half", "--name", "yours"]) == 0
    assert main([*parts, "--out", str(out), "--half", "--name", "mine", "--default", "guidance=2.5"]) == 0
    assert (out / "README.md").read_text() == "# Mine\n"  # of the one that was replaced
    bundle = load_bundle(out)
    assert (bundle.name, bundle.defaults) == ("mine", {"guidance": 2.5})
    results = tmp_path / "results.json"
    results.write_text('{"generate.harmony": 1.234, "generate.rtf_30s": 0.25}')
    told = ["--data", "pop909", "--data", "my <b>songs</b> | (mine)", "--licence", "cc-by-4.0"]
    told += ["--results", str(results)]
    assert main([*parts, *told, "--out", str(out), "--half", "--name", "mine", "--default", "steps=3"]) == 0
    written = (out / "README.md").read_text()
    for line in (
        'license: "cc-by-4.0"',
        "# DuoTok mine",
        "- scores of POP909 (MIT)",
        "- my b songs /b (mine)",
    ):
        assert f"\n{line}\n" in written
    assert "(1.0 is chance) | 1.23 |\n" in written and "0.25 s" in written and "steps 3." in written
    assert "ballad, rock, waltz" in written and "| `separator/` |" not in written
    results.write_text("{}")
    assert main([*parts, "--results", str(results), "--out", str(out)]) == 1
    assert "none of the figures" in capsys.readouterr().err.splitlines()[-1]
    assert main([*parts[:-1], str(tmp_path / "nothing"), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert load_bundle(out).name == "mine"
