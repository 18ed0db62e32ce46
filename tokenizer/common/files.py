"""JSON files that appear under their name only when they are whole."""

import json
import os
from pathlib import Path
from typing import Any

from .errors import DataError


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it; raise DataError where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from error


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise DataError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; delete it and run again") from error
