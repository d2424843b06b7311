"""Sizes of the tiles of the kernels of the square in Triton, for each architecture, type and dimension.

Every row compiles for the architectures that it names without spilling (at most 32 bytes, in some versions of Triton),
within their shared memory and with matrix instructions (tests/aot, docs/kernels/resources.md). Of what does, larger
tiles come first, which read less, then those with fewer instructions per exponential.
"""

import functools
import math
from collections.abc import Callable
from enum import Enum, auto
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from hsv_kernels.ops.triton_utils import Architecture, architecture_of, device_name_of
from hsv_kernels.ops.tuning import choose, size_class

__all__ = ["ARCHITECTURES", "Kernel", "Tiles", "chosen_tiles", "row_width", "tiles_of"]


class Tiles(NamedTuple):
    """Rows, columns and dimensions of a tile, and how it is compiled."""

    rows: int
    columns: int
    dims: int
    num_warps: int
    num_stages: int
    programs: int = 1  # that share a multiprocessor
    registers: int = 0  # most of a thread, 0 for no limit: what lets several programs share a multiprocessor
    folded: bool = True  # logsumexp_kernel adds rows r and r + 8 before it keeps them

    def options(self, width: int) -> dict[str, int]:
        """What the tile fixes at compile time for rows of `width` values, a multiple of dims."""
        return {
            "WIDTH": width,
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_D": self.dims,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **({"maxnreg": self.registers} if self.registers else {}),
        }


class Kernel(Enum):
    """What has tiles of its own."""

    SUM = auto()  # logsumexp_kernel and online_kernel
    FIXED = auto()  # gradient_kernel with the fixed shift
    ONLINE = auto()  # and with the online maximum


SUM, FIXED, ONLINE = Kernel


class Row(NamedTuple):
    """Tiles of `kernels` on `architectures`, on every one that no earlier row names if (), for dimensions up to `dim`.

    The first of the tiles is taken; the others are what tuning tries beside it, and of the same dims. These are the
    most that a tile holds at a time: rows of z that are shorter take less.
    """

    kernels: tuple[Kernel, ...]
    itemsize: int
    architectures: tuple[Architecture, ...]
    dim: float
    tiles: tuple[Tiles, ...]


#: Architectures that the table names, for which its rows are compiled ahead of time.
ARCHITECTURES: tuple[Architecture, ...] = (80, 86, 89, 90, 100, 120, "gfx942")
ANY = math.inf

#: The first row that fits counts.
TABLE = (
    Row((SUM,), 2, (80,), 64, (Tiles(64, 64, 64, 4, 2),)),
    Row((SUM,), 2, (80,), 128, (Tiles(64, 128, 128, 4, 2), Tiles(128, 128, 128, 8, 2))),
    Row((SUM,), 2, (80,), ANY, (Tiles(64, 128, 64, 4, 2),)),
    Row((SUM,), 2, (86, 89), 128, (Tiles(64, 128, 128, 4, 2), Tiles(64, 64, 128, 4, 2))),
    Row((SUM,), 2, (86, 89), ANY, (Tiles(64, 128, 64, 4, 2),)),
    Row((SUM,), 2, (90,), 128, (Tiles(64, 128, 128, 4, 2, 3, 168), Tiles(128, 128, 128, 8, 2))),
    Row((SUM,), 2, (90,), ANY, (Tiles(64, 128, 64, 4, 2, 3, 168),)),
    Row((SUM,), 2, (100,), 128, (Tiles(128, 128, 128, 8, 2, folded=False),)),
    Row((SUM,), 2, (100,), ANY, (Tiles(128, 128, 64, 8, 2, folded=False),)),
    Row((SUM,), 2, (120,), 128, (Tiles(64, 128, 128, 4, 2), Tiles(64, 64, 128, 4, 2))),
    Row((SUM,), 2, (120,), ANY, (Tiles(64, 64, 64, 4, 2),)),
    Row((SUM,), 2, ("gfx942",), 128, (Tiles(64, 128, 128, 4, 2), Tiles(64, 64, 128, 4, 2))),
    Row((SUM,), 2, ("gfx942",), ANY, (Tiles(64, 128, 64, 4, 2),)),
    Row((SUM,), 2, (), ANY, (Tiles(64, 64, 64, 4, 2),)),
    Row((SUM,), 4, (90, 100, "gfx942"), ANY, (Tiles(64, 64, 32, 4, 2),)),
    Row((SUM,), 4, (120,), ANY, (Tiles(64, 64, 16, 8, 2),)),
    Row((SUM,), 4, (80, 86, 89), ANY, (Tiles(64, 64, 16, 4, 2),)),
    Row((SUM,), 4, (), ANY, (Tiles(32, 64, 32, 4, 2),)),
    Row((FIXED, ONLINE), 2, (80,), ANY, (Tiles(128, 64, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, (86, 89), 128, (Tiles(128, 64, 128, 8, 2), Tiles(64, 64, 128, 4, 2))),
    Row((FIXED, ONLINE), 2, (86, 89), ANY, (Tiles(128, 64, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, (90,), 128, (Tiles(64, 128, 128, 4, 2, 2), Tiles(64, 64, 128, 4, 2, 2))),
    Row((FIXED, ONLINE), 2, (90,), ANY, (Tiles(64, 64, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, (100,), 128, (Tiles(128, 64, 128, 8, 2), Tiles(128, 32, 128, 8, 2))),
    Row((FIXED, ONLINE), 2, (100,), ANY, (Tiles(128, 32, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, (120,), 128, (Tiles(64, 64, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, (120,), ANY, (Tiles(128, 64, 128, 8, 2),)),
    Row((FIXED, ONLINE), 2, ("gfx942",), 128, (Tiles(64, 32, 128, 4, 2), Tiles(64, 64, 128, 4, 2))),
    Row((FIXED, ONLINE), 2, ("gfx942",), ANY, (Tiles(64, 32, 128, 4, 2),)),
    Row((FIXED, ONLINE), 2, (), ANY, (Tiles(64, 32, 64, 4, 2),)),
    Row((FIXED, ONLINE), 4, (90, 100, "gfx942"), ANY, (Tiles(64, 32, 64, 4, 2),)),
    Row((FIXED, ONLINE), 4, (), ANY, (Tiles(64, 32, 32, 4, 2),)),
)  # fmt: skip


@functools.cache
def tiles_of(kernel: Kernel, architecture: Architecture, dtype: torch.dtype, dim: int) -> tuple[Tiles, ...]:
    """The tiles of a kernel, the one to take first; an architecture that the table does not name takes the smallest."""
    row = next(
        row
        for row in TABLE
        if kernel in row.kernels
        and row.itemsize == dtype.itemsize
        and (architecture in row.architectures or not row.architectures)
        and dim <= row.dim
    )
    most = max(16, triton.next_power_of_2(dim))
    return tuple(tiles._replace(dims=min(tiles.dims, most)) for tiles in row.tiles)


def row_width(architecture: Architecture, dtype: torch.dtype, dim: int) -> int:
    """D padded to whole chunks of every tile of the square kernels: the row length of z in memory."""
    dims = max(tiles_of(kernel, architecture, dtype, dim)[0].dims for kernel in (SUM, FIXED, ONLINE))
    return triton.cdiv(dim, dims) * dims


def chosen_tiles(
    kernel: Kernel, source: triton.JITFunction, z: Tensor, dim: int, run: Callable[[Tiles], object], *form: object
) -> Tiles:
    """The table's tiles for rows z [M, …] or, with HSV_TUNE=1, those of its row with which `run` is the fastest.

    `source` is the kernel that is timed, and `form` what compiles it differently beside dtype and dim.
    """
    candidates = tiles_of(kernel, architecture_of(z), z.dtype, dim)
    if len(candidates) == 1:
        return candidates[0]
    key = (device_name_of(z), z.dtype, dim, size_class(len(z)), *form)
    with torch.cuda.device_of(z):
        return choose(source, key, candidates, run)
