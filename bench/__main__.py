"""Runs all benchmarks of the CPU, once as they are and once with huge pages for all, and writes results and page.

    python -m bench [--quick] [--only contrast]

Each setting of each operation is a process of its own. What was measured is kept when something fails; then the exit
code is not 0. --quick runs small shapes to see that everything works.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from bench import page, results
from bench.paths import ROOT

NAMES = ["contrast", "cosine", "distillation", "masking", "reconstruction", "teacher", "step"]  # of bench_<name>.py
SETTINGS = {"as it is": "0", "huge pages for all": "1"}  # of THP_MEM_ALLOC_ENABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds, nothing is kept")
    parser.add_argument("--only", choices=NAMES, help="one file of benchmarks; nothing is kept")
    options = parser.parse_args()
    names = [options.only] if options.only else NAMES

    failed, rows, begin = [], [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for (setting, value), name in product(SETTINGS.items(), names):
            print(f"\n{name}, pages of memory: {setting} ({time.monotonic() - begin:.0f} s so far)", flush=True)
            lines = Path(folder, f"{name}-{value}")
            memory = Path(folder, f"memory-{name}")  # from the first setting, for both
            environment = {**os.environ, "PYTHONUNBUFFERED": "1", "THP_MEM_ALLOC_ENABLE": value}
            environment["HSV_BENCH_QUICK"] = str(int(options.quick))
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"bench/bench_{name}.py"]
            command += ["--benchmark-only", "--benchmark-columns=min,median,iqr,rounds"]
            command += [f"--rows={lines}", f"--memory={memory}"]
            if subprocess.run(command, cwd=ROOT, env=environment).returncode:
                failed.append(f"{name}, pages of memory: {setting}")
            rows += results.read_lines(lines)
    if rows and not options.quick and not options.only:
        print(results.write(rows))
        page.main()
    print("\n".join(f"failed, see above: {what}" for what in failed))
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main())
