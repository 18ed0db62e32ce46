import pytest
import soundfile
import torch

from duotok.lm.contract import SamplingConfig
from duotok.recipes.accompany.request import GenerationSettings, Request, parse_defaults, resolve_settings
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError


def test_defaults_are_those_of_the_sampler():
    sampler, settings = SamplingConfig(), GenerationSettings()
    for name in ("guidance", "temperature", "top_k", "top_p"):
        assert getattr(settings, name) == getattr(sampler, name)


def test_chosen_over_bundle_over_general():
    defaults = {"steps": 6, "guidance": 2.0, "candidates": 8}
    settings = Request(vocal="a.wav", guidance=3, top_k=None).settings(defaults)
    assert (settings.guidance, settings.steps, settings.candidates) == (3.0, 6, 8)
    assert settings.top_k == GenerationSettings().top_k


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "steps": (0, 1001, 2.5, True),
        "temperature": (-1.0, float("nan"), "hot"),
        "guidance": (float("inf"), -0.1),
        "render_guidance": (float("nan"),),
        "top_p": (0.0, 1.5),
        "top_k": (-1,),
        "candidates": (0, 100),
        "accompaniment_db": (31.0, float("nan")),
        "seed": (-1, 2**63, 1.5),
        "variations": (0, 100),
        "keep": (0, 2, 1.0),
        "tempo": (0.0, 54.0, 300.0, float("nan")),
        "separator": ("magic",),
        "intro": (-1, 17, 1.5),
        "without": (("flute",), ("drums", "bass", "chords")),
        "meter": ("5/4", 3),
        "format": ("aiff", 16),
        "tuning": (101, -100.5, "flat", float("nan")),
    }.items(),
)
def test_a_request_refuses_what_cannot_be_and_names_it(name, values):
    for value in values:
        with pytest.raises(ConfigError, match=name) as caught:
            Request(vocal="a.wav", **{"tempo_bpm" if name == "tempo" else name: value})
        assert "\n" not in str(caught.value)


def test_a_request_has_one_singer():
    for given in ({}, {"vocal": "a.wav", "mix": "b.wav"}):
        with pytest.raises(ConfigError, match="either a vocal or a mix"):
            Request(**given)
    with pytest.raises(ConfigError, match="vocal must name one take"):
        Request(vocal=[])
    assert Request(vocal=["a.wav", "b.wav"], prefix="c.wav").files == ["a.wav", "b.wav", "c.wav"]


def test_files_are_read_once_and_waves_stay(tmp_path, make_singing):
    wave = torch.from_numpy(make_singing(2.0).T)
    soundfile.write(tmp_path / "song.wav", wave.numpy().T, 48_000, subtype="FLOAT")
    (tmp_path / "song.lab").write_text("0 1 C:maj\n", encoding="utf-8")
    given = Request(
        mix=tmp_path / "song.wav", chords=str(tmp_path / "song.lab"), prefix=wave[:, :9600], seed=4
    )
    assert given.files == [given.mix, given.chords]
    for request in (given.read(), given.read().read()):
        assert request.files == []
        assert torch.equal(request.mix.wave, wave.expand(2, -1)) and request.mix.name == "song.wav"
        assert request.prefix.shape == (2, 9600) and request.seed == 4
        assert request.chords == [(0.0, 1.0, "C:maj")] and request.wishes().chart == request.chords


def test_files_that_cannot_be_used(tmp_path, make_singing):
    wave = torch.from_numpy(make_singing(2.0).T)
    for error, message, fields in (
        (AudioError, "none.wav", {"vocal": tmp_path / "none.wav"}),
        (AudioError, "shorter than the song", {"vocal": wave, "prefix": wave}),
        (AudioError, "NaN", {"vocal": wave, "prefix": wave[:, :9600] * torch.nan}),
        (DataError, "none.lab", {"vocal": wave, "chords": tmp_path / "none.lab"}),
    ):
        with pytest.raises(error, match=message):
            Request(**fields).read()


def test_bundle_defaults():
    assert parse_defaults(["guidance=2", "top_k=30"]) == {"guidance": 2.0, "top_k": 30}
    for bad in ("guidance", "nothing=1", "top_k=many", "steps=0"):
        with pytest.raises(ConfigError):
            parse_defaults([bad])
    with pytest.raises(ConfigError, match="unknown"):
        resolve_settings({"unknown": 1}, {})
