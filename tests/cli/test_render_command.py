"""`accompany.render`: a round trip through the tokens of either track, and bad input."""

from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from duotok.recipes.accompany import render
from duotok.recipes.accompany.bundle import assemble_bundle, load_bundle, main
from duotok.recipes.accompany.render import read_codes
from duotok.renderer.diffusion import DiffusionDecoder
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import DuoTokenizer

FAST = ("--steps", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def vocal_decoder(tiny_components, tmp_path_factory) -> Path:
    """The tiny decoder under other weights, as one of the vocal."""
    decoder = DiffusionDecoder.from_pretrained(tiny_components["accompaniment"])
    with torch.no_grad():
        decoder.latents_out.weight.mul_(-1)
    decoder.track = "vocal"
    folder = tmp_path_factory.mktemp("decoders") / "vocal"
    decoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_bundle(tiny_components, vocal_decoder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("model") / "both"
    parts = [
        text
        for name, folder in tiny_components.items()
        for text in (f"--{name.replace('_', '-')}", str(folder))
    ]
    assert main([*parts, "--vocal-decoder", str(vocal_decoder), "--out", str(out), "--half"]) == 0
    return out


def test_a_bundle_holds_a_decoder_of_each_track(whole_bundle):
    decoders = load_bundle(whole_bundle).renderer.decoders
    assert set(decoders) == {"vocal", "accompaniment"}
    assert decoders["vocal"].track == "vocal"
    vocal, other = (decoders[track].latents_out.weight for track in ("vocal", "accompaniment"))
    assert torch.equal(vocal, -other)


@pytest.mark.parametrize("track", ["vocal", "accompaniment"])
def test_round_trip_is_as_long_and_as_loud_as_the_recording(track, vocal_file, whole_bundle, tmp_path):
    command = ["--audio", str(vocal_file), "--track", track, "--model", str(whole_bundle), *FAST]
    assert render.main([*command, "--out", str(tmp_path / "first")]) == 0
    wave, rate = soundfile.read(tmp_path / "first/rendered.wav", always_2d=True)
    original, original_rate = soundfile.read(vocal_file)
    assert rate == 48_000 and wave.shape == (round(len(original) * 48_000 / original_rate), 2)
    level = (wave**2).mean() / (original**2).mean()
    assert abs(wave).max() > 0.99 or 0.9 < level < 1.1
    # The stored codes give the same sound, but for its loudness.
    again = ["--codes", str(tmp_path / "first/codes.safetensors"), "--model", str(whole_bundle), *FAST]
    assert render.main([*again, "--out", str(tmp_path / "again")]) == 0
    second = soundfile.read(tmp_path / "again/rendered.wav", always_2d=True)[0]
    scale = (second * wave).sum() / (second**2).sum()
    assert abs(scale * second - wave).max() < 0.01
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "rendered.wav",
        "codes.safetensors",
        "report.json",
    }


def test_both_tracks_have_their_own_weights(vocal_file, whole_bundle, tmp_path):
    sounds = []
    for track in ("vocal", "accompaniment"):
        command = ["--audio", str(vocal_file), "--track", track, "--model", str(whole_bundle), *FAST]
        assert render.main([*command, "--out", str(tmp_path / track)]) == 0
        sounds.append(soundfile.read(tmp_path / track / "rendered.wav")[0])
    assert abs(sounds[0] - sounds[1]).max() > 0.01


def run_badly(arguments, capsys, out: Path) -> str:
    assert render.main([*arguments, "--out", str(out), "--device", "cpu"]) == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("error: ") and "\n" not in message and not out.exists()
    return message


def test_a_model_without_vocal_decoder_is_told(vocal_file, tiny_bundle, tmp_path, capsys):
    command = ["--audio", str(vocal_file), "--track", "vocal", "--model", str(tiny_bundle)]
    assert "has no vocal decoder" in run_badly(command, capsys, tmp_path / "out")


def test_no_steps_are_refused(vocal_file, tiny_bundle, tmp_path, capsys):
    command = ["--audio", str(vocal_file), "--model", str(tiny_bundle), "--steps", "0"]
    assert "steps must be from 1" in run_badly(command, capsys, tmp_path / "out")


@pytest.fixture(scope="module")
def codes_file(vocal_file, tiny_bundle, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "out"
    assert (
        render.main(["--audio", str(vocal_file), "--model", str(tiny_bundle), *FAST, "--out", str(out)]) == 0
    )
    return out / "codes.safetensors"


@pytest.mark.parametrize(
    ("header", "codes", "told"),
    [
        ({"frame_rate_hz": "50"}, None, "frame rate hz 50"),
        ({"tokenizer_fingerprint": "0000"}, None, "tokenizer fingerprint 0000"),
        ({"kind": "other"}, None, "kind other"),
        ({"track": "drums"}, None, "track must be one of"),
        ({"samples": "99999999"}, None, "99999999 samples"),
        ({}, torch.full((63,), 64, dtype=torch.int32), "codes from 64 to 64"),
        ({}, torch.zeros(0, dtype=torch.int32), "at least one code"),
        ({}, torch.zeros(2, 63, dtype=torch.int32), r"(2, 63)"),
        ({}, torch.zeros(63), "float32"),
    ],
)
def test_foreign_codes_are_one_line(header, codes, told, codes_file, tiny_bundle, tmp_path, capsys):
    stored = read_codes(codes_file, DuoTokenizer.from_pretrained(tiny_bundle / "tokenizer"))
    assert len(stored.codes) == 63
    path = tmp_path / "codes.safetensors"
    whole = {
        "kind": "duotok-codes",
        "track": "accompaniment",
        "samples": str(stored.samples),
        "frame_rate_hz": "25",
        "tokenizer_fingerprint": load_bundle(tiny_bundle).tokenizer.fingerprint or "",
    }
    tensor = load_file(codes_file)["codes"] if codes is None else codes
    save_file({"codes": tensor}, path, metadata={**whole, **header})
    command = ["--codes", str(path), "--model", str(tiny_bundle)]
    assert told in run_badly(command, capsys, tmp_path / "out")


@pytest.mark.parametrize("content", [None, b"", b"not codes at all"])
def test_no_codes_are_one_line(content, tiny_bundle, tmp_path, capsys):
    path = tmp_path / "codes.safetensors"
    if content is not None:
        path.write_bytes(content)
    told = run_badly(["--codes", str(path), "--model", str(tiny_bundle)], capsys, tmp_path / "out")
    assert "does not exist" in told or "is no codes file" in told


def test_a_decoder_of_the_other_track_makes_no_bundle(tiny_components, vocal_decoder, tmp_path):
    with pytest.raises(CheckpointError, match="trained on the vocal"):
        assemble_bundle(tmp_path / "out", **{**tiny_components, "accompaniment": vocal_decoder})
    assert not (tmp_path / "out").exists()
