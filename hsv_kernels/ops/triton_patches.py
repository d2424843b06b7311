"""Patches in Triton, read and written as widely as they lie in memory.

Element (y, x, c) of patch l of sample b lies, for images and token sequences alike, at

    b·BATCH + (l // GRID)·GRID_ROW + (l % GRID)·GRID_COLUMN + y·ROW + x·COLUMN + c·CHANNEL,

a token being a patch of one pixel in a grid of width 1. Packed, the same patch is a row of its values in (y, x, c)
order. A group is what a thread moves at a time: V values of each of I planes, I·V neighbours of the packed row. Planar
images have I = C: V pixels of each plane are loaded at once and interleaved in registers. Where the pixels themselves
lie one after the other, the values of a row of the patch are taken for as many pixels of one channel: I = 1.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.patches import Strides

__all__ = [
    "Layout",
    "layout_of",
    "load_groups",
    "place_of_groups",
    "row_alignment",
    "store_groups",
    "within_groups",
]

STRIDES = ("BATCH", "GRID", "GRID_ROW", "GRID_COLUMN", "ROW", "COLUMN", "CHANNEL")

#: Bytes of the widest access.
WIDEST = 16
#: Planes that a thread interleaves in its registers; values of more are moved one by one.
MOST_PLANES = 4


class Layout(NamedTuple):
    """The strides of the module's formula in its order; patches of P × Q × C values in groups of I·V, aligned to A."""

    strides: Strides
    P: int
    Q: int
    C: int
    I: int
    V: int
    A: int

    @property
    def constants(self) -> dict[str, int]:
        return {"P": self.P, "Q": self.Q, "C": self.C, "I": self.I, "V": self.V, "A": self.A}

    @property
    def signature(self) -> dict[str, str]:
        """Triton's types of the strides, less those that it takes as the constant 1."""
        return {name: "i32" for name, step in zip(STRIDES, self.strides, strict=True) if step != 1}

    @property
    def unit_strides(self) -> dict[str, int]:
        return {name: 1 for name, step in zip(STRIDES, self.strides, strict=True) if step == 1}

    @property
    def groups(self) -> int:
        """Groups of one patch."""
        return self.P * self.Q * self.C // (self.I * self.V)

    @property
    def values(self) -> int:
        """Values of a group in a block, with the padding to a power of two."""
        return triton.next_power_of_2(self.I) * self.V


def layout_of(tensor: Tensor, strides: Strides, shape: tuple[int, int, int], narrowest: int | None = None) -> Layout:
    """The widest groups in which patches of `shape` (p, q, C) of `tensor` can be moved.

    Args:
        strides: those of the module's formula, in elements, as `patch_strides` and `packed_strides` give them.
        narrowest: bytes of the smallest element that is moved together with those of `tensor`, its own if None.
    """
    batch, grid, grid_row, grid_column, row, column, channel = strides
    P, Q, C = shape
    if channel == 1 and (column == C or Q == 1):  # pixel after pixel
        Q, C, column = Q * C, 1, 1
    if C == 1 and column == 1 and (row == Q or P == 1):  # row after row
        P, Q = 1, P * Q
    planes = C if C <= MOST_PLANES else 1

    V = WIDEST // (narrowest or tensor.element_size())
    steps = (batch, grid_row, grid_column) + ((row,) if P > 1 else ()) + ((channel,) if C > 1 else ())
    while V > 1 and (column != 1 or planes < C or Q % V or alignment(tensor, V, *steps) < _aligned(tensor, V)):
        V //= 2
    strides = batch, grid, grid_row, grid_column, row, column, channel
    return Layout(strides, P, Q, C, planes, V, _aligned(tensor, V))


def row_alignment(rows: Tensor, V: int) -> int:
    """Elements that runs of V values of packed `rows` [B, L, N] are aligned to; 1 where values lie apart."""
    batch, row, value = rows.stride()
    return alignment(rows, V, batch, row) if value == 1 else 1


def alignment(tensor: Tensor, V: int, *steps: int) -> int:
    """Largest power of two of elements, at most V and 16 bytes, that `steps` and the address of `tensor` divide by."""
    aligned = _aligned(tensor, V)
    while any(step % aligned for step in steps) or tensor.data_ptr() % (aligned * tensor.element_size()):
        aligned //= 2
    return aligned


def _aligned(tensor: Tensor, V: int) -> int:
    return min(V, WIDEST // tensor.element_size())


@triton.jit
def unstack(x):
    """The columns of [R, V], each [R]."""
    R: tl.constexpr = x.shape[0]
    V: tl.constexpr = x.shape[1]
    if V == 1:
        return (tl.reshape(x, [R]),)
    else:
        left, right = tl.split(tl.permute(tl.reshape(x, [R, 2, V // 2]), (0, 2, 1)))
        return unstack(left) + unstack(right)


@triton.jit
def stack(columns):
    """[R, V] of V columns [R], V a power of two."""
    V: tl.constexpr = len(columns)
    R: tl.constexpr = columns[0].shape[0]
    if V == 1:
        return tl.reshape(columns[0], [R, 1])
    else:
        halves = tl.join(stack(columns[: V // 2]), stack(columns[V // 2 :]))  # [R, V / 2, 2]
        return tl.reshape(tl.permute(halves, (0, 2, 1)), [R, V])


@triton.jit
def interleave(columns, I: tl.constexpr):
    """The columns of I planes [R, V], one plane after the other → [R, J, V], J the power of two from I up.

    Row by row the values lie pixel by pixel, and are repeated from I·V on. All of it happens in the registers of the
    thread that holds a row.
    """
    R: tl.constexpr = columns[0].shape[0]
    V: tl.constexpr = len(columns) // I
    J: tl.constexpr = I if I < 3 else 4
    ordered = ()
    for o in tl.static_range(J * V):
        ordered = ordered + (columns[(o % I * V + o // I) % (I * V)],)
    return tl.reshape(stack(ordered), [R, J, V])


@triton.jit
def separate(x, I: tl.constexpr):
    """The I planes [R, V] whose columns `interleave` makes x [R, J, V] of."""
    R: tl.constexpr = x.shape[0]
    J: tl.constexpr = x.shape[1]
    V: tl.constexpr = x.shape[2]
    values = unstack(tl.reshape(x, [R, J * V]))
    planes = ()
    for i in tl.static_range(I):
        columns = ()
        for v in tl.static_range(V):
            columns = columns + (values[v * I + i],)
        planes = planes + (stack(columns),)
    return planes


@triton.jit
def place_of_groups(
    i_b, o_l, o_g, strides,
    P: tl.constexpr, Q: tl.constexpr, C: tl.constexpr, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr,
):  # fmt: skip
    """Where groups o_g of patches o_l of sample i_b begin: multiples of A, int64. `strides` as in the formula above."""
    BATCH, GRID, GRID_ROW, GRID_COLUMN, ROW, COLUMN, CHANNEL = strides
    o = o_g * (I * V)
    corner = (o_l // GRID).to(tl.int64) * GRID_ROW + (o_l % GRID).to(tl.int64) * GRID_COLUMN
    y, x, c = o // (Q * C), o // C % Q, o % C
    pixel = y.to(tl.int64) * ROW + x.to(tl.int64) * COLUMN + c.to(tl.int64) * CHANNEL
    return tl.multiple_of(i_b * BATCH + corner + pixel, A)


@triton.jit
def load_groups(p, o, m, COLUMN, CHANNEL, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr):
    """The groups at offsets o [R], zeros where m [R] is false; [R, J, V], as `interleave` orders them."""
    columns = ()
    for i in tl.static_range(I):
        o_plane = tl.multiple_of(o + tl.cast(CHANNEL, tl.int64) * i, A)
        for v in tl.static_range(0, V, A):  # one access each
            o_v = (o_plane + v)[:, None] + (tl.arange(0, A) * COLUMN)[None, :]
            columns = columns + unstack(tl.load(p + o_v, mask=m[:, None], other=0))
    return interleave(columns, I)


@triton.jit
def store_groups(p, o, x, m, COLUMN, CHANNEL, I: tl.constexpr, V: tl.constexpr, A: tl.constexpr):
    """Stores x [R, J, V] where `load_groups` reads it."""
    o_v = (tl.arange(0, V) * COLUMN)[None, :]
    planes = separate(x, I)
    for i in tl.static_range(I):
        o_plane = tl.multiple_of(o + tl.cast(CHANNEL, tl.int64) * i, A)
        tl.store(p + o_plane[:, None] + o_v, planes[i], mask=m[:, None])


@triton.jit
def within_groups(I: tl.constexpr, V: tl.constexpr):
    """Places [1, J, V] of a group's values in its packed row, and which of them exist, [1, J, 1]."""
    J: tl.constexpr = I if I < 3 else 4
    o_j = tl.arange(0, J)[None, :, None]
    return (o_j * V + tl.arange(0, V)[None, None, :]).to(tl.int64), o_j < I
