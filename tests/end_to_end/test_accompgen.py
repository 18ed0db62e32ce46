"""AccompGen at size tiny: tokens, three stages, one model, a bundle, and `generate` with it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.lm.hierarchical.model import STAGES
from duotok.lm.hierarchical.stage import Stage
from duotok.recipes.accompany import bundle as bundles
from duotok.recipes.accompany import generate
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation import accompgen_part, score
from duotok.recipes.lm.accompgen import fit_semantic, join_stages, layered_tokens, train_stage
from duotok.recipes.lm.accompgen.layered_tokens import LayeredShards
from duotok.recipes.lm.accompgen.train_stage import StageWindows, measure_stage
from duotok.recipes.lm.tokens import split_songs
from duotok.renderer.latent_codec import LatentCodec, open_codec
from duotok.tokenizer.common.audio import read_audio, write_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.semantic import SemanticTokenizer

TINY = str(Path(__file__).parents[2] / "recipes/lm/accompgen/tiny.yaml")


@pytest.fixture(scope="module")
def parts(tiny_corpus, tiny_components, tiny_codec, tmp_path_factory) -> dict[str, Path]:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("accompgen")
    manifest = ["--manifest", str(tiny_corpus / "train.jsonl")]
    options = ["--encoder", str(tiny_components["tokenizer"]), "--clusters", "16", "--frames", "2000"]
    assert fit_semantic.main([*options, *manifest, "--out", str(out / "hearing")]) == 0
    made = {"hearing": out / "hearing", "codec": tiny_codec, "tokens": out / "tokens"}
    options = ["--semantic", str(made["hearing"]), "--codec", str(tiny_codec), "--out", str(made["tokens"])]
    assert layered_tokens.main([*options, *manifest, "--items-per-shard", "3"]) == 0
    for stage in STAGES:
        settings = [f"stage={stage}", f"data.tokens={made['tokens']}", "train.validate_every=20"]
        settings += ["data.hold_out=0.4", "train.steps=120"]
        command = [TINY, "--out", str(out / stage), *(part for each in settings for part in ("--set", each))]
        assert train_stage.main(command) == 0
    made["lm"] = out / "lm"
    folders = [str(out / stage / "final") for stage in STAGES]
    assert join_stages.main([*folders, "--out", str(made["lm"])]) == 0
    made["manifest"] = tiny_corpus / "train.jsonl"
    return made | {stage: out / stage for stage in STAGES}


def test_shards_hold_what_the_tokenizers_say(parts, tiny_corpus):
    shards = LayeredShards(parts["tokens"])
    assert len(shards.index.songs) == 4 and {song.shard for song in shards.index.songs} == {0, 1}
    song = shards.index.songs[-1]
    codes = shards.codes(song)
    assert codes["vocal"].shape == codes["semantic"].shape == (1, 400)
    assert codes["acoustic"].shape == (4, 400)
    assert not torch.equal(codes["vocal"], codes["semantic"])
    semantic, codec = SemanticTokenizer.from_pretrained(parts["hearing"]), open_codec(parts["codec"])
    assert shards.index.semantic_fingerprint == semantic.fingerprint
    assert shards.index.codec_fingerprint == codec.fingerprint


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_learns_more_than_how_often_codes_come(parts, stage):
    rows = [json.loads(line) for line in (parts[stage] / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["total"] < 0.7 * rows[0]["total"]
    assert {"validation/bits_per_token/alone", "validation/bits_per_token/mismatched"} <= set(rows[-1])
    shards, trained = LayeredShards(parts["tokens"]), Stage.from_pretrained(parts[stage] / "final")
    windows = StageWindows(shards, split_songs(shards.index.songs, 0.4)[0], trained, 2)
    pairs = [windows.cut(song, share) for song in windows.songs for share in (0.1, 0.5)]
    source, target = (torch.stack(each) for each in zip(*pairs, strict=True))
    found = measure_stage(trained, source, target, windows.count_codes())
    assert found["bits_per_token/heard"] < 0.9 * found["bits_per_token/unigram"]


@pytest.fixture(scope="module")
def bundle(parts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "tiny"
    names = {"--semantic": "hearing", "--codec": "codec", "--lm": "lm"}
    options = [part for option, name in names.items() for part in (option, str(parts[name]))]
    assert bundles.main([*options, "--name", "tiny", "--default", "guidance=3.0", "--out", str(out)]) == 0
    return out


def test_generate_writes_a_mix_as_long_as_the_vocal(bundle, vocal_file, tmp_path):
    options = ["--vocal", str(vocal_file), "--model", str(bundle), "--candidates", "2"]
    assert generate.main([*options, "--system", "accompgen", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    wanted = report["samples"]
    for name in ("accompaniment", "mix"):
        wave, rate_hz = soundfile.read(tmp_path / "out" / f"{name}.wav")
        assert (rate_hz, wave.shape) == (48_000, (wanted, 2)) and np.abs(wave).max() > 0.01
    assert wanted == round(soundfile.info(vocal_file).frames * 48_000 / 44_100)
    assert report["settings"]["guidance"] == 3.0 and report["ranking"]["information_bits"] is not None
    assert report["lead_sheet"] is None and report["model"]["name"] == "tiny"


def test_a_prefix_is_kept_and_continued(bundle, make_singing):
    accompanist, vocal = Accompanist.from_pretrained(bundle), torch.from_numpy(make_singing(1.22).T)
    first = accompanist.accompany(vocal, seed=3)
    again = accompanist.accompany(vocal, seed=3)
    assert first.take.codes.shape == (1 + 4, 61) and torch.equal(first.mix, again.mix)
    start = first.accompaniment[:, : 24_000 + 100]
    given = accompanist.bundle.tokens.encode(start[None, :, :24_000], "accompaniment")[0]
    made = accompanist.accompany(vocal, seed=8, prefix=start)
    assert torch.equal(made.take.codes[:, :25], given) and made.take.codes.shape == first.take.codes.shape
    assert torch.allclose(made.accompaniment[:, : start.shape[1]], start, atol=1e-6)
    assert made.report["prefix_seconds"] == 0.5 and made.accompaniment.shape == first.accompaniment.shape


def test_the_papers_protocol_is_a_command(bundle, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(accompgen_part, "GUIDANCES", (3.0,))
    out = tmp_path / "results.json"
    options = ["--corpus", str(tiny_corpus), "--bundle", str(bundle), "--out", str(out), "--items", "2"]
    assert score.main(["accompgen", *options, "--seconds", "4"]) == 0
    found = {name.removeprefix("accompgen."): value for name, value in json.loads(out.read_text()).items()}
    assert found["seconds_per_second_guidance_3"] > 0 and found["excerpts"] == 2
    assert {"kernel_distance_guidance_3", "in_key_guidance_3", "in_key_guidance_3_mismatched"} <= set(found)
    assert 0 < found["bits_per_second_heard"] < 50 * math.log2(16) + 200 * math.log2(8)
    assert score.main(["lm", *options]) == 1  # measures DuoTok's


def test_vocals_of_musdb_are_accompanied_isolated_and_separated(bundle, tiny_corpus, tmp_path):
    song = tmp_path / "test" / "song"
    song.mkdir(parents=True)
    for stem, name in {"vocal": "vocals", "drums": "drums", "bass": "bass", "other": "other"}.items():
        wave = read_audio(tiny_corpus / "audio" / "test" / "0" / f"{stem}.wav", seconds=6.4)
        write_audio(song / f"{name}.wav", wave)
    accompanist, tracks = Accompanist.from_pretrained(bundle), accompgen_part.read_musdb(tmp_path)
    found = accompgen_part.measure_musdb(accompanist, tracks, 3.2, seed=0)
    assert found["musdb_excerpts"] == 2 and found["musdb_listening_fad_isolated"] > 0
    gap = found["musdb_listening_fad_separated"] - found["musdb_listening_fad_isolated"]
    assert found["musdb_listening_fad_gap"] == pytest.approx(gap)
    with pytest.raises(DataError, match="two patches of 3 s at least"):
        accompgen_part.measure_musdb(accompanist, [], 3.2, seed=0)


def test_what_does_not_fit_is_one_line(parts, bundle, tiny_components, vocal_file, tmp_path, capsys):
    def fail(main, *arguments) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        told = capsys.readouterr().err
        assert told.startswith("error: ") and told.count("\n") == 1
        return told

    out = ["--out", tmp_path / "out"]
    asked = ["--vocal", vocal_file, *out]
    assert "one of duotok; give a model of accompgen" in fail(generate.main, *asked, "--system", "accompgen")
    other = [*asked, "--model", bundle, "--system", "duotok"]
    assert "is one of accompgen; give a model of duotok" in fail(generate.main, *other)
    own = [*asked, "--model", bundle]
    assert "knows no styles; leave out --style" in fail(generate.main, *own, "--style", "rock")
    assert "leave out --tempo" in fail(generate.main, *own, "--tempo", "100")
    assert "in one pass; leave out steps" in fail(generate.main, *own, "--steps", "3")
    assert "leave out midi" in fail(generate.main, *own, "--export", "midi")
    command = ["--semantic", parts["hearing"], "--codec", parts["codec"]]
    wrong = [*command, "--lm", tiny_components["lm"], *out]
    assert "trained on the semantic" in fail(bundles.main, *wrong)
    assert "needs tokenizer, lm, vae" in fail(bundles.main, *command[:2], "--lm", parts["lm"], *out)
    assert "is needed" in fail(bundles.main, *command, "--lm", parts["codec"], *out)
    codec = tmp_path / "codec"
    more = open_codec(parts["codec"])
    LatentCodec(replace(more.config, levels=5)).save_pretrained(codec)
    wrong = ["--semantic", parts["hearing"], "--codec", codec, "--lm", parts["lm"]]
    assert "was trained on the codec" in fail(bundles.main, *wrong, *out)
    manifest = ["--manifest", parts["manifest"]]
    wrong = ["--semantic", parts["hearing"], "--codec", codec, *manifest, "--out", parts["tokens"]]
    assert "holds tokens of the codec" in fail(layered_tokens.main, *wrong)
    wrong = ["--semantic", parts["codec"], "--codec", codec, *manifest, *out]
    assert "a 'semantic_tokenizer' is needed" in fail(layered_tokens.main, *wrong)
    tokens = f"data.tokens={parts['tokens']}"
    train = [TINY, *out, "--set", tokens]
    assert "coarse_levels must be in 1..3" in fail(train_stage.main, *train, "--set", "coarse_levels=4")
    assert "stage must be one of" in fail(train_stage.main, *train, "--set", "stage=medium")
    assert "no song in" in fail(train_stage.main, *train, "--set", "data.windows.semantic=90.0")
    assert "run python -m" in fail(train_stage.main, *train[:-1], f"data.tokens={tmp_path}")
    assert "one stage each" in fail(join_stages.main, *[parts["semantic"] / "final"] * 3, *out)
    hubert = ["--hubert", tmp_path / "none", *manifest, *out]
    assert "no HubertModel can be read" in fail(fit_semantic.main, *hubert)
    few = ["--encoder", tiny_components["tokenizer"], "--clusters", "4096", "--frames", "1000"]
    assert "too few for 4096 clusters" in fail(fit_semantic.main, *few, *manifest, *out)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
