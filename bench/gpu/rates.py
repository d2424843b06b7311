"""What the device can do at most: matrix products of each type, exponentials, copies of its memory."""

import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bench.clock import between, mark

PRODUCT = 8192  # rows, columns and depth of a matrix product
COPIED_BYTES = 4 << 30
PROGRAMS, VALUES, STEPS = 1 << 14, 2048, 512  # exponentials one after the other in STEPS, the others side by side


@triton.jit
def exponentials_kernel(p_x, STEPS: tl.constexpr, VALUES: tl.constexpr):
    """x ← 2^−x, STEPS times; it stays in (0, 1)."""
    o_x = tl.program_id(0).to(tl.int64) * VALUES + tl.arange(0, VALUES)
    b_x = tl.load(p_x + o_x)
    for _i in range(STEPS // 8):
        for _j in tl.static_range(8):
            b_x = tl.exp2(-b_x)
    tl.store(p_x + o_x, b_x)


def device_rates() -> dict[str, float]:
    """A second: "bfloat16", "tf32", "float32" in flops, "exponentials" in 2^x, "copy" in bytes read plus written.

    Medians of ten, on random numbers, after a warm-up.
    """
    rates = {name: _products(*settings) for name, settings in _PRODUCTS.items()}
    x = torch.rand(PROGRAMS * VALUES, device="cuda")
    launch = lambda: exponentials_kernel[(PROGRAMS,)](x, STEPS=STEPS, VALUES=VALUES, num_warps=4)  # noqa: E731
    rates["exponentials"] = PROGRAMS * VALUES * STEPS / _median_seconds(launch)
    rates["copy"] = _copy()
    torch.cuda.empty_cache()
    return rates


_PRODUCTS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def _products(dtype: torch.dtype, precision: str) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        a, b = torch.randn(2, PRODUCT, PRODUCT, device="cuda", dtype=dtype)
        out = torch.empty_like(a)
        return 2 * PRODUCT**3 / _median_seconds(lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)


def _copy() -> float:
    size = min(COPIED_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    to = torch.empty_like(source)
    return 2 * size / _median_seconds(lambda: to.copy_(source))


def _median_seconds(function: Callable[[], object]) -> float:
    for _ in range(3):
        function()
    seconds = []
    for _ in range(10):
        begin = mark()
        function()
        seconds.append(between(begin, mark()))
    return statistics.median(seconds)
