"""What the kernels of queries against keys do with a tile, how large it is, and how many parts a pass has."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast.rectangle import Form
from hsv_kernels.ops.contrast.triton_table import Tiles
from hsv_kernels.ops.contrast.triton_tiles import fewest_splits, load_rows
from hsv_kernels.ops.triton_utils import Architecture, dot, processors_of

__all__ = [
    "excluded",
    "is_candidate",
    "key_gradient_tiles",
    "load_keys",
    "rectangle_tiles",
    "selection",
    "similarity_to_keys",
    "split",
    "whole_chunks",
]


@triton.jit
def load_keys(p_k, i_n, o_n, o_d, stride, BY_COLUMNS: tl.constexpr):
    """Keys i_n + o_n at dimensions o_d; `stride` lies between keys, or BY_COLUMNS between the dimensions of a key."""
    if BY_COLUMNS:
        p_tile = p_k + i_n + (o_n[:, None] + o_d[None, :].to(tl.int64) * stride)
    else:
        p_tile = p_k + i_n * stride + (o_n[:, None] * stride + o_d[None, :])
    return tl.load(p_tile)


@triton.jit
def similarity_to_keys(
    p_q, i_m, o_m, p_k, i_n, o_n, stride, BY_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q_m · k_n as float32 [BLOCK_M, BLOCK_N], D in chunks."""
    b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_d in range(0, WIDTH, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D)
        b_q = load_rows(p_q, i_m, o_m, o_d, WIDTH)
        b_k = load_keys(p_k, i_n, o_n, o_d, stride, BY_COLUMNS)
        b_s = dot(b_q, tl.trans(b_k), b_s, PRECISION)
    return b_s


@triton.jit
def is_candidate(
    p_positive, p_q_labels, p_k_labels, m_mn, o_query, o_key, SELF_OFFSET,
    EXCLUDE_SELF: tl.constexpr, POSITIVE: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Where m_mn holds and the query sums over the key; of the two indices one is a row and the other a column."""
    if EXCLUDE_SELF:
        m_mn &= o_query + SELF_OFFSET != o_key
    if POSITIVE:
        m_mn &= tl.load(p_positive + o_query).to(tl.int32) != o_key
    if LABELS:
        m_mn &= tl.load(p_q_labels + o_query) != tl.load(p_k_labels + o_key)
    return m_mn


def selection(form: Form) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Positive columns and labels of queries and of keys as the kernels read them; labels int32 if both fit."""
    columns = None if form.columns is None else form.columns.contiguous()
    if form.q_labels is None:
        return columns, None, None
    small = max(form.q_labels.dtype.itemsize, form.k_labels.dtype.itemsize) < 4
    kind = torch.int32 if small or form.q_labels.dtype == form.k_labels.dtype == torch.int32 else torch.int64
    return columns, *(x.to(kind).contiguous() for x in (form.q_labels, form.k_labels))


def excluded(form: Form) -> dict[str, bool]:
    """What the kernels leave out, as they are compiled for it."""
    return {
        "EXCLUDE_SELF": form.exclude_self,
        "POSITIVE": form.columns is not None,
        "LABELS": form.q_labels is not None,
    }


def whole_chunks(dim: int, tiles: Tiles) -> int:
    """D padded to whole chunks."""
    return triton.cdiv(dim, tiles.dims) * tiles.dims


def split(like: Tensor, rows: int, columns: int, tiles: Tiles, chunks: int) -> tuple[int, int]:
    """Tiles of columns that a program visits, and parts that they make: as few as fill the device.

    Partial results of all parts are at most rows + columns rows.
    """
    blocks = triton.cdiv(columns, tiles.columns)
    programs = triton.cdiv(rows, tiles.rows) * chunks
    splits = fewest_splits(programs, min(blocks, 1 + columns // rows), tiles.programs * processors_of(like))
    visited = triton.cdiv(blocks, splits)
    return visited, triton.cdiv(blocks, visited)


def rectangle_tiles(architecture: Architecture, dtype: torch.dtype, dim: int, mean: bool) -> Tiles:
    """The tile of rectangle_kernel, with or without the mean key; an architecture not listed takes the smallest."""
    dims = max(16, triton.next_power_of_2(dim))
    if mean:
        if architecture == 100 and dtype != torch.float32:
            return Tiles(128 if dims <= 128 else 64, 64, min(dims, 128), 8, 2)
        return key_gradient_tiles(architecture, dtype, dim)
    if dtype == torch.float32:
        return Tiles(64, 32, min(dims, 32), 4, 2)
    if architecture in (80, 90, 100):
        columns = 64 if architecture == 100 else 128  # labels spill with 128 on sm_100
        return Tiles(128, columns, dims if dims <= 128 else 64, 8, 2)
    return Tiles(64, 64, min(dims, 64), 4, 2)


def key_gradient_tiles(architecture: Architecture, dtype: torch.dtype, dim: int) -> Tiles:
    """The tile of key_gradient_kernel, whose accumulator is as wide; an architecture not listed takes the smallest."""
    dims = max(16, triton.next_power_of_2(dim))
    if dtype == torch.float32:
        return Tiles(64, 32, min(dims, 32), 8 if architecture == 100 else 4, 2)
    if architecture == 90 and dims <= 128:
        return Tiles(128, 64, dims, 8, 3)
    if architecture == 80 and dims <= 128:
        return Tiles(64, 32, dims, 4, 2, programs=2)
    if architecture in (80, 90, 100):
        return Tiles(64, 32 if architecture == 100 and dims > 256 else 64, min(dims, 128), 8, 2)
    return Tiles(64, 32, min(dims, 64), 4, 2, programs=2)
