"""Σ_j W_ij z_j for wide rows in Triton: chunks of rows through the vendor's matrix product, W by a pointwise kernel.

Where D is cut into chunks, `gradient_kernel` multiplies z zᵀ again for each of them; here it is multiplied once, and
the similarities and weights of a chunk of rows go through memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hsv_kernels.ops.contrast.triton_tiles import LOG2E, Shift, candidates
from hsv_kernels.ops.triton_utils import round_to

__all__ = ["LARGEST_TILED_DIM", "pairwise_weight_kernel", "rows_by_matmul"]

#: Above this D the matrix product is used: chunks of tiles would multiply z zᵀ more often than it costs.
LARGEST_TILED_DIM = 256

BLOCK_M, BLOCK_N = 4, 512


@triton.jit
def pairwise_weight_kernel(
    p_s, p_scale, p_kept, p_weight, p_w, i_first, R, M,
    PAIRS: tl.constexpr, EXCLUDE_SELF: tl.constexpr, FIXED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W [R, M] of the rows i_first … from their products with all rows, p_s [R, M]."""
    i_n = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_r = tl.program_id(1).to(tl.int64) * BLOCK_M
    o_r, o_n = i_r + tl.arange(0, BLOCK_M), i_n + tl.arange(0, BLOCK_N)
    o_m = i_first + o_r
    m_r, m_n = o_r < R, o_n < M
    m_rn = m_r[:, None] & m_n[None, :]

    b_s = tl.load(p_s + o_r[:, None] * M + o_n[None, :], mask=m_rn, other=0) * (tl.load(p_scale) * LOG2E)
    b_weight_m = tl.load(p_weight + o_m, mask=m_r, other=0)
    b_weight_n = tl.load(p_weight + o_n, mask=m_n, other=0)
    if FIXED:
        b_w = tl.exp2(b_s) * (b_weight_m[:, None] + b_weight_n[None, :])
    else:
        b_shift_m = tl.load(p_kept + M + o_m, mask=m_r, other=0)
        b_shift_n = tl.load(p_kept + M + o_n, mask=m_n, other=0)
        b_w = b_weight_m[:, None] * tl.exp2(b_s - b_shift_m[:, None])
        b_w += b_weight_n[None, :] * tl.exp2(b_s - b_shift_n[None, :])
    b_w = tl.where(candidates(i_first + i_r, i_n, M, PAIRS, EXCLUDE_SELF, BLOCK_M, BLOCK_N), b_w, 0)
    tl.store(p_w + o_r[:, None] * M + o_n[None, :], round_to(b_w, p_w.dtype.element_ty), mask=m_rn)


def rows_by_matmul(
    z: Tensor, dim: int, scale: Tensor, kept: Tensor, weight: Tensor, pairs: bool, exclude_self: bool, shift: Shift
) -> Tensor:
    """Σ_j W_ij z_j [1, M, dim], float32, from the weights [M] of `weight_kernel`; D rows at a time."""
    m = z.shape[0]
    rows = scale.new_empty(1, m, dim)
    with torch.cuda.device_of(z), torch.autocast(z.device.type, enabled=False):
        for first in range(0, m, dim):
            w = weights_of_rows(first, min(dim, m - first), z, scale, kept, weight, pairs, exclude_self, shift)
            rows[0, first : first + dim] = product(w, z[:, :dim])
            del w  # before the next is made
    return rows


def weights_of_rows(
    first: int,
    count: int,
    z: Tensor,
    scale: Tensor,
    kept: Tensor,
    weight: Tensor,
    pairs: bool,
    exclude_self: bool,
    shift: Shift,
) -> Tensor:
    """W [count, M], in the dtype of z, of the rows from `first` on."""
    m = z.shape[0]
    s = product(z[first : first + count], z.T)
    w = torch.empty_like(s, dtype=z.dtype)
    pairwise_weight_kernel[(triton.cdiv(m, BLOCK_N), triton.cdiv(count, BLOCK_M))](
        *(s, scale, kept, weight, w, first, count, m),
        PAIRS=pairs,
        EXCLUDE_SELF=exclude_self,
        FIXED=shift == Shift.FIXED,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
    )
    return w


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of values of any floating-point dtype."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a.float(), b.float())
