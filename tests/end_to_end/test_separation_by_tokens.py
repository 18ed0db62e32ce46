"""Separation by tokens at size tiny: training, the commands that use it, figures, what does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.accompany import generate, separate
from duotok.recipes.evaluation import score
from duotok.recipes.lm.separator import train_token_separator
from duotok.recipes.separation.adapters import open_separator
from duotok.recipes.separation.tokens_adapter import TokensSeparator
from duotok.recipes.training.log import read_log
from duotok.tokenizer.common.audio import read_audio, write_audio

TINY = Path(__file__).parents[2] / "recipes/lm/separator/tiny.yaml"
STEMS = ("vocal", "drums", "bass", "other")


def train(out: Path, corpus: Path, codec: Path, *settings: str) -> int:
    settings = (f"data.manifest={corpus / 'train.jsonl'}", f"codec={codec}", *settings)
    options = [part for each in settings for part in ("--set", each)]
    return train_token_separator.main([str(TINY), "--out", str(out), *options])


@pytest.fixture(scope="module")
def trained(tiny_corpus, tiny_codec, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("token_separator")
    validation = f"validation={tiny_corpus / 'test.jsonl'}"
    assert train(out, tiny_corpus, tiny_codec, validation, "data.seconds=1.2", "train.validate_every=20") == 0
    return out


@pytest.fixture(scope="module")
def song(tiny_corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("song") / "mix.wav"
    wave = read_audio(tiny_corpus / "audio" / "test" / "0" / "mix.wav", seconds=2.3)
    soundfile.write(path, wave.T.numpy(), 48_000)
    return path


def test_the_loss_falls_and_other_songs_are_judged(trained):
    rows = read_log(trained)
    assert sum(row["total"] for row in rows[-4:]) < 0.85 * sum(row["total"] for row in rows[:4])
    cases = {
        f"validation/bits_{what}/{case}"
        for what in ("per_code", "of_first_level")
        for case in ("heard", "mismatched")
    }
    assert cases <= set(rows[-1]) and {"level0", "end", *STEMS} <= set(rows[-1])
    assert 0 < rows[-1]["validation/bits_per_code/heard"] < 3.2


def test_stems_sum_to_the_song(trained, song, tmp_path):
    command = ["--mix", str(song), "--checkpoint", str(trained / "final"), "--device", "cpu"]
    for name in ("tokens", "tokens-written"):
        assert separate.main([*command, "--separator", name, "--out", str(tmp_path / name)]) == 0
        stems = [soundfile.read(tmp_path / name / f"{stem}.wav")[0] for stem in STEMS]
        np.testing.assert_allclose(sum(stems), read_audio(song).T.numpy(), atol=1e-5)
        assert all(np.abs(stem).max() > 1e-4 for stem in stems)
        assert json.loads((tmp_path / name / "report.json").read_text())["separator"] == name
    written, masked = (
        soundfile.read(tmp_path / name / "vocal.wav")[0] for name in ("tokens-written", "tokens")
    )
    assert np.abs(written - masked).max() > 1e-3


def test_what_is_masked_is_the_share_that_was_written(trained):
    """Were the written tracks the true ones, and apart in frequency, the stems would be the true ones."""
    separator = open_separator("tokens", str(trained / "final"))
    assert isinstance(separator, TokensSeparator)
    times = torch.arange(48_000) / 48_000
    truth = torch.stack([(2 * torch.pi * 200 * (k + 1) * times).sin() * 0.1 for k in range(4)])
    mix = truth.sum(dim=0).expand(2, -1) * torch.tensor([[1.0], [0.5]])  # with a place in the room
    stems = separator._mask(torch.cat([mix, truth]))
    wanted = truth[:, None] * torch.tensor([[1.0], [0.5]])
    assert (stems - wanted)[..., 2400:-2400].abs().max() < 2e-3


@pytest.fixture(scope="module")
def two_tracks(tiny_corpus, tiny_codec, tmp_path_factory) -> Path:
    """A separator of two tracks and of half of the codec's levels."""
    out = tmp_path_factory.mktemp("two_tracks")
    settings = ("model.tracks=[vocal, accompaniment]", "levels=2", "train.steps=1")
    assert train(out, tiny_corpus, tiny_codec, *settings) == 0
    return out / "final"


def test_two_tracks_and_a_codec_of_fewer_levels(two_tracks, song):
    wave = read_audio(song)
    stems = open_separator("tokens", str(two_tracks)).separate(wave)
    assert not stems["drums"].any() and stems["vocal"].abs().max() > 1e-4
    torch.testing.assert_close(stems["vocal"] + stems["other"], wave, atol=1e-6, rtol=0)


def test_generate_hears_the_vocal_that_it_separates(trained, song, tiny_bundle, tmp_path, capsys):
    command = [
        "--mix",
        str(song),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tiny_bundle),
        "--steps",
        "1",
    ]
    command += ["--device", "cpu", "--separator", "tokens"]
    assert generate.main([*command, "--separator-checkpoint", str(trained / "final")]) == 0
    assert "separated from mix.wav by tokens" in capsys.readouterr().err
    vocal = soundfile.read(tmp_path / "out" / "separated-vocal.wav")[0]
    assert vocal.shape == (110_400, 2) and np.abs(vocal).max() > 1e-4
    assert generate.main([*command, "--out", str(tmp_path / "none")]) == 1
    assert "--separator-checkpoint" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_systems_are_compared_on_test_mixes_and_on_a_real_song(
    two_tracks, tiny_corpus, tiny_bundle, tmp_path
):
    (tmp_path / "real").mkdir()
    for stem in STEMS:
        wave = read_audio(
            tiny_corpus / "audio" / "test" / "1" / f"{stem}.wav", start_seconds=1.0, seconds=1.3
        )
        write_audio(tmp_path / "real" / f"{stem}.wav", wave)
    out = tmp_path / "results.json"
    options = ["--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle), "--out", str(out), "--items", "2"]
    options += ["--seconds", "4", "--real-stems", str(tmp_path / "real")]
    assert score.main(["separation", *options, "--separator", f"tokens={two_tracks}"]) == 0
    found = {name.removeprefix("separation."): value for name, value in json.loads(out.read_text()).items()}
    for system in ("mixture", "tokens", "tokens_written"):
        for part in ("vocal", "accompaniment"):
            for prefix in ("", "real_"):
                name = f"{prefix}{system}_{part}"
                assert found[f"{name}_mel_distance"] > 0 and found[f"{name}_chroma_correlation_of_codec"] <= 1
                assert (f"{name}_si_sdr_db" in found) == (system != "tokens_written")
    assert found["mixture_vocal_si_sdr_db"] == pytest.approx(found["mix_vocal_si_sdr_db"])
    assert "mixture_drums_mel_distance" in found and "tokens_drums_mel_distance" not in found
    for place in ("joint", "anywhere"):
        assert found[f"tokens_{place}_flux_ratio"] > 0 and found[f"tokens_{place}_level_jump_db"] >= 0
    table = (tmp_path / "separation" / "separation.md").read_text()
    assert (
        table.count("| vocal: tokens_written |") == 2
        and "test mixes of 4 s" in table
        and "ViSQOL" not in table
    )


def test_what_does_not_fit_is_one_line(
    trained, song, tiny_corpus, tiny_codec, tiny_components, tmp_path, capsys
):
    def told(code: int) -> str:
        assert code == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1
        return message

    def run(mix: Path, checkpoint: Path) -> str:
        options = ["--mix", str(mix), "--out", str(tmp_path / "out"), "--checkpoint", str(checkpoint)]
        return told(separate.main([*options, "--separator", "tokens"]))

    short = tmp_path / "short.wav"
    soundfile.write(short, 0.1 * np.random.default_rng(0).standard_normal((55_200, 2)), 48_000)
    assert "lasts 1.15 s, this separator hears 1.2 s at once" in run(short, trained / "final")
    assert "a 'token_separator' is needed" in run(song, tiny_components["tokenizer"])
    other = tmp_path / "other"
    shutil.copytree(trained / "final", other)
    shutil.rmtree(other / "codec")
    assert "has no codec" in run(song, other)
    shutil.copytree(tiny_components["vae"], other / "codec")
    assert "is needed" in run(song, other)
    capsys.readouterr()
    for setting, reason in (
        ("levels=9", "levels must be in 1..4"),
        ("data.seconds=90.0", "90"),
        (f"codec={tiny_components['vae']}", "is needed"),
        (f"semantic={tiny_codec}", "is needed"),
        ("level_weights=[]", "level_weights must be above 0"),
        ("augmentation.gain=[0.0, 1.0]", "gain must be a range above 0"),
    ):
        assert reason in told(train(tmp_path / "none", tiny_corpus, tiny_codec, setting))
    assert not (tmp_path / "out").exists()
