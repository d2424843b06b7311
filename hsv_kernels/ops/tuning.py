"""Opt-in tuning: which of a few configurations of a kernel is the fastest here, timed once and kept on disk."""

import fcntl
import functools
import json
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

from hsv_kernels.backends import interpreting

__all__ = ["choose", "size_class"]

Candidate = TypeVar("Candidate", bound=tuple[Any, ...])
Run = Callable[[Candidate], object]

#: A candidate must beat the first by this much: below it differences are those of the measurement.
MARGIN = 0.02

_chosen: dict[str, tuple[Any, ...]] = {}
_lock = threading.RLock()


def milliseconds(call: Callable[[], object]) -> float:
    """Time of one call on the current stream: the best of three rounds of ten, after one call that compiles."""
    call()
    rounds = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            call()
        end.record()
        end.synchronize()
        rounds.append(begin.elapsed_time(end) / 10)
    return min(rounds)


def choose(
    kernel: triton.JITFunction,
    key: Sequence[object],
    candidates: Sequence[Candidate],
    run: Run[Candidate],
    *,
    clock: Callable[[Callable[[], object]], float] = milliseconds,
) -> Candidate:
    """The candidate with which `run` is the fastest; the first, and nothing is read or timed, unless HSV_TUNE=1.

    The first call with a key takes what an earlier process kept in tuning.json under HSV_CACHE_DIR, or times every
    candidate and keeps the fastest there; the device is waited for that once. Nothing is timed while the stream is
    being captured or torch.compile traces: such a call takes the first candidate, and a later one may time. Candidates
    order their sums differently, and their results differ by rounding alone. Threads and processes may call at once.

    Args:
        kernel: the choice holds for its source, with that of what it calls, and for this version of Triton.
        key: what else the choice holds for: the device's name, dtype, sizes.
        candidates: tuples of numbers, the table's own first. One for which the device lacks the memory is passed over.
        run: launches with a candidate, any number of times, to the same results.
        clock: how long a call takes, in any unit.
    """
    if len(candidates) == 1 or torch.compiler.is_compiling() or interpreting() or os.environ.get("HSV_TUNE") != "1":
        return candidates[0]
    entry = " ".join(map(str, (kernel.__name__, f"triton-{triton.__version__}", kernel.cache_key[:16], *key)))
    with _lock:
        if entry not in _chosen:
            found = look_up(entry, candidates)
            if found is None:
                if torch.cuda.is_current_stream_capturing():
                    return candidates[0]
                found = fastest(candidates, run, clock)
                keep(entry, found)
            _chosen[entry] = found
        return _chosen[entry]


def size_class(size: int) -> int:
    """The power of two that is no smaller: sizes of one class share a choice."""
    return 1 << (size - 1).bit_length()


def fastest(
    candidates: Sequence[Candidate], run: Run[Candidate], clock: Callable[[Callable[[], object]], float]
) -> Candidate:
    times = {}
    for candidate in candidates:
        try:
            times[candidate] = clock(functools.partial(run, candidate))
        except (OutOfResources, torch.OutOfMemoryError):
            continue
    if not times:
        return candidates[0]
    best = min(times, key=times.__getitem__)
    close = times.get(candidates[0], float("inf")) <= (1 + MARGIN) * times[best]
    return candidates[0] if close else best


def look_up(entry: str, candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate that the file names, None where it names none of them."""
    kept = read().get(entry)
    return next((candidate for candidate in candidates if list(candidate) == kept), None)


def cache_file() -> Path:
    """tuning.json in HSV_CACHE_DIR, or in hsv under XDG_CACHE_HOME or ~/.cache."""
    folder = os.environ.get("HSV_CACHE_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hsv")
    return Path(folder).expanduser() / "tuning.json"


def read() -> dict[str, list[Any]]:
    """What the file holds; nothing, with one warning, where it cannot be read."""
    path = cache_file()
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__} in place of a table")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"{path} is ignored: {error}")
        return {}


def keep(entry: str, candidate: tuple[Any, ...]) -> None:
    """Adds to the file, whatever other processes add at the same time; a reader sees all of it or none."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            written = path.with_suffix(".new")
            written.write_text(json.dumps({**read(), entry: list(candidate)}, indent=1, sort_keys=True))
            os.replace(written, path)
    except OSError as error:
        _warn_once(f"the tuned configurations are not kept: {error}")


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"hsv_kernels: {message}", stacklevel=2)
