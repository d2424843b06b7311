"""Compiles a Triton kernel for a GPU that need not be there, and reads what the binary asks of one."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from hsv_kernels.ops.triton_utils import Architecture, Configuration
from tests.aot.sass import instructions_per_exponential

__all__ = ["LIMITS", "Limits", "Resources", "compile_for"]

MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma")

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Limits(NamedTuple):
    """What an architecture has for one block: bytes of shared memory and columns of tensor memory."""

    shared: int
    tensor_memory: int = 0


LIMITS: dict[Architecture, Limits] = {
    80: Limits(166_912),
    86: Limits(101_376),
    89: Limits(101_376),
    90: Limits(232_448),
    100: Limits(232_448, tensor_memory=512),
    120: Limits(101_376),
    "gfx942": Limits(65_536),
}


class Resources(NamedTuple):
    """What a compiled kernel uses.

    registers of a thread, bytes of its stack, bytes of shared memory, columns of tensor memory; whether there are
    matrix instructions, and traps, which the compiler leaves where it gave up; and, where matrix instructions are
    wanted and the architecture is NVIDIA's, instructions per exponential of the loop around them, None without one.
    """

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    matrix: bool
    traps: bool
    instructions_per_exponential: float | None


def compile_for(architecture: Architecture, configuration: Configuration) -> Resources:
    """Compiles with pointers aligned to 16 bytes, as torch allocates them.

    Triton keeps what it compiled in TRITON_CACHE_DIR, so that an unchanged kernel is not compiled again.
    """
    kernel = configuration.kernel
    names = [parameter.name for parameter in kernel.params]
    given = {**configuration.signature, **configuration.constexprs}
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"configuration of {kernel.__name__} lacks {', '.join(missing)}")
    pointers = [i for i, name in enumerate(names) if configuration.signature.get(name, "").startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={name: configuration.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in configuration.constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )
    options: dict[str, Any] = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if configuration.registers:
        options["maxnreg"] = configuration.registers
    if isinstance(architecture, str):
        return read_amd(triton.compile(source, target=GPUTarget("hip", architecture, 64), options=options))
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return read_nvidia(compiled, configuration.matrix)


def read_nvidia(compiled: CompiledKernel, disassemble: bool) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = tool("nvdisasm", "--print-code", cubin.name) if disassemble else ""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    ptx = compiled.asm["ptx"]
    return Resources(
        registers=int(registers),
        stack=int(stack),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        matrix=any(instruction in ptx for instruction in MATRIX_INSTRUCTIONS),
        traps=bool(re.search(r"^\s*trap;", ptx, re.MULTILINE)),
        instructions_per_exponential=instructions_per_exponential(sass),
    )


def tool(name: str, *arguments: str) -> str:
    """What one of the tools that come with Triton prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def read_amd(compiled: CompiledKernel) -> Resources:
    assembly = compiled.asm["amdgcn"]
    return Resources(
        registers=int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        stack=int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1]),
        shared=compiled.metadata.shared,
        tensor_memory=0,
        matrix=any(instruction in assembly for instruction in MATRIX_INSTRUCTIONS),
        traps=bool(re.search(r"^\s*s_trap\b", assembly, re.MULTILINE)),
        instructions_per_exponential=None,
    )
