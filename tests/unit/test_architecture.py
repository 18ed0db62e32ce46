"""Who may import whom, read from the sources themselves; lazy and TYPE_CHECKING imports count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("tokenizer", "lm", "renderer")
ROOMS = {  # room -> the other rooms it may import from; more inner rooms come first
    "tokenizer/common": (),
    "tokenizer/music": ("tokenizer/common", "tokenizer"),
    "tokenizer": ("tokenizer/common",),
    "lm": ("tokenizer",),
    "renderer": ("tokenizer",),
    "recipes/workers": LIBRARIES,
    "recipes/separation": LIBRARIES,
    "recipes/accompany": (*LIBRARIES, "recipes/separation"),
    "recipes/service": (*LIBRARIES, "recipes/accompany"),
    "recipes/training": LIBRARIES,
    "recipes/corpus/popband": (
        *LIBRARIES,
        "recipes/corpus",
        "recipes/lm",
        "recipes/workers",
    ),  # tokens in place of audio
    "recipes/corpus": (*LIBRARIES, "recipes/separation", "recipes/workers"),
    "recipes/lm/separator": (*LIBRARIES, "recipes/training", "recipes/tokenizer"),  # cuts of stems
    **{
        f"recipes/{part}": (*LIBRARIES, "recipes/training", "recipes/corpus", *more)
        for part, more in {
            "tokenizer": ("recipes/lm",),
            "lm": ("recipes/workers",),
            "renderer": ("recipes/workers", "recipes/lm"),
            "finetuning": ("recipes/accompany", "recipes/lm", "recipes/separation"),
        }.items()
    },
    "recipes/evaluation": (
        *LIBRARIES,
        *(f"recipes/{part}" for part in ("accompany", "corpus", "lm", "separation", "tokenizer")),
    ),
    "recipes/listening": (*LIBRARIES, "recipes/accompany", "recipes/corpus", "recipes/evaluation"),
    "recipes/research": (*LIBRARIES, "recipes"),
    "recipes/small": (),
    "recipes/batch": (*LIBRARIES, "recipes/accompany", "recipes/workers"),
    "recipes": (),
}
LONGEST_FILE_LINES = 700
ROLES = ("__init__", "__main__", "model")  # each folder's own, called alike in all of them


def module_files(root: Path) -> dict[str, Path]:
    """Every module of ours, as a path without suffix, and its file."""
    files = {}
    for folder in (*LIBRARIES, "recipes"):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root).with_suffix("").as_posix()
            files[name.removesuffix("/__init__")] = path
    return files


def room_of(module: str) -> str:
    """The innermost room that a module lies in."""
    return max((room for room in ROOMS if f"{module}/".startswith(f"{room}/")), key=len)


def imported(module: str, files: dict[str, Path]) -> list[tuple[str, str]]:
    """(module of ours, complaint or "") for every import of ours in a module."""
    path = files[module]
    package = module if path.name == "__init__.py" else module.rpartition("/")[0]
    in_library = module.split("/")[0] in LIBRARIES
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [(alias.name.replace(".", "/"), "") for alias in node.names]
            names = [(name.removeprefix("duotok/"), name) for name, _ in names]
            for name, written in names:
                if written.split("/")[0] in (*LIBRARIES, "recipes"):
                    found.append((name, f"{written}: import duotok.{written.replace('/', '.')}"))
                elif written.startswith("duotok/"):
                    found.append((name, "inside a library, import siblings relatively" if in_library else ""))
        elif isinstance(node, ast.ImportFrom):
            target = (node.module or "").replace(".", "/")
            complaint = ""
            if node.level:
                base = package.split("/")[: len(package.split("/")) - (node.level - 1)]
                target = "/".join([*base, *([target] if target else [])])
                complaint = "" if in_library else "recipes import absolutely"
            elif target.split("/")[0] == "duotok":
                target = target.removeprefix("duotok").removeprefix("/")
                complaint = "inside a library, import siblings relatively" if in_library else ""
            elif target.split("/")[0] in (*LIBRARIES, "recipes"):
                complaint = f"import duotok.{target}"
            else:
                continue
            for alias in node.names:
                inner = f"{target}/{alias.name}".removeprefix("/")
                found.append((inner if inner in files else target, complaint))
    return found


def complaints(module: str, files: dict[str, Path]) -> list[str]:
    """What is wrong with a module's imports."""
    room, wrong = room_of(module), []
    for target, complaint in imported(module, files):
        if complaint:
            wrong.append(f"{module} -> {target}: {complaint}")
        if target not in files or target == module:
            wrong.append(f"{module} -> {target}: no such module")
        elif room_of(target) != room and not any(
            f"{room_of(target)}/".startswith(f"{allowed}/") for allowed in ROOMS[room]
        ):
            wrong.append(f"{module} -> {target}: {room} may not import {room_of(target)}")
    return wrong


def circles(files: dict[str, Path]) -> list[list[str]]:
    """Groups of modules that import each other in a circle (Tarjan)."""
    graph = {name: {target for target, _ in imported(name, files)} & set(files) for name in files}
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in number:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], number[target])
        if low[name] == number[name]:
            group = stack[stack.index(name) :]
            del stack[-len(group) :]
            if len(group) > 1 or name in graph[name]:
                found.append(group)

    for name in files:
        if name not in number:
            visit(name)
    return found


FILES = module_files(ROOT)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room):
    modules = [module for module in FILES if room_of(module) == room]
    assert modules
    assert [wrong for module in modules for wrong in complaints(module, FILES)] == []


def test_no_modules_import_each_other_in_a_circle():
    assert circles(FILES) == []


def test_one_name_has_one_meaning():
    places: dict[str, list[str]] = {}
    for module, path in FILES.items():
        if path.stem not in ROLES:
            places.setdefault(path.stem, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_files_are_short():
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in FILES.items()}
    assert {module: count for module, count in lines.items() if count > LONGEST_FILE_LINES} == {}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tokenizer/model", "from ..lm import sampling"),
        ("tokenizer/model", "from duotok.tokenizer.common import audio"),
        ("tokenizer/common/audio", "def late():\n    from ..model import DuoTokenizer"),
        ("lm/sampling", "from ..renderer.song import Renderer"),
        ("lm/sampling", "from .. import recipes"),
        ("renderer/song", "import duotok.lm.sampling"),
        ("recipes/training/loop", "from . import log"),
        ("recipes/training/loop", "import lm.sampling"),
        ("recipes/training/loop", "from duotok.recipes.accompany.generate import main"),
        ("recipes/accompany/generate", "def late():\n    from duotok.recipes.training import loop"),
        ("recipes/evaluation/score", "import duotok.recipes.research.probe"),
    ],
)
def test_a_wrong_import_is_noticed(module, source, tmp_path):
    for each in ("lm/sampling", "renderer/song", "tokenizer/model", "tokenizer/common/audio"):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{each}.py").write_text("")
    for each in ("accompany/generate", "training/loop", "training/log", "evaluation/score", "research/probe"):
        (tmp_path / "recipes" / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipes" / f"{each}.py").write_text("")
    (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
    assert complaints(module, module_files(tmp_path))


def test_a_circle_is_noticed(tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm/first.py").write_text("def late():\n    from .second import x")
    (tmp_path / "lm/second.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .first import y"
    )
    assert circles(module_files(tmp_path)) == [["lm/first", "lm/second"]]
