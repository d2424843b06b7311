"""The part `test`: the GPU's own tests one by one, then the kernel tests with the backends of the GPU."""

import importlib.util
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from bench import results
from bench.gpu.child import DEVICE_LOST, Deadline, run
from bench.gpu.store import SOURCES, Store, fingerprint, stored

GROUPS = {"tests/gpu": False, "tests/kernels": True}  # whether several tests may run side by side
MOST_SIDE_BY_SIDE = 8


@dataclass
class Tested:
    """Outcomes of this call and of earlier ones, by test; `not_reached` counts the tests that are left."""

    outcomes: dict[str, dict] = field(default_factory=dict)
    not_reached: int = 0
    notes: list[str] = field(default_factory=list)

    def count(self, outcome: str) -> int:
        return sum(one["outcome"] == outcome for one in self.outcomes.values())


def run_tests(folder: Path, deadline: Deadline, groups: dict[str, bool] = GROUPS) -> Tested:
    """Runs what has not passed yet and keeps each outcome in folder/tests.jsonl."""
    tested = Tested()
    for module in ("pytest", "numpy"):
        if importlib.util.find_spec(module) is None:
            tested.notes.append(f"{module} is not installed: no test runs")
            return tested
    origin = results.origin() | {"code": fingerprint((*SOURCES, "tests"))}
    store = stored(folder, origin, "tests.jsonl")
    for group, side_by_side in groups.items():
        _run_group(group, side_by_side, store, deadline, tested)
    tested.outcomes = {str(row["test"]): row for row in store.rows.values()}
    return tested


def _run_group(group: str, side_by_side: bool, store: Store, deadline: Deadline, tested: Tested) -> None:
    """Processes of pytest, a new one for what is left where a test broke the device."""
    passed = [str(row["test"]) for row in store.rows.values() if row["outcome"] == "passed"]
    found: dict[str, dict] = {}
    code, wanted, reached = DEVICE_LOST, 0, -1
    while code == DEVICE_LOST and len(found) > reached:
        reached = len(found)
        code, number, lines = _run_pytest(group, side_by_side, [*passed, *found], deadline)
        wanted = wanted or number
        for line in lines:
            about = {"operation": line["test"], "shape": {}, "products": "", "mode": "test", "provider": "hsv"}
            store.append(about | line)
            found[str(line["test"])] = line
    left = max(0, wanted - len(found))
    tested.not_reached += left
    if code is None:
        tested.notes.append(f"{group}: ended by the deadline, {left} tests not reached")
    elif code not in (0, 1, 5):
        tested.notes.append(f"{group}: pytest ended with {code}")


def _run_pytest(
    group: str, side_by_side: bool, left_out: list[str], deadline: Deadline
) -> tuple[int | None, int, list[dict]]:
    """Exit code, number of tests that were to run, and the outcomes as they came."""
    with tempfile.TemporaryDirectory() as temporary:
        lines, names = Path(temporary, "outcomes.jsonl"), Path(temporary, "left-out")
        names.write_text("\n".join(left_out))
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu.outcomes", group]
        if side_by_side and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(MOST_SIDE_BY_SIDE, os.cpu_count() or 1))]
        environment = {"HSV_OUTCOMES": str(lines), "HSV_LEFT_OUT": str(names), "HSV_TEST_DEVICE": "cuda"}
        code = run(command, deadline.left(), environment)
        expected = lines.with_suffix(".expected")
        number = int(expected.read_text()) if expected.exists() else 0
        return code, number, [line for line in results.read_lines(lines) if line["test"]]
