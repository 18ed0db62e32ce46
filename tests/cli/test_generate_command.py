import json
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import soundfile

from duotok.recipes.accompany.bundle import default_bundle
from duotok.recipes.accompany.generate import main
from duotok.recipes.accompany.request import GenerationSettings
from duotok.recipes.evaluation.fuzz import make_recording

WAVES = ["accompaniment.wav", "mix.wav"]
OURS = ["accompaniment.wav", "codes.safetensors", "mix.wav", "report.json"]
GROUPS = {
    "the recording": "--vocal --mix --tuning",
    "the band": "--style --without --intro --level",
    "the song's plan": "--tempo --meter --downbeat --key --chords",
    "a stretch anew": "--repaint --from",
    "results": "--out --format --variations --stems --export --stream",
    "sampling": "--seed --cfg --style-cfg --temperature --top-k --top-p --candidates --steps",
    "machine": "--model --device --progress",
}
SETTINGS_SHOWN = {
    "--cfg": "guidance",
    "--style-cfg": "playing_guidance",
    "--temperature": "temperature",
    "--top-k": "top_k",
    "--top-p": "top_p",
    "--candidates": "candidates",
    "--steps": "steps",
    "--level": "accompaniment_db",
}


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "duotok.recipes.accompany.generate", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, **options)


@pytest.fixture
def base(tiny_bundle) -> list[str]:
    return ["--model", str(tiny_bundle), "--steps", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--help"], 0, "--vocal"),
        (["--version"], 0, "duotok "),
        ([], 2, "--vocal --mix is required"),
        (["--vocal", "none.wav", "--steps", "0"], 1, "error: steps must be"),
    ],
)
def test_help_and_bad_options_are_instant(arguments, code, told):
    script = "import sys; from duotok.recipes.accompany.generate import main\n"
    script += f"try: sys.exit(main({arguments}))\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    assert told in " ".join((done.stdout + done.stderr).split())
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())


def test_help_is_grouped_by_task_and_shows_what_the_shipped_model_does_by_default(capsys):
    own = json.loads((default_bundle() / "bundle.json").read_text())["defaults"]
    settings = GenerationSettings(**own)
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    groups = re.split(r"^(\S[^\n]*):$", printed, flags=re.MULTILINE)
    options = {
        name: set(re.findall(r"^  (--[a-z-]+)", text, re.MULTILINE))
        for name, text in zip(groups[1::2], groups[2::2], strict=True)
    }
    assert list(options) == ["options", *GROUPS]
    for name, few in GROUPS.items():
        assert set(few.split()) <= options[name], name
    printed = " ".join(printed.split())
    for option, name in SETTINGS_SHOWN.items():
        shown = printed.split(f" {option} ")[-1].split("(default: ", 1)[1].split(")", 1)[0]
        assert shown == f"{getattr(settings, name):g}", name


def test_the_command_from_a_shell(base, vocal_file, tmp_path):
    done = run("--vocal", vocal_file, *base, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("song-accompaniment: 2.5 s")
    out = tmp_path / "song-accompaniment"
    assert sorted(path.name for path in out.iterdir()) == OURS
    given = soundfile.info(vocal_file)
    for name in WAVES:
        wave, rate = soundfile.read(out / name, always_2d=True)
        assert (rate, wave.shape) == (48_000, (round(given.frames * 48_000 / 44_100), 2))
        assert 0 < np.abs(wave).max() < 1
    report = json.loads((out / "report.json").read_text())
    assert report["seed"] == 0
    assert report["vocal"] == "song.wav"


def test_same_seed_same_bytes(base, vocal_file, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert (
            main(["--vocal", str(vocal_file), "--out", str(tmp_path / name), "--seed", str(seed), *base]) == 0
        )
    files = {name: [(tmp_path / name / file).read_bytes() for file in WAVES] for name in "abc"}
    assert files["a"] == files["b"]
    assert files["a"][0] != files["c"][0]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in "ab"]
    for report in reports:
        report.pop("computing_seconds")
    assert reports[0] == reports[1]


def test_variations_are_ranked(base, vocal_file, tmp_path):
    out = tmp_path / "out"
    assert (
        main(["--vocal", str(vocal_file), "--out", str(out), "--seed", "2", "--variations", "3", *base]) == 0
    )
    kinds = ("accompaniment.wav", "codes.safetensors", "mix.wav")
    numbered = [kind.replace(".", f"-{rank}.") for kind in kinds for rank in (1, 2, 3)]
    assert sorted(path.name for path in out.iterdir()) == sorted([*OURS, *numbered])
    assert (out / "accompaniment.wav").read_bytes() == (out / "accompaniment-1.wav").read_bytes()
    report = json.loads((out / "report.json").read_text())
    scores = [entry["ranking"]["score"] for entry in report["variations"]]
    assert scores == sorted(scores, reverse=True)
    assert [entry["rank"] for entry in report["variations"]] == [1, 2, 3]
    assert report["ranking"]["score"] == scores[0]
    assert "score" in report["coherence"] and report["not_rendered"] == []
    assert sorted(entry["seed"] for entry in report["variations"]) == [2, 3, 4]
    # Each can be made again by its seed and style, and then the folder holds that one only.
    last = report["variations"][-1]
    expected = (out / last["accompaniment"]).read_bytes()
    same = ["--seed", str(last["seed"]), "--style", last["band"]["style"]]
    assert main(["--vocal", str(vocal_file), "--out", str(out), *same, *base]) == 0
    assert sorted(path.name for path in out.iterdir()) == OURS
    assert (out / "accompaniment.wav").read_bytes() == expected


def test_only_the_best_are_kept(base, vocal_file, tmp_path):
    options = ["--vocal", str(vocal_file), "--variations", "3", *base]
    reports = {}
    for keep in ("3", "2", "1"):
        out = tmp_path / keep
        assert main([*options, "--keep", keep, "--out", str(out)]) == 0
        reports[keep] = json.loads((out / "report.json").read_text())
    ranked = [entry["seed"] for entry in reports["3"]["variations"]]
    scores = [entry["ranking"] for entry in reports["3"]["variations"]]
    for keep in (1, 2):
        report = reports[str(keep)]
        assert [entry["seed"] for entry in report["variations"]] == ranked[:keep]
        assert [entry["seed"] for entry in report["not_rendered"]] == ranked[keep:]
        assert [entry["ranking"] for entry in report["not_rendered"]] == scores[keep:]
        for entry in report["variations"]:
            assert (tmp_path / str(keep) / entry["accompaniment"]).is_file()
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == OURS
    # One accompaniment, the best of three candidates, is the best of three variations.
    assert main([*options[:2], "--candidates", "3", *base, "--out", str(tmp_path / "0")]) == 0
    report = json.loads((tmp_path / "0" / "report.json").read_text())
    assert "variations" not in report and report["not_rendered"] == reports["1"]["not_rendered"]
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == OURS
    best = {(tmp_path / folder / "accompaniment.wav").read_bytes() for folder in "310"}
    assert len(best) == 1


def test_prefix_and_level(base, vocal_file, tmp_path, make_singing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("-start.flac", make_singing(1.0), 48_000)
    options = ["--prefix", "-start.flac", "--level", "-6", "--out", str(tmp_path / "out")]
    assert main(["--vocal", str(vocal_file), *options, *base]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["prefix_seconds"] == 1.0
    assert report["settings"]["accompaniment_db"] == -6


@pytest.mark.parametrize(
    ("name", "rate_hz", "channels", "subtype"),
    [
        ("a.wav", 8_000, 1, "PCM_16"),
        ("a.wav", 96_000, 6, "PCM_24"),
        ("a.wav", 48_000, 2, "FLOAT"),
        ("a.flac", 44_100, 2, None),
        ("a.ogg", 44_100, 1, None),
        ("a.mp3", 44_100, 2, None),
    ],
)
def test_whatever_soundfile_reads(base, tmp_path, make_singing, name, rate_hz, channels, subtype):
    wave = make_singing(1.37, rate_hz=rate_hz, channels=channels)
    soundfile.write(tmp_path / name, wave, rate_hz, subtype=subtype)
    assert main(["--vocal", str(tmp_path / name), "--out", str(tmp_path / "out"), *base]) == 0
    info = soundfile.info(tmp_path / "out" / "mix.wav")
    assert (info.samplerate, info.channels) == (48_000, 2)
    stored = soundfile.info(tmp_path / name)
    assert info.frames == round(stored.frames * 48_000 / rate_hz)


def test_takes_from_a_phone_and_a_flac_back(base, tmp_path, make_singing):
    lead, harmony = tmp_path / os.fsdecode(b"caf\xe9.m4a"), tmp_path / "harmony.webm"
    make_recording(lead.with_name("whole.m4a"), make_singing(3.0).T, 48_000, movflags="faststart")
    data = lead.with_name("whole.m4a").read_bytes()
    lead.write_bytes(data[: len(data) * 3 // 4])
    make_recording(harmony, make_singing(1.2).T, 48_000)
    out = tmp_path / os.fsdecode(b"caf\xe9-accompaniment")
    for ending in ("flac", "mp3"):  # the second takes the place of the first
        options = ["--vocal", harmony.name, "--format", ending, *base]
        done = run("--vocal", lead.name, *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        names = [f"accompaniment.{ending}", "codes.safetensors", f"mix.{ending}", "report.json"]
        assert sorted(path.name for path in out.iterdir()) == names
    report = json.loads((out / "report.json").read_text())
    assert report["vocal"] == r"caf\xe9.m4a + harmony.webm" and report["files"] == names
    assert any(line in done.stderr for line in report["warnings"])
    assert re.search(r"caf\\xe9.m4a ends at 2.\d of 3.0 s", report["warnings"][0])
    info = soundfile.info((out / "mix.mp3").rename(tmp_path / "mix.mp3"))
    assert (info.format, info.channels, info.frames) == ("MP3", 2, report["samples"])


def test_progress_bar_names_the_stages(base, vocal_file, tmp_path, capsys):
    assert main(["--vocal", str(vocal_file), "--out", str(tmp_path / "out"), "--progress", *base]) == 0
    assert "100%" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(base, vocal_file, tmp_path):
    # A limit on the size of files fails the write in the way a full disk does.
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run("--vocal", vocal_file, "--out", tmp_path / "out", *base, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
