"""Train the hybrid on scikit-learn's handwritten digits, without labels, and show what it learned (`make demo`)."""

from __future__ import annotations

import argparse
import os
import shlex
import time
from pathlib import Path

import hsv


def main(arguments: list[str] | None = None) -> int:
    """Train, evaluate, write the report; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", help="folder of the run; unset = runs/digits-TIME")
    parser.add_argument("--seed", type=int, default=0, help="of weights, views and masks")
    parser.add_argument("--steps", type=int, help="optimiser steps; unset = those of the preset")
    options = parser.parse_args(arguments)

    hsv.share_processors()
    from hsv.evaluate import evaluate, format_table
    from hsv.report import write_report

    config = hsv.load_config(preset="digits")
    config.output, config.run.seed = options.output, options.seed
    config.run.steps = options.steps or config.run.steps
    print("Training simclr + mae on 1,437 handwritten digits of 8 × 8 pixels, without their labels.")
    start = time.perf_counter()
    run = hsv.pretrain(config)
    seconds = time.perf_counter() - start
    if run.stopped_by:
        print(f"Stopped; go on with: hsv pretrain --resume {shlex.quote(str(run.run_dir))}")
        return 128 + run.stopped_by

    result = evaluate(run.checkpoint, "digits")
    report = write_report(run.run_dir)
    untrained, trained = result["rows"][1]["knn"], result["rows"][2]["knn"]
    print(f"\nAccuracy in per cent\n\n{format_table(result)}\n\n{result['note']}")
    print(f"Training took the 20-NN accuracy of the encoder from {100 * untrained:.1f} % to {100 * trained:.1f} %.\n")
    print(f"images/s    {run.images_per_second:,.0f} ({seconds:.0f} s of training on {os.cpu_count()} cores)")
    print(f"checkpoint  {_shown(run.checkpoint)}")
    print(f"report      {_shown(report)}")
    return 0


def _shown(path: Path) -> Path:
    """Relative to where the demo was started, if it lies below."""
    path, here = path.resolve(), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    raise SystemExit(main())
