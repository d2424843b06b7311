"""python -m bench.gpu: see bench.gpu.command."""

import os
import sys

import torch

os.environ.setdefault("HSV_BENCH_DEVICE", "cuda" if torch.cuda.is_available() else "cpu")

from bench.gpu.command import main  # after the device is set, which bench.cases reads once

if __name__ == "__main__":
    sys.exit(main())
