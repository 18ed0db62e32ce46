"""What an installation contains, compared with what is in the folders."""

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tokenizer", "lm", "renderer", "recipes")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETTINGS = PROJECT["tool"]["setuptools"]
# Pyproject patterns use ** for any depth; fnmatch's * already crosses "/".
DATA_FILES = sorted(
    path.relative_to(ROOT)
    for folder in FOLDERS
    for suffix in ("yaml", "yml", "sh", "safetensors", "html")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
)


def is_package_data(path: Path) -> bool:
    """Whether a pattern of the packages above this file (relative to the root) takes it along."""
    for package, patterns in SETTINGS["package-data"].items():
        folder = Path(*package.split(".")[1:])
        if folder not in path.parents:
            continue
        inner = path.relative_to(folder).as_posix()
        for pattern in patterns:
            if fnmatch.fnmatch(inner, pattern) or fnmatch.fnmatch(inner, pattern.removeprefix("**/")):
                return True
    return False


def test_every_folder_with_python_files_is_a_listed_package():
    folders = {
        ".".join(("duotok", *path.parent.relative_to(ROOT).parts))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
    }
    assert sorted(SETTINGS["packages"]) == sorted(folders)


def test_every_package_has_an_init():
    for package in SETTINGS["packages"]:
        assert (ROOT / Path(*package.split(".")[1:]) / "__init__.py").is_file(), package


def test_the_namespace_maps_to_the_four_folders():
    assert SETTINGS["package-dir"] == {f"duotok.{folder}": folder for folder in FOLDERS}


@pytest.mark.parametrize("path", DATA_FILES, ids=str)
def test_recipes_and_weights_are_package_data(path):
    assert is_package_data(path)


def test_the_lock_is_of_what_the_project_requires():
    """`uv lock --check` says so as well, where there are uv and a network."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))
    (own,) = [each for each in lock["package"] if each["name"] == "duotok"]
    project, locked, wanted = PROJECT["project"], set(), set()
    for each in own["metadata"]["requires-dist"]:
        extra = re.findall(r"extra == '(\w+)'", each.get("marker", ""))
        specifier = SpecifierSet(each.get("specifier", ""))
        locked.add((each["name"], specifier, *extra, *each.get("extras", ())))
    for extra, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for each in map(Requirement, texts):
            named = [*([extra] if extra else []), *sorted(each.extras)]
            wanted.add((canonicalize_name(each.name), each.specifier, *named))
    assert locked == wanted
    assert SpecifierSet(lock["requires-python"]) == SpecifierSet(project["requires-python"])
    assert set(map(Marker, lock["supported-markers"])) == {
        Marker(" and ".join(sorted(text.split(" and ")))) for text in PROJECT["tool"]["uv"]["environments"]
    }


def test_there_are_recipes_and_an_unlisted_file_is_noticed():
    assert any(path.suffix == ".yaml" for path in DATA_FILES)
    assert not is_package_data(Path("recipes/small/notes.xyz"))
    assert not is_package_data(Path("lm/tiny.yaml"))


def test_console_scripts_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "generate" in project["scripts"]
    for target in project["scripts"].values():
        module, _, function = target.partition(":")
        path = (ROOT / Path(*module.split(".")[1:])).with_suffix(".py")
        assert path.is_file() and f"def {function}(" in path.read_text(encoding="utf-8"), target


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile: {stage: [(instruction, rest of the line)]}."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for line in (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            stages[rest.partition(" AS ")[2]] = []
        if stages and instruction.isupper():
            list(stages.values())[-1].append((instruction, rest))
    return stages


def test_the_container_is_made_by_the_lines_of_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    use, test = [line for line in readme.split("```")[1].splitlines() if "pip install" in line]
    stages = read_stages()
    assert list(stages) == ["checkout", "test", ""]
    assert ("RUN", use) in stages["checkout"] and ("RUN", test) in stages["test"]


def test_nobody_in_the_container_is_root():
    stages = read_stages()
    for stage in ("checkout", ""):
        assert [rest for instruction, rest in stages[stage] if instruction == "USER"] == ["band"]
        steps = [instruction for instruction, _ in stages[stage]]
        assert steps[steps.index("USER") :].count("RUN") == (stage == "checkout")
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", "runs", "data"} <= set(ignored)
    assert not {path.split("/")[0] for path in ("tests", "examples", ".typing", *FOLDERS)} & set(ignored)
