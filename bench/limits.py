"""What the machine can do at most, measured between the rounds of the providers, and the least time it allows."""

import torch

from bench.cases import DEVICE, THREADS, Work
from bench.clock import between, mark
from hsv_kernels.backends import compiled_module

# The counted cost of an exponential, in flops of the multiply-add units: three additions, six multiply-adds and one
# multiplication of a vector (csrc/cpu/simd.h), each in the place of a multiply-add, which is two flops.
EXPONENTIAL = 20

ARITHMETIC_SECONDS, COPY_SECONDS = 0.01, 0.04
COPIED_BYTES = 128 << 20


class Probe:
    """Measures the rates that bound `work`: {"fma", "dot", "exponentials"} or {"copy"}, in flops, 2^x and bytes / s.

    "dot" is the rate of bfloat16 products, where the device has them. Empty without compiled kernels on a CPU.
    """

    def __init__(self, work: Work) -> None:
        self.copies = work.bytes > 0
        self.arrays = [torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2 * self.copies)]

    def __call__(self) -> dict[str, float]:
        if DEVICE == "cpu":
            return self._cpu()
        return {"copy": self._gpu_copy()} if self.copies else self._gpu_products()

    def _cpu(self) -> dict[str, float]:
        module = compiled_module()
        if isinstance(module, str):
            return {}
        if self.copies:
            to, source = (array.data_ptr() for array in self.arrays)
            return {"copy": module.limit_copy(to, source, COPIED_BYTES, COPY_SECONDS, THREADS)}
        return {
            "fma": module.limit_fma(ARITHMETIC_SECONDS, THREADS),
            "dot": module.limit_dot_bf16(ARITHMETIC_SECONDS, THREADS),
            "exponentials": module.limit_exponentials(ARITHMETIC_SECONDS / 4, THREADS),
        }

    def _gpu_copy(self) -> float:
        begin = mark()
        self.arrays[0].copy_(self.arrays[1])
        return 2 * COPIED_BYTES / between(begin, mark())

    def _gpu_products(self) -> dict[str, float]:
        rates = {}
        for name, dtype in (("fma", torch.float32), ("dot", torch.bfloat16)):
            a = torch.randn(4096, 4096, device=DEVICE, dtype=dtype)
            begin = mark()
            a @ a
            rates[name] = 2 * 4096**3 / between(begin, mark())
        return rates


def least_seconds(work: Work, products: str, rates: dict[str, float], *, exponentials: bool = True) -> float | None:
    """The time that `rates` allow for `work`, with its exponentials or without; None where a rate is unknown.

    Exponentials count on a CPU, whose multiply-add units compute them: a GPU has others for them, beside its products.
    """
    if work.bytes:
        return work.bytes / rates["copy"] if rates.get("copy") else None
    if not rates.get("fma"):
        return None
    matrix = (products == "bfloat16" and rates.get("dot")) or rates["fma"]
    counted = work.exponentials * EXPONENTIAL if exponentials and DEVICE == "cpu" else 0
    return work.flops / matrix + counted / rates["fma"]
