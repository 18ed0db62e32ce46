"""The output folder: whole or not at all, never over what is somebody else's, one run at a time."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from duotok.recipes.accompany.output import (
    FORMATS,
    OutputError,
    OutputFolder,
    expected_files,
    write_report,
)
from duotok.tokenizer.common.audio import write_audio

WAVES = {"accompaniment.wav": 5, "mix.wav": 5}


def leave(folder, *names, command="generate", text="new"):
    """A result of these files."""
    with OutputFolder(folder, dict.fromkeys(names, 5), command=command) as output:
        for name in names:
            (output.work / name).write_text(text)
        write_report(output.work, {}, command=command)
        output.publish()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_appears_whole_with_its_parents(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with OutputFolder(out, WAVES) as output:
        (output.work / "mix.wav").write_text("new")
        assert not out.exists()
        output.publish()
    assert names_in(out) == ["mix.wav"] and names_in(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_nothing_stays_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), OutputFolder(tmp_path / "a" / "b", WAVES) as output:
        (output.work / "mix.wav").write_text("new")
        raise RuntimeError
    assert names_in(tmp_path) == []


def test_an_earlier_result_and_nothing_else_is_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    leave(tmp_path, "mix.wav", "mix-1.wav", "mix-2.wav", text="old")
    (tmp_path / "mix-3.wav").write_text("mine")
    with pytest.raises(RuntimeError), OutputFolder(tmp_path, WAVES):
        raise RuntimeError
    assert (tmp_path / "mix-2.wav").read_text() == "old"
    leave(tmp_path, "mix.wav", "accompaniment.wav")
    assert names_in(tmp_path) == ["accompaniment.wav", "mix-3.wav", "mix.wav", "notes.txt", "report.json"]
    assert (tmp_path / "mix.wav").read_text() == "new" and (tmp_path / "mix-3.wav").read_text() == "mine"
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "made_by": "duotok generate",
        "files": ["accompaniment.wav", "mix.wav", "report.json"],
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mix.wav", "mine"),
        ("report.json", "{}"),
        ("report.json", "no json"),
        ("report.json", '{"made_by": "duotok separate", "files": ["mix.wav", "report.json"]}'),
        ("report.json", '{"made_by": "duotok generate", "files": 3}'),
    ],
)
def test_a_file_of_somebody_else_in_the_way_is_named_and_stays(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(OutputError, match=f"{name} is in the way") as error, OutputFolder(tmp_path, WAVES):
        pass
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == [name] and (tmp_path / name).read_text() == content


def test_a_report_that_lists_files_elsewhere_is_believed_only_for_its_folder(tmp_path):
    (tmp_path / "mine").write_text("mine")
    leave(tmp_path / "out", "mix.wav")
    report = {"made_by": "duotok generate", "files": ["../mine", "mix.wav", "report.json", 3]}
    (tmp_path / "out" / "report.json").write_text(json.dumps(report))
    leave(tmp_path / "out", "mix.wav")
    assert (tmp_path / "mine").read_text() == "mine"


def test_what_comes_into_the_way_meanwhile_stays(tmp_path):
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(OutputError), OutputFolder(folder, WAVES) as output:
            (output.work / "mix.wav").write_text("new")
            folder.mkdir(exist_ok=True)
            (folder / "mix.wav").write_text("mine")
            output.publish()
        assert (folder / "mix.wav").read_text() == "mine"


def test_an_input_is_never_replaced(tmp_path, monkeypatch):
    leave(tmp_path / "out", "mix.wav", "separated-vocal.wav")
    monkeypatch.chdir(tmp_path)
    os.symlink(tmp_path / "out" / "mix.wav", "link.wav")
    for given in ("out/mix.wav", "link.wav", "out/separated-vocal.wav"):
        with pytest.raises(OutputError, match="is an input"), OutputFolder("out", WAVES, inputs=[given]):
            pass
    assert names_in(tmp_path / "out") == ["mix.wav", "report.json", "separated-vocal.wav"]


@pytest.mark.parametrize("name", ["file", "file/below", "file/a/b", "x" * 500, "new/" + "x" * 500, "link"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, name):
    (tmp_path / "file").write_text("mine")
    if name == "link":
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="--out") as error, OutputFolder(tmp_path / name, WAVES):
        pass
    assert "\n" not in str(error.value)
    assert names_in(tmp_path) == ["file", "link"][: 1 + (name == "link")]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs rights of POSIX")
@pytest.mark.parametrize("mode", [0o000, 0o500, 0o600])
def test_a_folder_without_rights_is_one_line(tmp_path, mode):
    (closed := tmp_path / "closed").mkdir()
    closed.chmod(mode)
    user = os.geteuid()
    if user == 0:  # root may do everything, and so becomes nobody
        os.chown(closed, 65534, 65534)
        for parent in [tmp_path, *tmp_path.parents[:-1]]:
            parent.chmod(parent.stat().st_mode | 0o011)
        os.seteuid(65534)
    try:
        for out in (closed, closed / "new", closed / "new" / "below"):
            with pytest.raises(OutputError, match="cannot write into .*denied"), OutputFolder(out, WAVES):
                pass
    finally:
        os.seteuid(user)
        closed.chmod(0o700)
    assert names_in(closed) == []


def test_a_disk_without_room_is_known_before_the_work(tmp_path):
    with pytest.raises(OutputError, match="MB are free"), OutputFolder(tmp_path / "a", {"mix.wav": 2**62}):
        pass
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    "options",
    [
        *({"format": name} for name in FORMATS),
        {"renderings": 2, "stems": True, "separated": True, "format": "wav24"},
    ],
)
def test_the_room_that_is_asked_for_is_what_is_written(tmp_path, options):
    wave = torch.rand(2, 48_000, generator=torch.Generator().manual_seed(0)) - 0.5
    for name, expected in expected_files(48_000, **options).items():
        if name.startswith("codes"):
            continue
        is_stem = any(stem in name for stem in ("drums", "bass", "other"))
        write_audio(tmp_path / name, wave, subtype="FLOAT" if is_stem else FORMATS[options["format"]][1])
        least = 0.99 if name.endswith(".wav") else 0.6
        assert least * expected < (tmp_path / name).stat().st_size <= expected
    assert len(names_in(tmp_path)) == (2 if "stems" not in options else 2 * 3 + 2 * 3 + 1)


@pytest.mark.parametrize("made", [False, True])
def test_two_runs_into_one_folder(tmp_path, made):
    out = tmp_path / "out"
    if made:
        leave(out, "mix.wav", text="old")
    with OutputFolder(out, WAVES) as output:
        with pytest.raises(OutputError, match="another run is writing into"), OutputFolder(out, WAVES):
            pass
        with OutputFolder(tmp_path / "other", WAVES):  # beside it is room
            assert output.work.is_dir()
        (output.work / "mix.wav").write_text("new")
        output.publish()
    assert (out / "mix.wav").read_text() == "new"


PROGRAM = """
import os, signal, sys
from duotok.recipes.accompany.output import OutputFolder
from duotok.tokenizer.common.command import guard

def run():
    with OutputFolder(sys.argv[1], {"mix.wav": 5}) as output:
        (output.work / "mix.wav").write_text("half")
        os.kill(os.getpid(), int(sys.argv[2]))

sys.exit(guard(run, interrupted="nothing was written"))
"""


@pytest.mark.parametrize("made", [False, True])
def test_a_killed_run_leaves_nothing_to_the_next(tmp_path, made):
    out = tmp_path / "out"
    if made:
        leave(out, "mix.wav")
    before = names_in(tmp_path)

    def run(number: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(out), str(number)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    done = run(int(signal.SIGTERM))
    assert (done.returncode, done.stderr) == (143, "interrupted: nothing was written\n")
    assert names_in(tmp_path) == before
    assert run(int(signal.SIGKILL)).returncode == -signal.SIGKILL
    place = out if made else tmp_path
    assert any(name.startswith(".duotok-") for name in names_in(place))
    (place / ".duotok-notes").mkdir()  # somebody else's
    leave(out if made else tmp_path / "other", "mix.wav")  # of any result in that place
    assert [name for name in names_in(place) if name.startswith(".")] == [".duotok-notes"]


def test_a_report_has_no_numbers_that_json_has_not(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_report(tmp_path, {"level": float("nan")})


def test_names_that_are_no_utf_8_are_written_and_told(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    out = tmp_path / f"{name}-accompaniment"
    with OutputFolder(out, WAVES) as output:
        write_report(output.work, {"vocal": f"{name}.wav"})
        output.publish()
    assert json.loads((out / "report.json").read_text("utf-8"))["vocal"] == "caf\\xe9.wav"
