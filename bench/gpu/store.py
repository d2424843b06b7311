"""Rows that outlast their process: one line of JSON each, on disk before the next is measured."""

import hashlib
import json
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from bench.cases import MODES, Case
from bench.paths import RESULTS, ROOT
from bench.results import Row, folder_of, read, read_lines

MEASURED = ("operation", "shape", "products", "mode", "provider")  # what a row is about
SAME = ("device", "code", "torch", "triton")  # rows of other values say nothing about this machine and code
SOURCES = ("hsv", "hsv_kernels", "csrc", "bench", "setup.py", "CMakeLists.txt")
PRESENTATION = {"check.py", "figures.py", "page.py", "plots.py", "rehearsal.py", "tables.py", "targets.py"}


@cache
def fingerprint(names: tuple[str, ...] = SOURCES) -> str:
    """Of the sources that a time depends on, the same where the files are, committed or not."""
    digest = hashlib.sha256()
    for name in names:
        paths = sorted((ROOT / name).rglob("*")) if (ROOT / name).is_dir() else [ROOT / name]
        for path in paths:
            if path.suffix in (".py", ".h", ".cpp", ".cu", ".yaml", ".txt") and path.name not in PRESENTATION:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def identity(row: Row) -> tuple[object, ...]:
    return tuple(row.get(field) or row["versions"].get(field) for field in SAME)


def key(row: Row) -> str:
    return json.dumps([row[field] for field in MEASURED], sort_keys=True)


class Store:
    """Appends rows to `path` and knows which of a run's own rows are there, in it or in the arrays of `folders`.

    Args:
        path: lines of JSON, made on the first row.
        origin: the fields that all rows of this run share.
        folders: of results, arrays or lines, whose rows of the same device, code and versions count as measured.
    """

    def __init__(self, path: Path, origin: Row, folders: Iterable[Path] = ()) -> None:
        self.path, self.origin = path, origin
        known = [row for folder in folders for file in sorted(folder.glob("*-*.json")) for row in read(file)]
        lines = dict.fromkeys([*(folder / path.name for folder in folders), path])
        known += [row for file in lines for row in whole_lines(file)]
        own = [row for row in known if "code" in row and identity(row) == identity(origin)]
        self.rows: dict[str, Row] = {key(row): row for row in own}

    def append(self, row: Row) -> None:
        """Returns when the row is on the disk."""
        row = self.origin | row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows[key(row)] = row

    def find(self, operation: str) -> list[Row]:
        return [row for row in self.rows.values() if row["operation"] == operation]

    def lacks(self, case: Case, kind: str, provider: str) -> bool:
        return any(key(about(case, mode, provider)) not in self.rows for mode in MODES[kind])


def stored(folder: Path, origin: Row, name: str = "rows.jsonl") -> Store:
    """What is known of this code and device: in `folder` and among the committed results."""
    return Store(folder / name, origin, list(dict.fromkeys([folder, folder_of(origin, RESULTS)])))


def about(case: Case, mode: str, provider: str) -> Row:
    """The fields by which a row of this measurement is known."""
    return dict(zip(MEASURED, (case.operation, case.shape, case.products, mode, provider), strict=True))


def whole_lines(path: Path) -> list[Row]:
    """The rows of a file whose last line may have been cut off by a crash; what is cut off is removed."""
    if not path.exists():
        return []
    text = path.read_text()
    end = text.rfind("\n") + 1
    if end < len(text):
        path.write_text(text[:end])
    return read_lines(path)
