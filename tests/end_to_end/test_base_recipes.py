"""Every base recipe builds at full width, and a block of it takes a step, from the corpus to the decoders."""

import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).parents[2] / "recipes"
BASES = {
    match[1]: path
    for path in sorted(RECIPES.glob("**/base.yaml"))
    if (match := re.search(r"# Run: .*-m duotok\.recipes\.([\w.]+)", path.read_text(encoding="utf-8")))
}


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    torch.set_num_threads(1)
    yield tmp_path
    shutil.rmtree(tmp_path)  # weights of full width


def test_every_base_recipe_takes_a_step(tiny_corpus: Path, out: Path):
    manifest = str(tiny_corpus / "train.jsonl")

    def train(kind: str, **settings: object) -> Path:
        (name,) = [name for name in left if name.endswith(kind)]
        command = [str(BASES[name]), "--out", str(out / kind)]
        settings |= {"train.steps": 1, "train.batch_size": 2, "train.precision": "fp32"}
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        assert import_module(f"duotok.recipes.{name}").main(command) == 0, name
        left.remove(name)
        shutil.rmtree(out / kind / "checkpoints", ignore_errors=True)
        return out / kind / "final"

    def run(command: str, *options: object) -> Path:
        made = out / command
        arguments = ["--manifest", manifest, "--out", str(made), *map(str, options)]
        assert import_module(f"duotok.recipes.{command}").main(arguments) == 0, command
        return made

    left = set(BASES)
    cuts = {"data.manifest": manifest, "data.seconds": 1.0}
    few = {"model.blocks": 1, "model.vocal_codes": 32, "model.accompaniment_codes": 32}
    first = train("stage1", **cuts, **few)
    second = train("stage2", **cuts, start_from=first, text="null")  # its vocabulary comes from a hub
    third = train("stage3", **cuts, start_from=second, start_cuts=2)
    train("train_separator", **cuts, start_from=second)
    tokens = run("lm.tokenize", "--tokenizer", third)
    few = {"model.layers": 1, "data.windows": "[[2.0,1]]", "data.hold_out": 0.5, "validation.windows": 1}
    train("lm.train", **few, **{"tokenizer": third, "data.tokens": tokens})
    few = {"model.encoder_blocks": 1, "model.decoder_blocks": 1, "data.fit_excerpts": 2}
    vae = train("spectral_vae" if any("spectral" in name for name in left) else "renderer.vae", **cuts, **few)
    latents = run("renderer.latents", "--tokenizer", third, "--vae", vae)
    few = {"model.blocks": 1, "model.condition_blocks": 1, "data.seconds": 2.0, "data.context_seconds": 0.4}
    train("diffusion", **few, **{"tokenizer": third, "data.latents": latents, "model.window_seconds": 1.0})
    few = {"model.blocks": 1, "model.levels": 2, "data.start_frames": 1100, "data.seconds": 1.0}
    codec = train("acoustic_codec", **few, **{"vae": vae, "data.latents": f"[{latents}]"})
    hearing = run("lm.accompgen.fit_semantic", "--encoder", first, "--clusters", 8, "--frames", 1000)
    layered = run("lm.accompgen.layered_tokens", "--semantic", hearing, "--codec", codec)
    few = {"model.layers": 1, "data.hold_out": 0.5, "coarse_levels": 1}
    few |= {"stage": "coarse", "data.windows": "{semantic: 2.0, coarse: 1.0, fine: 1.0}"}
    train("accompgen.train_stage", **few, **{"data.tokens": layered})
    few = {"data.manifest": manifest, "data.seconds": 0.4, "model.layers": 1, "model.conformer.layers": 1}
    few |= {"model.overlap_seconds": 0.1, "model.tracks": "[vocal, accompaniment]"}
    train("train_token_separator", **few, codec=codec, semantic=hearing)
    train("waveform_vae", **{"data.manifest": manifest, "data.seconds": 0.2})
    assert not left
