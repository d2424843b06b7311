"""Runs all benchmarks, once as they are and once with huge pages for all, and writes results and page.

    python -m bench [--quick] [--only contrast]

Each setting is a process of its own. What was measured is kept when something fails; then the exit code is not 0.
--quick runs small shapes to see that everything works: its rows are printed and not kept.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import page, results

SETTINGS = {"as they are": "0", "huge pages for all": "1"}  # THP_MEM_ALLOC_ENABLE, which torch reads


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds, nothing is kept")
    parser.add_argument("--only", default="", help="an operation: contrast, masking, reconstruction or step")
    options = parser.parse_args()
    files = (
        [f"bench/bench_{options.only}.py"]
        if options.only
        else sorted(str(path.relative_to(results.ROOT)) for path in results.ROOT.glob("bench/bench_*.py"))
    )

    failed, rows = False, []
    with tempfile.TemporaryDirectory() as folder:
        memory = Path(folder, "memory.json")  # of the first setting, for both
        for name, value in SETTINGS.items():
            lines = Path(folder, f"rows-{value}")
            print(f"\nProviders with memory pages: {name}", flush=True)
            environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": value, "HSV_BENCH_QUICK": str(int(options.quick))}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "--benchmark-only"]
            command += ["--benchmark-columns=min,median,iqr,rounds", f"--rows={lines}", f"--memory={memory}"]
            failed |= subprocess.run(command, cwd=results.ROOT, env=environment).returncode != 0
            rows += results.read_lines(lines)
    if rows and not options.quick:
        print(results.write(rows))
        page.main()
    return int(failed or not rows)


if __name__ == "__main__":
    sys.exit(main())
