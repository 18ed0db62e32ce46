"""Who may import whom, and how long a file may be, read from the sources themselves."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("tokenizer", "lm", "renderer")
FOLDERS = (*LIBRARIES, "recipes")
ALLOWED = {
    "tokenizer": {"tokenizer"},
    "lm": {"lm", "tokenizer"},
    "renderer": {"renderer", "tokenizer"},
    "recipes": {"recipes", *LIBRARIES},
}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
LONGEST_FILE_LINES = 700


def imported_names(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import; level 0 = absolute, else the number of leading dots."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                names.append((node.level, node.module))
            else:
                names += [(node.level, alias.name) for alias in node.names]
    return names


def folder_of(path: Path, level: int, name: str) -> str | None:
    """The folder of ours that an import reaches; None for the standard library and third parties."""
    parts = name.split(".")
    if level == 0:
        if parts[0] != "duotok":
            return None
        return parts[1] if len(parts) > 1 else "duotok"
    package = ["duotok", *path.relative_to(ROOT).parent.parts]
    base = package[: len(package) - (level - 1)]
    full = [*base, *parts]
    return full[1] if len(full) > 1 and full[0] == "duotok" else "outside"


def violations(path: Path, folder: str) -> list[str]:
    found = []
    for level, name in imported_names(path):
        reached = folder_of(path, level, name)
        if reached is not None and reached not in ALLOWED[folder]:
            found.append(f"{'.' * level}{name}: {folder} may not import {reached}")
        if folder in LIBRARIES and level == 0 and reached is not None:
            found.append(f"{name}: inside the library, import siblings relatively")
        if folder == "recipes" and level > 0:
            found.append(f"{'.' * level}{name}: recipes import absolutely")
        if level == 0 and name.split(".")[0] in FOLDERS:
            found.append(f"{name}: import duotok.{name}")
    return found


def test_there_are_sources():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(FOLDERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    assert violations(path, path.relative_to(ROOT).parts[0]) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE_LINES


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("tokenizer", "from ..lm import model"),
        ("tokenizer", "from duotok.tokenizer.common import audio"),
        ("lm", "from ..renderer.song import Renderer"),
        ("lm", "from .. import recipes"),
        ("renderer", "import duotok.lm.dual_track.model"),
        ("recipes", "from . import training"),
        ("recipes", "import lm.model"),
    ],
)
def test_a_wrong_import_is_noticed(folder, source, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / folder / "example.py"
    path.parent.mkdir()
    path.write_text(source, encoding="utf-8")
    assert violations(path, folder)
