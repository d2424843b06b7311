"""compute-sanitizer over the kernels in CUDA C++: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest

from hsv_kernels.backends import compiled_module
from tests.gpu.sanitized import FINISHED

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer was not found")
@pytest.mark.skipif(not getattr(compiled_module(), "has_cuda", False), reason="built without csrc/cuda")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_cuda_kernels_under(tool: str) -> None:
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "tests.gpu.sanitized"]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or torch's pool hides what is out of bounds
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    output = ran.stdout + ran.stderr
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer does not support this device")
    assert ran.returncode == 0 and FINISHED in output, output[-4000:]
