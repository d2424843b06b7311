"""What the Triton kernels share: rounding and products that are right in the interpreter too, and their description."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.backends import interpreting

__all__ = [
    "INTERPRETED",
    "Architecture",
    "Configuration",
    "architecture_of",
    "dot",
    "dot_precision",
    "round_to",
    "triton_type",
]

#: A device's instruction set as Triton names it: 90 for sm_90, "gfx942" for AMD's; 0 is none of them.
Architecture = int | str

#: True under Triton's interpreter, which multiplies bfloat16 bit patterns and truncates where hardware rounds.
INTERPRETED = tl.constexpr(interpreting())


class Configuration(NamedTuple):
    """One specialisation that a launcher may choose; each operation lists its own for ahead-of-time compilation.

    signature names Triton's type of every run-time argument ("*bf16", "i64", "fp32"); constexprs holds the rest.
    matrix says that the compiled kernel must hold a matrix instruction; registers is the most that a thread may take,
    or 0 for what the compiler likes.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    architectures: tuple[Architecture, ...] = (80, 90, 100)
    matrix: bool = False
    registers: int = 0


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 block `x` rounded to `dtype`, to nearest and ties to even; NaN stays NaN."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with float32 accumulation."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def architecture_of(tensor: Tensor) -> Architecture:
    """The architecture of the tensor's device; 0 under the interpreter."""
    return 0 if interpreting() else _architecture(tensor.device)


@functools.cache
def _architecture(device: torch.device) -> Architecture:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def dot_precision() -> str:
    """How tl.dot multiplies float32: three TF32 products at matmul precision "highest" (torch's setting), else one.

    AMD's matrix instructions take float32 as it is.
    """
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def triton_type(dtype: torch.dtype) -> str:
    """Triton's short name of a dtype, as in a kernel's signature."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}[dtype]
