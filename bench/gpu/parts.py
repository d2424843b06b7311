"""One part of the benchmark: processes that measure, until all is there or the time is over."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.gpu.cases import PARTS
from bench.gpu.child import DEVICE_LOST, Deadline, run
from bench.gpu.measure import OUT_OF_TIME, append_failure
from bench.gpu.store import Store, stored
from bench.results import Row

RESTARTS = 20  # of the process of one part, each after the end of another


def measure_part(part: str, folder: Path, origin: Row, deadline: Deadline, full: bool) -> Store:
    """Runs processes that measure the part, a new one where one broke, and gives all rows that there are."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "bench.gpu.measure", part, "--folder", str(folder)]
    command += ["--until", str(deadline.last_begin), *(["--full"] if full else [])]
    for _ in range(RESTARTS):
        code = run(command, deadline.left(), {"PYTHONUNBUFFERED": "1"})
        if code in (0, None, OUT_OF_TIME):
            break
        if code != DEVICE_LOST and not blame(part, folder, origin, f"the process ended with {code}", full):
            break
    if code is None:
        blame(part, folder, origin, "not over", full, least_seconds=deadline.seconds / 2)
    return stored(folder, origin)


def blame(part: str, folder: Path, origin: Row, reason: str, full: bool, least_seconds: float = 0) -> bool:
    """Marks the case that a process was at when it ended as failed, or the next one would end the same way.

    False if none was begun. A case that had less than `least_seconds` is not to blame.
    """
    path = folder / "begun.json"
    if not path.exists():
        return False
    begun = json.loads(path.read_text())
    path.unlink()
    seconds = time.time() - begun["time"]
    if seconds >= least_seconds:
        store = stored(folder, origin)
        for case in PARTS[part](full):
            if case.title == begun["title"]:
                append_failure(store, case, None, f"{reason} after {seconds:.0f} s")
    return True


def unmeasured(part: str, store: Store, full: bool) -> Iterator[str]:
    """Case and kinds of calls that have no rows yet."""
    for case in PARTS[part](full):
        kinds = [kind for kind in case.kinds if any(store.lacks(case, kind, name) for name in case.providers)]
        if kinds:
            yield f"{case.title}: {', '.join(kinds)}"


def without_times(part: str, store: Store, full: bool) -> Iterator[Row]:
    """hsv's rows of the part that hold no time, the reason in them."""
    operations = {case.operation for case in PARTS[part](full)}
    for row in store.rows.values():
        if row["operation"] in operations and str(row["provider"]).startswith("hsv") and row["status"] != "ok":
            yield row
