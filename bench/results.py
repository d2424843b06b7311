"""Rows of a benchmark run: what each says of its origin, how they are made from rounds, where they are kept."""

import json
import os
import platform
import re
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.cases import DEVICE, HUGE_PAGES, THREADS, Case
from bench.limits import least_seconds
from bench.memory import available_bytes
from bench.paths import RESULTS, ROOT
from bench.stats import quartiles, quotient
from bench.timing import Measured
from hsv_kernels.backends import compiled_module

LIBRARIES = ("torch", "triton", "numpy", "lightly", "pytorch-metric-learning", "timm")

Row = dict[str, object]


def origin() -> Row:
    """Device, threads, versions, commit and settings: the same for every row of a run."""
    module = compiled_module()
    return {
        "device": device_name(),
        "cpu": cpu_model(),
        "isa": "no compiled kernels" if isinstance(module, str) else module.cpu_isa(),
        "threads": THREADS,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "system": without_build(f"{platform.system()} {platform.release()}"),
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "huge_pages_for_all": HUGE_PAGES,
        "memory_bytes": available_bytes(),
        "transparent_huge_pages": transparent_huge_pages(),
    }


def device_name() -> str:
    return cpu_model() if DEVICE == "cpu" else torch.cuda.get_device_name()


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text()) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def without_build(system: str) -> str:
    """Name and version number of a system: what follows them is the name of somebody's build."""
    return re.match(r"\S*( [\d.]+)?", system)[0].rstrip(".")


def commit() -> str:
    """Short hash of the code that runs; HSV_COMMIT tells it where there is no repository."""
    return _git("rev-parse", "--short", "HEAD") or os.environ.get("HSV_COMMIT", "unknown")


def transparent_huge_pages() -> str:
    """The system's setting: always, madvise or never."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    found = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return found[1] if found else "unknown"


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def timing_row(case: Case, mode: str, provider: str, measured: Measured) -> Row:
    """A row of one provider: its times, and their quotients with hsv's and eager's of the same rounds."""
    row: Row = {
        "operation": case.operation,
        "shape": case.shape,
        "products": case.products,
        "mode": mode,
        "provider": provider,
        "note": case.providers[provider].note,
        "status": "ok",
        "reason": "",
    }
    seconds = measured.seconds.get(mode, {})
    if provider not in seconds:
        row["status"], row["reason"] = measured.failures[provider]
        return row
    own = seconds[provider]
    known = [value for value in own if value is not None]
    first, median, third = quartiles(known)
    row |= {"rounds": len(known), "q1_s": first, "median_s": median, "q3_s": third, "least_s": min(known)}
    for other in ("hsv", "eager"):
        row[f"times_{other}"] = quotient(own, seconds[other]) if other in seconds else None
    return row | _fractions(case, mode, own, measured.rates)


def _fractions(case: Case, mode: str, seconds: list[float | None], rates: list[dict[str, float]]) -> Row:
    """Least time over time, by the rates of the same round, with the exponentials and without; and the rates."""
    if mode not in case.work or not all(rates):
        return {}
    row: Row = {"limit": "bandwidth" if case.work[mode].bytes else "arithmetic"}
    for name, exponentials in (("fraction", True), ("fraction_products", False)):
        least = [least_seconds(case.work[mode], case.products, r, exponentials=exponentials) for r in rates]
        if None in least:
            return {}
        row[name] = quotient(least, seconds)
    return row | {f"rate_{name}": quartiles([r[name] for r in rates])[1] for name in rates[0]}


def append(path: Path, row: Row) -> None:
    """Adds a line: what was measured stays when a later provider ends the process."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(rows: list[Row], folder: Path = RESULTS) -> Path:
    """folder/<device>/<date>-<commit>.json, a row a line; the date is the first row's."""
    first = rows[0]
    dirty = "-dirty" if first["dirty"] else ""
    name = f"{str(first['date'])[:10]}-{first['commit']}{dirty}.json"
    path = folder_of(first, folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
    os.replace(temporary, path)
    return path


def folder_of(row: Row, folder: Path) -> Path:
    """Where rows of its device are kept: a GPU's own folder, or that of a CPU and a number of threads."""
    on_gpu = row["device"] != row["cpu"]
    return folder / slug(str(row["device"]) if on_gpu else f"{row['device']} {row['threads']} threads")


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text())


def newest(folder: Path) -> list[Path]:
    """Result files of a device, the newest first."""
    return sorted(folder.glob("*-*.json"), key=lambda path: read(path)[0]["date"], reverse=True)


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
