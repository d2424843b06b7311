"""Extra memory of each provider: how far a call's peak rises above what was there before it, in a child process.

    python -m bench.memory bench.bench_contrast nt_xent float32 eager

goes through the cases of one operation in ascending size and prints {title: {kind: {...}}}. A size that would not fit,
by the growth so far, is not tried: it is reported as out of memory, with the bytes that it would need.
"""

import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from bench.cases import DEVICE, THREADS, Case
from bench.paths import ROOT
from bench.stats import growth
from bench.timing import Call

LONGEST = 10.0  # seconds of a call, by its growth so far, beyond which its memory is predicted and not measured
MOST = 400.0  # seconds of one child
TRIED, SHARE = 0.4, 0.9  # of the available memory: what one of two children at once may try, and what a call may take

Peaks = dict[str, dict[str, dict]]  # title of a case → kind → bytes, whether predicted, status


def measure_all(module: str, cases: list[Case]) -> dict[str, Peaks]:
    """Peaks of every provider of a benchmark's cases, by "operation products provider"; empty where there are none."""
    wanted = dict.fromkeys(
        (*case.family, name) for case in cases for name in case.providers if "step" not in case.kinds
    )
    with ThreadPoolExecutor(max(1, min(2, THREADS))) as pool:
        found = pool.map(lambda key: _child(module, *key), wanted)
        return {" ".join(key): peaks for key, peaks in zip(wanted, found, strict=True)}


def _child(module: str, operation: str, products: str, provider: str) -> Peaks:
    # Fixed thresholds return what is freed to the system, so that one call leaves no memory for the next.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.memory", module, operation, products, provider]
    with suppress(subprocess.TimeoutExpired):
        ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=MOST)
        if ran.returncode == 0:
            return json.loads(ran.stdout.splitlines()[-1])
    return {}


def peaks_of(cases: list[Case], provider: str) -> Peaks:
    """Measures one provider in this process."""
    available = available_bytes()
    _limit(available)
    found: Peaks = {case.title: {} for case in cases}
    for kind in dict.fromkeys(kind for case in cases for kind in case.kinds):
        sizes, values, durations = [], [], []
        for case in cases:
            if provider not in case.providers:
                continue
            size = max(case.shape.values())
            needs, duration = growth(sizes, values, size), growth(sizes, durations, size)
            if needs is not None and (needs > TRIED * available or duration > LONGEST):
                found[case.title][kind] = _entry(int(needs), available, predicted=True)
                continue
            try:
                value, seconds = _peak(case, kind, provider)
            except ImportError:
                return {}
            except (MemoryError, RuntimeError) as error:
                if not re.search(r"alloc|memory", str(error), re.IGNORECASE) and not isinstance(error, MemoryError):
                    raise
                found[case.title][kind] = _entry(None, available)
                continue
            sizes, values, durations = [*sizes, size], [*values, value], [*durations, seconds]
            found[case.title][kind] = _entry(value, available)
    return found


def _entry(needs: int | None, available: int, *, predicted: bool = False) -> dict:
    if needs is not None and (needs <= SHARE * available or not predicted):
        return {"bytes": needs, "predicted": predicted, "status": "ok", "reason": ""}
    wanted = "more" if needs is None else f"{needs / 2**30:.0f} GiB, by its growth up to here"
    reason = f"needs {wanted}; {available / 2**30:.0f} GiB are there"
    return {"bytes": needs, "predicted": predicted, "status": "out of memory", "reason": reason}


def _peak(case: Case, kind: str, provider: str) -> tuple[int, float]:
    """Bytes by which the memory in use rises, at most, during one call, and the call's seconds."""
    torch.compiler.reset()
    call = Call(case, case.providers[provider])
    call(kind)  # code, thread pools and compilation
    reset_peak, peak = (_reset_gpu, torch.cuda.max_memory_allocated) if DEVICE != "cpu" else (_reset_cpu, _peak_cpu)
    before = reset_peak()
    begin = time.perf_counter()
    call(kind)
    return max(0, peak() - before), time.perf_counter() - begin


def _reset_gpu() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _reset_cpu() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _peak_cpu() -> int:
    return _resident("VmHWM")


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def available_bytes() -> int:
    """Free memory of the device; on Linux's CPU what the system calls available."""
    if DEVICE != "cpu":
        return torch.cuda.mem_get_info()[0]
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())[1])


def _limit(available: int) -> None:
    """An allocation beyond what is available fails here, instead of ending another process."""
    if DEVICE == "cpu":
        most = _resident("VmData") + int(SHARE * available)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    module, operation, products, provider = sys.argv[1:]
    family = [case for case in importlib.import_module(module).CASES if case.family == (operation, products)]
    print(json.dumps(peaks_of(family, provider)))
