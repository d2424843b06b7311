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
    "LN2",
    "LOG2E",
    "Architecture",
    "Configuration",
    "architecture_of",
    "device_name_of",
    "dot",
    "dot_precision",
    "exact_precision",
    "processors_of",
    "round_to",
    "triton_type",
]

#: A device's instruction set as Triton names it: 90 for sm_90, "gfx942" for AMD's; 0 is none of them.
Architecture = int | str

#: True under Triton's interpreter, which multiplies bfloat16 bit patterns and truncates where hardware rounds.
INTERPRETED = tl.constexpr(interpreting())

#: 2^(x · LOG2E) is exp(x), and log2(x) · LN2 its logarithm.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


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
    if interpreting():
        return 0
    properties = _properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return 10 * properties.major + properties.minor


def processors_of(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; 2 under the interpreter, whose programs run one after another."""
    return 2 if interpreting() else _properties(tensor.device).multi_processor_count


def device_name_of(tensor: Tensor) -> str:
    """The name of the tensor's device; empty under the interpreter."""
    return "" if interpreting() else _properties(tensor.device).name


@functools.cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def exact_precision(architecture: Architecture) -> str:
    """How tl.dot multiplies float32 without loss: AMD's matrix instructions take it, NVIDIA's take TF32 three times."""
    return "ieee" if isinstance(architecture, str) else "tf32x3"


def dot_precision(tensor: Tensor) -> str:
    """How tl.dot multiplies float32 on the tensor's device: without loss at matmul precision "highest", the default.

    Below it NVIDIA's matrix instructions take TF32 once.
    """
    exact = exact_precision(architecture_of(tensor))
    return exact if exact == "ieee" or torch.get_float32_matmul_precision() == "highest" else "tf32"


def triton_type(dtype: torch.dtype) -> str:
    """Triton's short name of a dtype, as in a kernel's signature."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}[dtype]
