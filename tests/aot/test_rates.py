"""The kernel that measures a device's rate of exponentials does nothing else in its loop."""

import re

import pytest

from hsv_kernels.backends import interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

from bench.gpu.rates import STEPS, VALUES, exponentials_kernel
from hsv_kernels.ops.triton_utils import Configuration
from tests.aot.compile import compile_for

WARPS = 4


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_exponentials_alone(architecture: int) -> None:
    constants = {"STEPS": STEPS, "VALUES": VALUES}
    used = compile_for(architecture, Configuration(exponentials_kernel, {"p_x": "*fp32"}, constants, WARPS, 3))
    exponentials = len(re.findall(r"\bex2\.approx", used.ptx))
    assert exponentials == 8 * VALUES // (32 * WARPS)  # eight steps in the loop's body
    assert len(re.findall(r"\bmul\.f32|\bsetp\.\w+\.f32", used.ptx)) == 0, "exponentials are scaled"
    assert used.stack == 0
