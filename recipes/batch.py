"""Many songs in one go: a folder, JSONL or Parquet of vocals -> a folder of results each.

Run: python -m duotok.recipes.batch --songs vocals/ --out results [--workers 4] [--ray ADDRESS]
A row of a list has the fields of `Request`, such as {"vocal": "a.wav", "style": "soul", "seed": 3}, and may
have an "id", which names its result OUT/ID; paths are relative to the list. Run the same command again to go
on: what is there in full is not made again. A song that cannot be accompanied is listed with its reason in
OUT/left_out.jsonl; the others are made all the same, and the exit code is 1. Both sides may be URLs that
fsspec knows (s3://bucket/vocals), with the package of that storage installed.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.generate import expect_files
from duotok.recipes.accompany.output import REPORT, OutputFolder
from duotok.recipes.accompany.request import Request
from duotok.recipes.workers.pool import Workers, add_worker_options, take_workers, tell_left_out
from duotok.recipes.workers.storage import ask, open_storage
from duotok.tokenizer.common.audio import MEDIA_ENDINGS
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist

LEFT_OUT_FILE = "left_out.jsonl"
_PATHS = ("vocal", "mix", "prefix", "chords")  # fields of a request that name files
_NAMES = re.compile(r"[\w][\w .()+-]*")  # of a result's folder
_LISTS = (".jsonl", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One song to be accompanied."""

    id: str
    fields: dict[str, Any]  # of its request; files as full paths or URLs


def read_rows(source: str) -> list[Row]:
    """Return the rows of a list, or one for every recording of a folder; DataError names a bad one."""
    files, place = open_storage(source)
    if files.isdir(place):
        paths = [p for p in sorted(files.find(place)) if Path(p).suffix.lower() in MEDIA_ENDINGS]
        rows = [
            Row(id=Path(path).stem, fields={"vocal": files.unstrip_protocol(path)})
            for path in paths
            if not Path(path).name.startswith(".")
        ]
    elif Path(place).suffix.lower() in _LISTS and files.exists(place):
        folder = files.unstrip_protocol(place).rpartition("/")[0]
        rows = [_read_row(values, folder, where) for values, where in _read_list(files, place)]
    else:
        raise DataError(f"{source} is no folder and no {' or '.join(_LISTS)} list; name one by --songs")
    if not rows:
        raise DataError(f"{source} has no recordings; known endings are {', '.join(MEDIA_ENDINGS)}")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise DataError(f"{source} has two songs called {row.id!r}; give each an id of its own")
        seen.add(row.id)
    return rows


def _read_list(files: Any, place: str) -> list[tuple[Any, str]]:
    """The values of each row of a list, and where it stands."""
    with files.open(place, "rb") as file:
        if place.lower().endswith(".parquet"):
            try:
                import pyarrow.parquet  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ConfigError("Parquet lists need pyarrow: pip install pyarrow") from error
            try:
                found = pyarrow.parquet.read_table(file).to_pylist()
            except pyarrow.ArrowException as error:
                raise DataError(f"{place} is no Parquet file: {error!s:.200}") from error
            told = [{key: value for key, value in row.items() if value is not None} for row in found]
            return [(row, f"{place}: row {number}") for number, row in enumerate(told, start=1)]
        rows = []
        for number, line in enumerate(file.read().decode("utf-8", "replace").splitlines(), start=1):
            where = f"{place}: line {number}"
            if line.strip():
                try:
                    rows.append((json.loads(line), where))
                except ValueError as error:
                    raise DataError(f"{where} is no JSON: {error}") from error
        return rows


def _read_row(values: Any, folder: str, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f'{where} must be an object such as {{"vocal": "a.wav"}}')
    values = dict(values)
    name = values.pop("id", None)
    known = {field.name for field in fields(Request)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise DataError(f"{where} has no field {unknown[0]!r}; there are id, {', '.join(sorted(known))}")
    for key in _PATHS:
        given = values.get(key)
        takes = given if key == "vocal" and isinstance(given, list) else [given]
        if any(not isinstance(take, str) for take in takes if take is not None):
            raise DataError(f"{where}: {key} must name a file, got {given!r}")
        full = [_full_path(take, folder) for take in takes if take is not None]
        if given is not None:
            values[key] = full if isinstance(given, list) else full[0]
    for key in ("export", "without"):
        if isinstance(values.get(key), list):
            values[key] = tuple(values[key])
    first = values.get("vocal") or values.get("mix") or ""
    name = str(name) if name is not None else Path(first[0] if isinstance(first, list) else first).stem
    if not _NAMES.fullmatch(name) or name.rstrip(". ") != name:
        raise DataError(f"{where}: {name!r} cannot name a folder; give an id of letters and digits")
    return Row(id=name, fields=values)


def _full_path(source: str, folder: str) -> str:
    """A path of a list in a folder as one that means the same anywhere."""
    return source if "://" in source or source.startswith("/") else f"{folder}/{source}"


def _is_local(files: Any) -> bool:
    return "file" in ((files.protocol,) if isinstance(files.protocol, str) else files.protocol)


_accompanist: "Accompanist | None" = None  # one per worker


def start_worker(model: Path | None, device: str, threads: int | None) -> None:
    """Load the model once."""
    global _accompanist
    import torch

    from duotok.recipes.accompany.pipeline import Accompanist

    if threads is not None:
        torch.set_num_threads(threads)
    _accompanist = Accompanist.from_pretrained(model, device=device)


def make_song(task: tuple[Row, str]) -> None:
    """Write OUT/ID of a row in full, or raise DuoTokError and leave nothing."""
    row, out = task
    assert _accompanist is not None
    files, place = open_storage(f"{out}/{row.id}")
    is_here = _is_local(files)
    with tempfile.TemporaryDirectory(prefix="duotok-batch-") as temporary:
        request = Request(**_bring_here(row.fields, Path(temporary))).read()
        folder = Path(place) if is_here else Path(temporary) / "result"
        with OutputFolder(folder, expect_files(request)) as output:
            _accompanist.write(request, output.work)
            output.publish()
        if not is_here:
            # The report comes last: with it a result is whole.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == REPORT):
                files.put_file(str(path), f"{place}/{path.name}")


def _bring_here(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a row with remote files as local copies."""

    def bring(source: str, number: int) -> str:
        files, place = open_storage(source)
        if _is_local(files):
            return place
        copy = folder / f"{number}-{Path(place).name}"
        files.get_file(place, str(copy))
        return str(copy)

    values = dict(values)
    for number, key in enumerate(_PATHS):
        given = values.get(key)
        if isinstance(given, list):
            values[key] = [bring(take, 10 * number + n) for n, take in enumerate(given)]
        elif given is not None:
            values[key] = bring(given, 10 * number)
    return values


def _find_missing(rows: Sequence[Row], out: str) -> list[Row]:
    """The rows whose results are not there yet; where they go must be a place that may be written."""
    files, place = open_storage(out)
    if files.isfile(place):
        raise DataError(f"{out} is a file; give the name of a folder by --out")
    missing = [row for row in rows if not files.exists(f"{place}/{row.id}/{REPORT}")]
    if missing and not _is_local(files):  # better known before the songs are made than after
        files.pipe_file(f"{place}/{LEFT_OUT_FILE}", b"")
    return missing


def make_batch(songs: str, out: str, model: Path | None, device: str, workers: Workers) -> int:
    """Make what is missing; return the number of results. DataError at the end where songs were left out."""
    from tqdm import tqdm

    rows = ask(songs, lambda: read_rows(songs))
    files, place = open_storage(out)
    tasks = [(row, out) for row in ask(out, lambda: _find_missing(rows, out))]
    left_out: dict[str, str] = {}
    start = (None if model is None else model.absolute(), device, 1 if workers.are_apart else None)
    results = workers.run(tasks, make_song, start=start_worker, arguments=start)
    with tqdm(total=len(rows), initial=len(rows) - len(tasks), unit="song", disable=None) as progress:
        for (row, _), reason in results:
            if reason is not None:
                left_out[row.id] = reason
                progress.write(f"{row.id}: left out: {reason}", sys.stderr)
            progress.update()
    path = f"{place}/{LEFT_OUT_FILE}"
    if left_out:
        lines = [
            json.dumps({"id": name, "reason": why}, ensure_ascii=False) for name, why in left_out.items()
        ]
        files.makedirs(place, exist_ok=True)
        files.pipe_file(path, ("\n".join(lines) + "\n").encode())
        told = tell_left_out([f"{name}: {reason}" for name, reason in left_out.items()])
        made = len(rows) - len(left_out)
        raise DataError(f"{made} of {len(rows)} songs are in {out}, {len(left_out)} were left out: {told}")
    if files.exists(path):
        files.rm_file(path)
    return len(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.batch", description="Accompaniments of many vocals."
    )
    add = parser.add_argument
    add("--songs", required=True, metavar="PLACE", help="folder of recordings, or a .jsonl or .parquet list")
    add("--out", required=True, metavar="PLACE", help="folder of the results")
    add("--model", type=Path, metavar="DIR", help="bundle folder (default: the model in the package)")
    add("--device", default="cpu", help="cpu, cuda or mps (default: cpu)")
    add_worker_options(parser)
    arguments = parser.parse_args(argv)

    def make() -> None:
        values = vars(arguments)
        workers = take_workers(values)
        print(f"{make_batch(workers=workers, **values)} songs -> {arguments.out}")

    return guard(make, interrupted="the same command goes on from here")


if __name__ == "__main__":
    sys.exit(main())
