"""What `make gpu` can do without a GPU: small sizes under Triton's interpreter, and plain words about the rest."""

import sys
import tempfile
from pathlib import Path

from bench.gpu.build import build
from bench.gpu.child import Deadline, run
from bench.gpu.store import whole_lines
from bench.gpu.suite import run_tests

ENVIRONMENT = {
    "HSV_BENCH_DEVICE": "cpu",
    "HSV_BENCH_QUICK": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
NOT_RUN = {
    "test": "every test of tests/gpu, and tests/kernels on the device (make test has them under the interpreter)",
    "contrast": "times, rates of the device, CUDA graphs, peak memory, torch.compile, other libraries",
    "memory-bound": "times, CUDA graphs, peak memory, torch.compile, and the kernels in CUDA C++",
    "end-to-end": "times; ViT-S/16 at a batch of 256 (ViT-Tiny/16 at 2 stands in)",
}


def rehearse(parts: list[str], seconds: float) -> bool:
    """Goes through the parts on the CPU, and says whether nothing failed. What is measured is thrown away."""
    print("torch sees no CUDA device: a rehearsal on the CPU, whose times mean nothing and are not kept", flush=True)
    good = []
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            print(f"\n== {part}, rehearsed", flush=True)
            rehearsed = _tests if part == "test" else _benchmark
            said, fine = rehearsed(part, Path(folder, part), Deadline(seconds))
            print(f"{said}\nnot run for want of a GPU: {NOT_RUN[part]}", flush=True)
            good.append(fine)
    print("\nNothing was measured: run this on a machine with a GPU.")
    return all(good)


def _tests(part: str, folder: Path, deadline: Deadline) -> tuple[str, bool]:
    notes = build(deadline.left())
    tested = run_tests(folder, deadline, {"tests/gpu": False})
    reasons = {str(one["reason"]) for one in tested.outcomes.values() if one["outcome"] == "skipped"}
    notes += [*tested.notes, f"tests/gpu: {tested.count('skipped')} skipped: {'; '.join(sorted(reasons))}"]
    return "\n".join(notes), not tested.count("failed")


def _benchmark(part: str, folder: Path, deadline: Deadline) -> tuple[str, bool]:
    """Measures twice, to see that the second time nothing is measured again."""
    folder.mkdir()
    lines = folder / "rows.jsonl"
    command = [sys.executable, "-m", "bench.gpu.measure", part, "--folder", str(folder)]
    command += ["--until", str(deadline.last_begin)]
    codes, counts = [], []
    for _ in range(2):
        codes.append(run(command, deadline.left(), ENVIRONMENT))
        counts.append(len(whole_lines(lines)))
    rows = whole_lines(lines)
    bad = [f"{row['operation']}, {row['mode']}, {row['provider']}: {row['reason']}" for row in rows if row["reason"]]
    again = counts[1] - counts[0]
    fine = codes == [0, 0] and not again and all(row["status"] != "failed" for row in rows)
    return "\n".join([f"{len(rows)} rows, {again} of them measured twice; exit codes {codes}", *bad]), fine
