"""The mix that is heard while it is composed."""

import os

import pytest
import soundfile
import torch

from duotok.recipes.accompany.generate import main
from duotok.recipes.accompany.output import OutputError
from duotok.recipes.accompany.stream import WavStream
from duotok.tokenizer.common.errors import ConfigError


def read(path) -> torch.Tensor:
    assert soundfile.info(path).subtype == "PCM_16"
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0].T)


@pytest.mark.parametrize(
    "fields", [{}, {"tuning": -30}, {"accompaniment_db": 9.0, "candidates": 3}, "prefix"]
)
def test_what_is_one_stretch_sounds_as_the_result_does(fields, accompanist, vocal, tmp_path):
    options = {"steps": 1, "seed": 3, **({} if fields == "prefix" else fields)}
    if fields == "prefix":
        options["prefix"] = accompanist.accompany(vocal, seed=4, steps=1).accompaniment[:, :20_000]
    with WavStream(str(tmp_path / "s.wav")) as stream:
        sketches = accompanist.compose(vocal, stream=stream, **options)
    best = next(each for each in sketches.ranked if each.seed == stream.seed)
    assert torch.allclose(read(tmp_path / "s.wav"), accompanist.perform(sketches, best).mix, atol=1e-4)
    assert stream.tell(stream.seed) == [] and f"seed {stream.seed}" in stream.tell(99)[0]


@pytest.mark.parametrize("fields", [{}, {"tuning": 40}])
def test_stretches_join_to_the_whole_length(fields, accompanist, make_singing, tmp_path):
    vocal = torch.from_numpy(make_singing(12.3).T)
    begun: list[int] = []
    with WavStream(str(tmp_path / "s.wav")) as stream:
        add = stream.add
        stream.add = lambda wave: (begun.append(wave.shape[-1]), add(wave))[1]
        result = accompanist.perform(
            sketches := accompanist.compose(vocal, stream=stream, seed=3, steps=1, **fields),
            sketches.ranked[0],
        )
    heard = read(tmp_path / "s.wav")
    assert heard.shape == result.mix.shape and len(begun) >= 3 and begun[0] < 3.5 * 48_000
    assert float(heard.abs().max()) < 1
    places = torch.tensor(begun).cumsum(0)[:-1]
    steps = torch.stack([heard[:, place - 480 : place + 480].diff().abs().max() for place in places])
    assert float(steps.max()) <= float(heard.diff().abs().max())
    loud = [part.square().mean().sqrt() for part in (heard.split(48_000, dim=1)[:-1])]
    assert min(loud) > 0.2 * max(loud)


def test_who_listens_late_hears_all_of_it(accompanist, make_singing, tmp_path):
    vocal, asked = torch.from_numpy(make_singing(16.0).T), iter([False] * 15)
    with WavStream(str(tmp_path / "s.wav"), is_heard=lambda: next(asked, True)) as stream:
        sketches = accompanist.compose(vocal, stream=stream, seed=3, steps=1)
    heard = read(tmp_path / "s.wav")
    assert heard.shape[-1] == vocal.shape[-1] and next(asked, None) is None and sketches.ranked
    band = heard - vocal
    assert min(part.square().mean() for part in band.split(48_000, dim=1)) > 0


def test_the_result_is_the_same_with_and_without(tiny_bundle, vocal_file, tmp_path, capsys):
    options = ["--vocal", str(vocal_file), "--model", str(tiny_bundle), "--steps", "1", "--candidates", "2"]
    assert main([*options, "--out", str(tmp_path / "plain")]) == 0
    assert main([*options, "--out", str(tmp_path / "live"), "--stream", str(tmp_path / "s.wav")]) == 0
    for name in ("accompaniment.wav", "mix.wav"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "live" / name).read_bytes()
    kept = (tmp_path / "s.wav").read_bytes()
    capsys.readouterr()
    assert main([*options, "--out", str(tmp_path / "more"), "--stream", str(tmp_path / "s.wav")]) == 1
    assert "s.wav is there already" in capsys.readouterr().err
    assert (tmp_path / "s.wav").read_bytes() == kept and not (tmp_path / "more").exists()


def test_a_listener_that_leaves_ends_only_the_stream(accompanist, vocal):
    reader, writer = os.pipe()
    with WavStream(f"/dev/fd/{writer}") as stream:
        os.close(writer)
        os.close(reader)
        made = accompanist.accompany(vocal, seed=3, steps=1)
        sketches = accompanist.compose(vocal, stream=stream, seed=3, steps=1)
    assert "ended after 0.0 s: Broken pipe" in stream.tell(3)[0]
    assert torch.equal(sketches.ranked[0].codes, made.codes)


def test_a_stream_that_cannot_be(accompanist, vocal, tmp_path):
    with pytest.raises(OutputError, match="cannot stream to .*: No such file"):
        WavStream(str(tmp_path / "no" / "s.wav"))
    with (
        pytest.raises(ConfigError, match="tempo must be"),
        WavStream(str(tmp_path / "s.wav")) as stream,
    ):
        accompanist.compose(vocal, stream=stream, tempo_bpm=1)
    assert list(tmp_path.iterdir()) == []
