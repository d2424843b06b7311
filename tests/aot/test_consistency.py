"""What forward and backward work out apart must come out alike on a device."""

import re

import pytest

from hsv_kernels.backends import interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from hsv_kernels.ops.contrast.triton_square_gradient import SPLIT_BLOCK
from tests.aot.shipped import shipped


def test_scale_is_rounded_as_torch_rounds() -> None:
    """1 / temperature of forward has the bits of backward's, or the two may differ on whether a fixed shift fits."""
    configuration = next(c for (_, kernel, *_), (_, c) in shipped().items() if kernel == "normalise_kernel")
    names = [parameter.name for parameter in configuration.kernel.params]
    source = ASTSource(
        fn=configuration.kernel,
        signature={name: configuration.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in configuration.constexprs.items()},
    )
    divisions = re.findall(r"\bdiv\.\w+|\brcp\.\w+", compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
    assert set(divisions) <= {"div.rn", "rcp.rn"} and divisions


def test_tiles_begin_where_rows_do() -> None:
    """The square kernels find a row's own columns in whole tiles of one split."""
    square = ("logsumexp_kernel", "online_kernel", "gradient_kernel")
    tiles = [
        (name[1], c.constexprs["BLOCK_M"], c.constexprs["BLOCK_N"])
        for name, (_, c) in shipped().items()
        if name[1] in square
    ]
    assert {kernel for kernel, *_ in tiles} == set(square)
    for kernel, rows, columns in tiles:
        if kernel == "gradient_kernel":
            assert SPLIT_BLOCK % rows == SPLIT_BLOCK % columns == 0, (rows, columns)
        else:
            assert columns % rows == 0, (kernel, rows, columns)
