"""What the benchmarks share: interleaved timing, peak memory of a child process, tables that say their origin."""

import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hsv_kernels.backends import compiled_module

ROOT = Path(__file__).resolve().parent.parent


def interleaved(benchmark: Callable, functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, `rounds` times in turn, after one untimed call of each.

    Taking turns lets a change in the machine's load fall on all of them alike. The first function is the one that
    `benchmark`, the fixture of pytest-benchmark, records; the others run between its rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}

    def run(name: str) -> None:
        begin = time.perf_counter()
        functions[name]()
        seconds[name].append(time.perf_counter() - begin)

    first, *others = functions
    for function in functions.values():
        function()
    benchmark.pedantic(run, args=(first,), setup=lambda: [run(name) for name in others] and None, rounds=rounds)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the quotients of interleaved pairs."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_in_child(module: str, *arguments: str) -> int:
    """Bytes that `python -m module arguments` prints as its last word: see `print_peak`."""
    command = [sys.executable, "-m", module, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])


def print_peak(function: Callable[[], object], warm_up: Callable[[], object]) -> None:
    """Prints the bytes by which resident memory rises, at most, during function(), whatever allocator it uses; Linux.

    warm_up() runs before: the same work, small, so that code and thread pools are there.
    """
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident()
    function()
    print(_resident() - before)


def _resident() -> int:
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def provenance() -> str:
    """One line: device, threads, versions, commit."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    module = compiled_module()
    return ", ".join(
        [
            model[1] if model else platform.processor(),
            "no compiled kernels" if isinstance(module, str) else module.cpu_isa(),
            f"{torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
            f"commit {commit.stdout.strip() or 'unknown'}",
        ]
    )


def table(rows: list[dict[str, object]]) -> str:
    """Rows of equal keys as aligned columns."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
