import pytest

from duotok.lm.dual_track.sampling import SamplingConfig
from duotok.recipes.accompany.request import GenerationSettings, parse_defaults, resolve_settings
from duotok.tokenizer.common.errors import ConfigError


def test_defaults_are_those_of_the_sampler():
    sampler, settings = SamplingConfig(), GenerationSettings()
    for name in ("guidance", "temperature", "top_k", "top_p"):
        assert getattr(settings, name) == getattr(sampler, name)


def test_chosen_over_bundle_over_general():
    settings = resolve_settings({"guidance": 3.0, "steps": 4}, {"steps": 6, "guidance": None, "top_k": None})
    assert (settings.guidance, settings.steps, settings.top_k) == (3.0, 6, GenerationSettings().top_k)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"guidance": float("inf")},
        {"unknown": 1},
    ],
)
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        resolve_settings({}, bad)


def test_bundle_defaults_on_the_command_line():
    assert parse_defaults(["guidance=2", "top_k=30"]) == {"guidance": 2.0, "top_k": 30}
    for bad in ("guidance", "nothing=1", "top_k=many", "steps=0"):
        with pytest.raises(ConfigError):
            parse_defaults([bad])
