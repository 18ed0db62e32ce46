"""The site of docs/: built as it would be published, with every warning an error."""

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="the site takes pip install '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there_and_loads_nothing_from_elsewhere(site):
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    built = {path.parent.name for path in site.glob("*/index.html")} | {"index"}
    assert len(pages) > 10 and pages <= built
    for path in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?(https?:[^" >]+)', path.read_text())
        assert loaded == [], path


def test_the_reference_has_signatures_and_docstrings(site):
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "index.html").read_text()))
    named = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert len(named) > 15 and all(name.rpartition(".")[2] in page for name in named)
    for text in (
        'or "owner/name" of the hub',
        "AudioError",
    ):
        assert text in page
    members = re.findall(r"members: \[([^]]+)\]", (ROOT / "docs" / "reference.md").read_text())
    for member in ", ".join(members).split(", "):
        assert f"{member}(" in re.sub(r"\s", "", page), member
