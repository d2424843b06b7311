"""docs/kernels/resources.md, the table of what each kernel uses: `python -m tests.aot.table` measures and writes it."""

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

import triton

from tests.aot.compile import Resources
from tests.aot.shipped import Name, compiling, shipped

__all__ = ["growth", "read", "write"]

PAGE = Path(__file__).parents[2] / "docs/kernels/resources.md"

#: Columns beside specialisation and architecture, and up to what each may rise before a kernel counts as grown:
#: registers come in eights, shared memory in pieces of 128 bytes, and 2 % of the instructions is an unrelated shuffle.
COLUMNS = {
    "registers": lambda before: -(-before // 8) * 8,
    "stack": lambda before: before,
    "shared": lambda before: -(-before // 128) * 128,
    "tensor_memory": lambda before: before,
    "instructions_per_exponential": lambda before: 1.02 * before,
}

INTRODUCTION = """\
# What each Triton kernel uses

Compiled by Triton {version} without a GPU, for every configuration that ships: registers of a thread, bytes of its
stack (spilled registers, which another version of Triton may keep or spill), bytes of shared memory of a block,
columns of tensor memory, and instructions per exponential of the hot loop, the one around the matrix instructions; an
inner loop over chunks of D counts once. `make aot` compiles all of it again and fails where a kernel has grown;
`make test` compiles each for one of its architectures; `make aot-table` writes this page. These are properties of the
code and not times.
"""
HEADER = """
## {} {}

| specialisation | architecture | registers | stack | shared memory | tensor memory | instructions / exponential |
|---|---|---:|---:|---:|---:|---:|
"""
ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| ([\d.]*) \|$", re.MULTILINE)

Table = dict[Name, dict[str, float | None]]


def read() -> tuple[str, Table]:
    """The version of Triton the table was made with, and the table."""
    page = PAGE.read_text()
    table: Table = {}
    for heading in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        operation, kernel = heading.split(maxsplit=2)[:2]
        for specialisation, architecture, *values in ROW.findall(heading):
            row = [float(value) if value else None for value in values]
            table[operation, kernel, specialisation, architecture] = dict(zip(COLUMNS, row, strict=True))
    return re.search(r"by Triton ([\w.+]+) ", page)[1], table


def write(measured: Mapping[Name, Resources]) -> None:
    page = INTRODUCTION.format(version=triton.__version__)
    for kernel, names in groupby(measured, key=lambda name: name[:2]):
        page += HEADER.format(*kernel)
        for name in sorted(names, key=lambda name: name[2]):
            used = measured[name]
            ratio = used.instructions_per_exponential
            counts = used.registers, used.stack, used.shared, used.tensor_memory
            cells = [*counts, "" if ratio is None else f"{ratio:.2f}"]
            page += "".join(f"| {cell} " for cell in (f"`{name[2]}`", name[3], *cells)) + "|\n"
    PAGE.write_text(page)


def growth(before: Mapping[str, float | None], used: Resources) -> list[str]:
    """What has grown since the table was made, in words."""
    grown = []
    for column, allowed in COLUMNS.items():
        was, now = before[column], getattr(used, column)
        if now is not None and (was is None or now > allowed(was)):
            grown.append(f"{column.replace('_', ' ')}: {'none' if was is None else f'{was:g}'} → {now:g}")
    return grown


if __name__ == "__main__":
    with compiling(shipped()) as futures:
        write({name: future.result() for name, future in sorted(futures.items(), key=lambda item: item[0][:2])})
