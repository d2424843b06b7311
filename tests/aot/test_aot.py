"""Every Triton kernel that ships compiles for the architectures it ships for, fits there, and has not grown."""

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from hsv_kernels.backends import OPERATIONS, interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter cannot share a process with the compiler", allow_module_level=True)

import torch
import triton

from hsv_kernels.ops.contrast.triton_table import ARCHITECTURES, Kernel, Tiles, row_width, tiles_of
from hsv_kernels.ops.triton_utils import Architecture
from tests.aot import table
from tests.aot.compile import LIMITS, Resources
from tests.aot.sass import instructions_per_exponential
from tests.aot.shipped import Name, compiling, sample, shipped

VERSION, TABLE = table.read()

#: Bytes of stack that one version of Triton needs where the next has none.
SPILLED = 32

each = pytest.mark.parametrize(
    "name",
    [pytest.param(name, id=" ".join(name), marks=() if name in sample() else pytest.mark.slow) for name in shipped()],
)


@pytest.fixture(scope="session")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[Name, Future[Resources]]]:
    """What the selected kernels use, being compiled side by side while tests wait for one."""
    calls = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    with compiling(dict.fromkeys(call["name"] for call in calls if "name" in call)) as futures:
        yield futures


@each
def test_compiles_and_fits(name: Name, compiled: dict[Name, Future[Resources]]) -> None:
    architecture, configuration = shipped()[name]
    used = compiled[name].result()
    assert used.stack <= SPILLED, f"{used.stack} bytes of stack: registers are spilled"
    assert used.shared <= LIMITS[architecture].shared
    assert used.tensor_memory <= LIMITS[architecture].tensor_memory
    assert not used.traps, "the compiler gave up: the kernel traps"
    assert used.matrix or not configuration.matrix, "no matrix instruction"


@each
def test_has_not_grown(name: Name, compiled: dict[Name, Future[Resources]]) -> None:
    if triton.__version__ != VERSION:
        pytest.skip(f"docs/kernels/resources.md was made with triton {VERSION}")
    assert name in TABLE, "not in docs/kernels/resources.md; `make aot-table` writes it"
    grown = table.growth(TABLE[name], compiled[name].result())
    assert not grown, f"{'; '.join(grown)}; if that pays, `make aot-table` writes it down"


def test_the_table_lists_nothing_else() -> None:
    assert not TABLE.keys() - shipped().keys(), "no longer shipped; `make aot-table` writes the table anew"


def test_the_sample_has_every_configuration_and_every_architecture() -> None:
    assert {name[:3] for name in sample()} == {name[:3] for name in shipped()}
    assert {name[3] for name in sample()} == {name[3] for name in shipped()}


def test_every_operation_ships_every_architecture() -> None:
    for operation in OPERATIONS:
        built = {architecture for name, (architecture, _) in shipped().items() if name[0] == operation}
        assert built >= {80, 90, 100}, f"{operation} ships for {sorted(map(str, built))}"


def test_growth_is_told_beyond_what_hardware_rounds_to() -> None:
    used = Resources(121, 8, 1000, 64, True, False, 5.0)
    before = {"registers": 121, "stack": 8, "shared": 1000, "tensor_memory": 64, "instructions_per_exponential": 5.0}
    assert table.growth(before, used) == []
    assert table.growth(before, used._replace(registers=128, shared=1024, instructions_per_exponential=5.1)) == []
    assert table.growth(before, used._replace(registers=129)) == ["registers: 121 → 129"]
    assert table.growth(before, used._replace(stack=16)) == ["stack: 8 → 16"]
    assert table.growth(before, used._replace(shared=1025)) == ["shared: 1000 → 1025"]
    assert table.growth(before, used._replace(tensor_memory=65)) == ["tensor memory: 64 → 65"]
    assert table.growth(before, used._replace(instructions_per_exponential=5.2))


def test_the_table_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "PAGE", tmp_path / "resources.md")
    used = Resources(121, 0, 1000, 64, True, False, 5.25)
    rows = {
        ("contrast", "a_kernel", "bf16, BLOCK_M=64", "sm_90"): used,
        ("contrast", "b_kernel", "bf16, BLOCK_M=64", "gfx942"): used._replace(instructions_per_exponential=None),
    }
    table.write(rows)
    version, read = table.read()
    assert version == triton.__version__
    assert read.keys() == rows.keys()
    assert all(table.growth(read[name], rows[name]) == [] for name in rows)
    assert read["contrast", "a_kernel", "bf16, BLOCK_M=64", "sm_90"]["instructions_per_exponential"] == 5.25


def listing(*lines: str) -> str:
    """As nvdisasm prints labels and instructions."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


PRODUCT, EXPONENTIAL, ADD = "HMMA.16816.F32.BF16 R8, R4, R6, R8", "MUFU.EX2 R1, R1", "FADD R2, R2, R1"


@pytest.mark.parametrize(
    ("expected", "lines"),
    [
        pytest.param(None, [EXPONENTIAL, ADD, "EXIT"], id="no loop"),
        pytest.param(None, [".L_0:", EXPONENTIAL, ADD, "@P0 BRA `(.L_0)", "EXIT"], id="no product"),
        pytest.param(
            2.5, [".L_0:", PRODUCT, EXPONENTIAL, EXPONENTIAL, ADD, "@P0 BRA `(.L_0)", ADD, "EXIT"], id="one loop"
        ),
        pytest.param(
            2.0,
            [".L_0:", PRODUCT, EXPONENTIAL, ADD, ADD, "@P0 BRA `(.L_0)"]
            + [".L_1:", PRODUCT, EXPONENTIAL, EXPONENTIAL, "@P0 BRA `(.L_1)", "EXIT"],
            id="the quicker of two",
        ),
        pytest.param(
            6.0,
            [".L_0:", ADD, ".L_1:", PRODUCT, "@P1 BRA `(.L_1)", EXPONENTIAL, ADD, "@P0 BRA `(.L_0)", "EXIT"],
            id="chunks of D inside",
        ),
        pytest.param(
            3.0,
            [".L_0:", ADD, ".L_1:", PRODUCT, EXPONENTIAL, "@P1 BRA `(.L_1)", EXPONENTIAL, "@P0 BRA `(.L_0)", "EXIT"],
            id="splits of columns outside",
        ),
        pytest.param(
            6.0,
            [".L_0:", "@!P1 BRA `(.L_2)", ".L_1:", PRODUCT, EXPONENTIAL, "@P0 BRA `(.L_0)", *[EXPONENTIAL] * 9, "EXIT"]
            + [".L_2:", "@!P1 BRA `(.L_2)", "BRA `(.L_1)"],
            id="a wait moved to the end",
        ),
        pytest.param(
            5.0,
            [".L_0:", PRODUCT, EXPONENTIAL, ADD, "@P0 CALL.REL.NOINC `(.L_1)", "BRA `(.L_0)", ".L_1:", ADD, "EXIT"],
            id="left by a far jump",
        ),
        pytest.param(
            None, [".L_0:", "HFMA2.MMA R1, -RZ, RZ, 0, 0", EXPONENTIAL, "@P0 BRA `(.L_0)", "EXIT"], id="HFMA2.MMA"
        ),
    ],
)
def test_the_hot_loop_is_found(expected: float | None, lines: list[str]) -> None:
    assert instructions_per_exponential(listing(*lines)) == expected


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, 0, 75, "gfx90a"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_table_of_tiles_serves_every_architecture(architecture: Architecture, dtype: torch.dtype) -> None:
    for dim in (1, 16, 17, 64, 100, 128, 192, 256, 768, 4096):
        width = row_width(architecture, dtype, dim)
        for kernel in Kernel:
            tiles = tiles_of(kernel, architecture, dtype, dim)
            assert len({tile.dims for tile in tiles}) == 1, "tuning may not change what z is padded to"
            assert len(set(tiles)) == len(tiles)
            assert width >= dim and width % tiles[0].dims == 0
            if kernel == Kernel.SUM:
                assert all(tile.columns % tile.rows == 0 for tile in tiles), "a diagonal tile holds its rows' columns"


def test_an_architecture_without_rows_takes_the_smallest_tiles() -> None:
    def area(tiles: Tiles) -> int:
        return tiles.rows * tiles.columns

    for kernel in Kernel:
        for dtype in (torch.bfloat16, torch.float32):
            unknown = tiles_of(kernel, 75, dtype, 128)
            assert unknown == tiles_of(kernel, "gfx90a", dtype, 128) == tiles_of(kernel, 0, dtype, 128)
            known = [tiles_of(kernel, architecture, dtype, 128)[0] for architecture in ARCHITECTURES]
            assert area(unknown[0]) <= min(map(area, known))
