"""Compiles a Triton kernel for a GPU that need not be there, and reads what the binary asks of one."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hsv_kernels.ops.triton_utils import Configuration

__all__ = ["MATRIX_INSTRUCTIONS", "Resources", "compile_for"]

MATRIX_INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Resources(NamedTuple):
    """What one compiled kernel uses: registers of a thread, bytes of stack and shared memory, tensor memory columns."""

    registers: int
    stack: int
    shared: int
    tensor_memory: int
    ptx: str


def compile_for(architecture: int, configuration: Configuration, folder: Path) -> Resources:
    """Compiles for sm_<architecture>, pointers aligned to 16 bytes as torch allocates them; `folder` takes the binary.

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
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Resources(
        registers=int(registers),
        stack=int(stack),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        ptx=compiled.asm["ptx"],
    )
