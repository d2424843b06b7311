"""Proves the GPU kernels and measures them, a part of at most nine minutes each.

    python -m bench.gpu [--part test|contrast|memory-bound|end-to-end] [--full] [--results FOLDER] [--seconds 525]

Every row is on the disk as soon as it is measured; the next call goes on with what is left. Exit codes: 0 all parts
are complete, 1 a test or one of hsv's measurements failed, 3 something is left for the next call, 4 there is no GPU and
this was a rehearsal in which nothing failed.
"""

import argparse
import signal
import sys
from pathlib import Path

import torch

from bench import page, results
from bench.gpu.build import build
from bench.gpu.cases import PARTS
from bench.gpu.child import PART_SECONDS, Deadline
from bench.gpu.parts import measure_part, unmeasured, without_times
from bench.gpu.rehearsal import rehearse
from bench.gpu.store import fingerprint, stored
from bench.gpu.suite import Tested, run_tests
from bench.paths import RESULTS, ROOT
from bench.results import Row
from bench.tables import shape

COMPLETE, FAILED, LEFT, REHEARSED = 0, 1, 3, 4
ENDED = 128 + signal.SIGTERM
FAILURES = ("failed", "out of memory")  # of hsv; what is not installed or not served is said, and is none
BUILT = ("test", "memory-bound")  # the parts that use the compiled kernels


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(ENDED))  # and with it whatever bench.gpu.child has started
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=["test", *PARTS], help="one part alone; all of them otherwise")
    parser.add_argument("--full", action="store_true", help="every dimension, and float32")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for rows and page; default bench/results")
    parser.add_argument("--seconds", type=float, default=PART_SECONDS, help="of one part, at most")
    options = parser.parse_args()
    parts = [options.part] if options.part else ["test", *PARTS]
    if not torch.cuda.is_available():
        return REHEARSED if rehearse(parts, options.seconds) else FAILED

    origin = results.origin() | {"code": fingerprint()}
    folder = results.folder_of(origin, options.results.resolve())
    statuses = []
    for part in parts:
        deadline = Deadline(options.seconds)
        print(f"\n== {part}: {origin['device']}, at most {options.seconds:.0f} s", flush=True)
        notes = build(deadline.left()) if part in BUILT else []
        print("\n".join(notes), flush=True)
        if part == "test":
            statuses.append(report_tests(run_tests(folder, deadline)))
        else:
            statuses.append(report_rows(part, folder, origin, deadline, options.full))
    write(folder, origin)
    return FAILED if FAILED in statuses else max(statuses)


def report_tests(tested: Tested) -> int:
    counts = ", ".join(f"{tested.count(outcome)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    print(f"\ntests: {counts}, {tested.not_reached} not reached")
    print("\n".join(tested.notes))
    print("\n".join(f"  failed: {name}" for name, one in tested.outcomes.items() if one["outcome"] == "failed"))
    if tested.count("failed") or not tested.outcomes:
        return FAILED
    return LEFT if tested.not_reached or tested.notes else COMPLETE


def report_rows(part: str, folder: Path, origin: Row, deadline: Deadline, full: bool) -> int:
    store = measure_part(part, folder, origin, deadline, full)
    left, empty = list(unmeasured(part, store, full)), list(without_times(part, store, full))
    print(f"\n{part}: {len(store.rows)} rows in {folder}")
    for row in empty:
        print(f"  {row['status']}: {row['operation']}, {shape(row)}, {row['mode']}, {row['provider']}: {row['reason']}")
    print("\n".join(f"  not reached: {what}" for what in left))
    return FAILED if any(row["status"] in FAILURES for row in empty) else LEFT if left else COMPLETE


def write(folder: Path, origin: Row) -> None:
    """The rows as an array and, where they lie among the committed results, docs/speed.md."""
    store = stored(folder, origin)
    if not store.rows:
        return
    rows = sorted(store.rows.values(), key=lambda row: str(row["date"]))
    print(results.write(rows, folder.parent))
    if folder.parent == RESULTS:
        page.main()
    else:
        print(f"in {RESULTS.relative_to(ROOT)} `python -m bench.page` makes docs/speed.md of it")
