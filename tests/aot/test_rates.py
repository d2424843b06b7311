"""The kernel that measures a device's rate of exponentials does nothing else in its loop."""

import re

import pytest

from hsv_kernels.backends import interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu.rates import STEPS, VALUES, exponentials_kernel

WARPS = 4


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_exponentials_alone(architecture: int) -> None:
    signature = {"p_x": "*fp32", "STEPS": "constexpr", "VALUES": "constexpr"}
    source = ASTSource(exponentials_kernel, signature, constexprs={(1,): STEPS, (2,): VALUES})
    ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": WARPS}).asm["ptx"]
    exponentials = len(re.findall(r"\bex2\.approx", ptx))
    assert exponentials == 8 * VALUES // (32 * WARPS)  # eight steps in the loop's body
    assert not re.search(r"\bmul\.f32|\bsetp\.\w+\.f32|\bst\.local", ptx), "more than exponentials and signs"
