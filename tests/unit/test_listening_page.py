"""The page of a listening test: complete, blind, loudness-normalized, repeatable; and bad input."""

import base64
import io
import json
import re

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.listening import listen
from duotok.recipes.listening import page as page_module
from duotok.recipes.listening.page import SCALE, PageSettings, read_key, write_page
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.loudness import measure_loudness


def read_sounds(text: str) -> dict[str, tuple[np.ndarray, int]]:
    """{stimulus: (samples [samples, channels], rate)} of a page."""
    found = re.findall(r'<script type="text/plain" id="(S\d+)">([^<]*)</script>', text)
    return {name: soundfile.read(io.BytesIO(base64.b64decode(data))) for name, data in found}


@pytest.fixture(scope="module")
def made(listening_sounds, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "test.html"
    key = write_page(listening_sounds, out, PageSettings(title="A test", seed=1))
    return out, key


def test_the_page_has_every_sound_at_one_loudness(made):
    out, key = made
    sounds = read_sounds(out.read_text(encoding="utf-8"))
    assert sorted(sounds) == sorted(key.stimuli) and len(sounds) == 4
    assert sorted(key.stimuli.values()) == [(s, c) for s in ("original", "tokens") for c in ("one", "two")]
    for name, (samples, rate) in sounds.items():
        assert rate == 48_000 and samples.shape == (24_000 if key.stimuli[name][1] == "one" else 38_400, 2)
        assert measure_loudness(torch.from_numpy(samples.T)) == pytest.approx(-23, abs=0.1)
        assert abs(samples[0]).max() == abs(samples[-1]).max() == 0  # faded at both ends


def test_the_page_is_blind_and_needs_nothing_from_outside(made):
    text = made[0].read_text(encoding="utf-8")
    for word in ("original", "tokens", "one.wav"):
        assert word not in re.sub(r">[A-Za-z0-9+/=]{100,}<", "", text)
    assert "http" not in re.sub("http-equiv", "", text)
    assert "default-src 'none'" in text
    assert all(meaning in text for _, _, meaning in SCALE)


def test_the_seed_decides_the_order_and_the_page_s_name(made, listening_sounds, tmp_path):
    out, key = made
    again = write_page(listening_sounds, tmp_path / "b.html", PageSettings(title="A test", seed=1))
    assert again == key and (tmp_path / "b.html").read_bytes() == out.read_bytes()
    other = write_page(listening_sounds, tmp_path / "c.html", PageSettings(seed=2, seconds=0.6))
    assert other.page != key.page and other.stimuli != key.stimuli
    lengths = {len(samples) for samples, _ in read_sounds((tmp_path / "c.html").read_text()).values()}
    assert lengths == {24_000, 28_800}  # cut to the seconds asked for


def test_loudness_gives_way_to_peaks(listening_sounds, tmp_path):
    sounds = tmp_path / "sounds"
    for system in ("a", "b"):
        (sounds / system).mkdir(parents=True)
        wave = np.zeros(48_000)
        wave[::4800] = 1.0 if system == "a" else 0.1  # clicks: all peak, hardly any loudness
        soundfile.write(sounds / system / "x.wav", wave, 48_000)
    key = write_page(sounds, tmp_path / "p.html", PageSettings())
    assert key.loudness_lufs < -24
    for samples, _ in read_sounds((tmp_path / "p.html").read_text()).values():
        assert 0.9 < abs(samples).max() <= 0.981
        assert measure_loudness(torch.from_numpy(samples.T)) == pytest.approx(key.loudness_lufs, abs=0.2)


TONE = 0.1 * np.sin(np.arange(48_000) / 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "0 system folders"),
        ({"a": {"x.wav": TONE}}, "1 system folders"),
        ({"a": {"x.wav": TONE}, "b": {"x.txt": b"no"}}, "b has no clips"),
        ({"a": {"x.wav": TONE}, "b": {"x.wav": TONE, "y.wav": TONE}}, "a has no clip y"),
        ({"a": {"x.wav": TONE, "x.flac": TONE}, "b": {"x.wav": TONE}}, "two clips of the name x"),
        ({"a": {"x.wav": TONE}, "b": {"x.wav": b"RIFF nonsense"}}, "b/x.wav is not readable as audio"),
        ({"a": {"x.wav": TONE}, "b": {"x.wav": None}}, "is a folder"),
        ({"a": {"x.wav": TONE}, "b": {"x.wav": 0 * TONE}}, "b/x.wav is silent"),
        ({"a": {"x.wav": TONE}, "b": {"x.wav": TONE[:9600]}}, "b/x.wav has 0.20 s"),
    ],
)
def test_bad_sounds_are_one_line(tmp_path, capsys, spec, message):
    (tmp_path / "sounds").mkdir()
    for system, clips in spec.items():
        (tmp_path / "sounds" / system).mkdir()
        for name, wave in clips.items():
            path = tmp_path / "sounds" / system / name
            if wave is None:
                path.mkdir()
            elif isinstance(wave, bytes):
                path.write_bytes(wave)
            else:
                soundfile.write(path, wave, 48_000)
    assert listen.main(["page", "--sounds", str(tmp_path / "sounds"), "--out", str(tmp_path / "p.html")]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["sounds"]


def test_bad_settings_are_told(listening_sounds, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="--seconds"):
        PageSettings(seconds=0.1)
    with pytest.raises(ConfigError, match="--seed"):
        PageSettings(seed=-1)
    monkeypatch.setattr(page_module, "LARGEST_BYTES", 100_000)
    with pytest.raises(ConfigError, match="smaller --seconds"):
        write_page(listening_sounds, tmp_path / "p.html", PageSettings())
    with pytest.raises(DataError, match="is no folder"):
        write_page(tmp_path / "nowhere", tmp_path / "p.html", PageSettings())


def test_a_file_that_is_no_key_is_told(tmp_path):
    no_pairs = {"format": 1, "page": "x", "loudness_lufs": -23, "stimuli": {"S1": 3}}
    for values in ({}, [], no_pairs, {**no_pairs, "format": 2}):
        (tmp_path / "key.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match="not the key of a listening page|has format 2"):
            read_key(tmp_path / "key.json")


def test_sounds_of_a_corpus_make_a_page(tiny_corpus, tiny_bundle, tmp_path, capsys):
    options = ["sounds", "--corpus", str(tiny_corpus), "--bundle", str(tiny_bundle), "--items", "2"]
    sounds = tmp_path / "sounds"
    assert listen.main([*options, "--seconds", "4", "--out", str(sounds)]) == 0
    assert capsys.readouterr().out.endswith("original, vae, round_trip, generated\n")
    assert listen.main(["page", "--sounds", str(sounds), "--out", str(tmp_path / "p.html")]) == 0
    assert "8 clips of 4 systems" in capsys.readouterr().out
    assert read_key(tmp_path / "p.key.json").systems == ["generated", "original", "round_trip", "vae"]
    assert listen.main([*options, "--track", "vocal", "--out", str(tmp_path / "vocals")]) == 1
    assert "has no decoder of the vocal; it has one of the accompaniment" in capsys.readouterr().err
