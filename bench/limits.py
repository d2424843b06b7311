"""What the machine can do at most, measured between the rounds of the providers, and the least time it allows."""

import torch

from bench.cases import DEVICE, THREADS, Work
from hsv_kernels.backends import compiled_module

# The counted cost of an exponential, in flops of the multiply-add units: three additions, six multiply-adds and one
# multiplication of a vector (csrc/cpu/simd.h), each in the place of a multiply-add, which is two flops.
EXPONENTIAL = 20

ARITHMETIC_SECONDS, COPY_SECONDS = 0.01, 0.04
COPIED_BYTES = 128 << 20


class Probe:
    """Measures the rates that bound `work`: {"fma", "dot", "exponentials"} or {"copy"}, in flops, 2^x and bytes / s.

    "dot" is the rate of bfloat16 products, where the CPU has them. Empty without compiled kernels; a GPU's rates are
    measured once (bench.gpu.rates).
    """

    def __init__(self, work: Work) -> None:
        self.copies = work.bytes > 0
        self.arrays = [torch.zeros(COPIED_BYTES, dtype=torch.uint8) for _ in range(2 * self.copies)]

    def __call__(self) -> dict[str, float]:
        if DEVICE != "cpu":
            return {}
        module = compiled_module()
        if isinstance(module, str):
            return {}
        if self.copies:
            to, source = (array.data_ptr() for array in self.arrays)
            return {"copy": module.limits_copy(to, source, COPIED_BYTES, COPY_SECONDS, THREADS)}
        return {
            "fma": module.limits_fma(ARITHMETIC_SECONDS, THREADS),
            "dot": module.limits_dot_bf16(ARITHMETIC_SECONDS, THREADS),
            "exponentials": module.limits_exponentials(ARITHMETIC_SECONDS / 4, THREADS),
        }


def least_seconds(work: Work, products: str, rates: dict[str, float], *, exponentials: bool = True) -> float | None:
    """The time that `rates` allow for `work`, with its exponentials or without; None where a rate is unknown.

    The multiply-add units of a CPU compute exponentials too, and the times add up. A GPU has other units for them,
    beside those of its products: the longer time counts.
    """
    if work.bytes:
        return work.bytes / rates["copy"] if rates.get("copy") else None
    if DEVICE != "cpu":
        return _least_on_gpu(work, products, rates, exponentials)
    if not rates.get("fma"):
        return None
    matrix = (products == "bfloat16" and rates.get("dot")) or rates["fma"]
    counted = work.exponentials * EXPONENTIAL if exponentials else 0
    return work.flops / matrix + counted / rates["fma"]


def _least_on_gpu(work: Work, products: str, rates: dict[str, float], exponentials: bool) -> float | None:
    """By the rates that bench.gpu.rates measures; float32 products may also be three tf32 ones each."""
    if products not in rates or "exponentials" not in rates:
        return None
    matrix = max(rates["float32"], rates["tf32"] / 3) if products == "float32" else rates[products]
    return max(work.flops / matrix, work.exponentials / rates["exponentials"] if exponentials else 0)
