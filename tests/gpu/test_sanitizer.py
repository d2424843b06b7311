"""compute-sanitizer over the kernels in CUDA C++: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from hsv_kernels.backends import compiled_module
from tests.gpu.sanitized import FINISHED

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")

FAULT = 9  # the exit code that says so


def needs_sanitizer(test: Callable) -> Callable:
    built = getattr(compiled_module(), "has_cuda", False)
    test = pytest.mark.skipif(not built, reason="built without csrc/cuda")(test)
    return pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer was not found")(test)


@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_kernels_under(tool: str) -> None:
    status, output = sanitize(tool)
    assert status == 0 and FINISHED in output, output[-4000:]


@needs_sanitizer
def test_a_planted_read_out_of_bounds_is_found() -> None:
    status, output = sanitize("memcheck", "--planted")
    assert status == FAULT and "Invalid __global__ read" in output, output[-4000:]


def sanitize(tool: str, *arguments: str) -> tuple[int, str]:
    """Exit code and output; only hsv's own kernels are looked at, or torch's would take minutes."""
    command = [SANITIZER, "--tool", tool, "--kernel-name", "kns=hsv", "--error-exitcode", str(FAULT)]
    command += ["--report-api-errors", "no"]  # CUDA asks the driver for functions that may be absent; launches raise
    command += [sys.executable, "-m", "tests.gpu.sanitized", *arguments]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or torch's pool hides what is out of bounds
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    output = ran.stdout + ran.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    return ran.returncode, output
