"""Every Triton kernel that ships compiles for sm_80, sm_90 and sm_100, and fits there."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from hsv_kernels.backends import OPERATIONS, interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

from hsv_kernels.ops.triton_utils import Configuration
from tests.aot.compile import MATRIX_INSTRUCTIONS, compile_for

#: Bytes of shared memory that a block may have.
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_COLUMNS = 512
ARCHITECTURES = tuple(SHARED_MEMORY)


def shipped() -> Iterator[tuple[str, Configuration]]:
    """(operation, configuration) of every operation that has Triton kernels."""
    for operation in OPERATIONS:
        module = importlib.import_module(f"hsv_kernels.ops.{operation}.triton_kernels")
        for configuration in module.configurations():
            yield operation, configuration


def name_of(operation: str, configuration: Configuration) -> str:
    types = [kind.removeprefix("*") for kind in configuration.signature.values() if kind.startswith("*")]
    sizes = [f"{name}={value}" for name, value in configuration.constexprs.items() if name.isupper()]
    return "-".join([operation, configuration.kernel.__name__, "/".join(dict.fromkeys(types)), ",".join(sizes)])


SHIPPED = [
    pytest.param(architecture, configuration, id=f"sm_{architecture}-{name_of(operation, configuration)}")
    for operation, configuration in shipped()
    for architecture in configuration.architectures
]


@pytest.mark.parametrize(("architecture", "configuration"), SHIPPED)
def test_compiles_and_fits(architecture: int, configuration: Configuration, tmp_path: Path) -> None:
    used = compile_for(architecture, configuration, tmp_path)
    assert used.stack == 0, f"{used.stack} bytes of stack: registers are spilled"
    assert used.shared <= SHARED_MEMORY[architecture]
    assert used.tensor_memory <= TENSOR_MEMORY_COLUMNS
    assert not re.search(r"^\s*trap;", used.ptx, re.MULTILINE), "the compiler gave up: the kernel traps"
    if configuration.matrix:
        assert any(instruction in used.ptx for instruction in MATRIX_INSTRUCTIONS)


def test_every_operation_ships_every_architecture() -> None:
    for operation in OPERATIONS:
        built = {arch for name, configuration in shipped() if name == operation for arch in configuration.architectures}
        assert built == set(ARCHITECTURES), f"{operation} ships for {sorted(built)}"
