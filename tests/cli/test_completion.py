"""What a shell is told about the commands, tried in a real one."""

import shutil
import subprocess
import sys

import pytest

from duotok.recipes.accompany import generate, separate
from duotok.recipes.finetuning import finetune
from duotok.recipes.listening import listen

COMMANDS = {"generate": generate, "separate": separate, "finetune": finetune, "listen": listen}

pytest.importorskip("shtab", reason="completion takes pip install '.[completion]'")


def script_of(name: str, capsys, shell: str = "bash") -> str:
    with pytest.raises(SystemExit) as end:
        COMMANDS[name].main(["--print-completion", shell])
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("generate --temp", {"--tempo", "--temperature"}),
        ("generate --format fl", {"float", "flac"}),
        ("generate --vocal so", {"song.wav", "songs"}),
        ("generate --out so", {"songs"}),
        ("separate --che", {"--checkpoint"}),
        ("finetune --songs so", {"songs"}),
        ("listen s", {"sounds", "score"}),
        ("listen page --ti", {"--title"}),
    ],
)
def test_bash_offers(line, offered, capsys, tmp_path):
    (tmp_path / "song.wav").touch()
    (tmp_path / "songs").mkdir()
    name, *words = line.split()
    script = script_of(name, capsys)
    script += (
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_{name}; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_their_own(shell, capsys):
    script = script_of("generate", capsys, shell)
    assert {"zsh": "#compdef generate", "tcsh": "complete generate"}[shell] in script
    assert all(option in script for option in ("temperature", "print-completion"))


def test_without_the_package_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as end:
        generate.main(["--print-completion", "bash"])
    assert end.value.code == 1
    assert (
        capsys.readouterr().err == "error: shtab is missing; in the checkout: pip install '.[completion]'\n"
    )
