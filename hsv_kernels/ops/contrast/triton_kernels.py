"""The contrast operations in Triton: plain tensors in and out, no autograd.

Logits are kept in base 2. Every sum has one writer and partial sums are added in a fixed order: results do not change
from run to run. docs/kernels/contrast.md derives the formulas.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hsv_kernels.ops.contrast import triton_rectangle, triton_square_matmul
from hsv_kernels.ops.contrast.triton_square_gradient import gradient_kernel, weight_kernel, weighted_rows
from hsv_kernels.ops.contrast.triton_square_logsumexp import logsumexp, logsumexp_kernel, merge_kernel, online_kernel
from hsv_kernels.ops.contrast.triton_square_matmul import pairwise_weight_kernel
from hsv_kernels.ops.contrast.triton_square_normalise import (
    normalise,
    normalise_backward,
    normalise_backward_kernel,
    normalise_kernel,
    row_block,
)
from hsv_kernels.ops.contrast.triton_table import ARCHITECTURES, Kernel, row_width, tiles_of
from hsv_kernels.ops.contrast.triton_tiles import Shift, padded
from hsv_kernels.ops.triton_utils import Architecture, Configuration, architecture_of, exact_precision, triton_type

__all__ = [
    "configurations",
    "nt_xent_backward",
    "nt_xent_forward",
    "saved_rows",
    "square_logsumexp_backward",
    "square_logsumexp_forward",
]


def nt_xent_forward(
    z0: Tensor, z1: Tensor, temperature: Tensor, fixed_shift: bool | None, bfloat16: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The per-anchor losses of NT-Xent and what backward needs of them.

    Args:
        z0, z1: [N, D] of one dtype and any strides, not normalised.
        temperature: 0-dim float32; a value that is not positive and finite gives NaN.
        fixed_shift: sum exponentials as they are; needs 1 / temperature + log 2N < 64.
        bfloat16: products of rows rounded to bfloat16, whatever their dtype.
        keep: False; the CPU alone keeps exponentials.

    Returns:
        losses [2N] in the order of the views, and what a backward takes, in the order of z and in float32: kept
        [2, 2N], d = lse − S_pos [2N] and inv_norm [2N]; and z (`saved_rows`).
    """
    dim = z0.shape[1]
    width, dtype = saved_rows(z0, bfloat16)
    rows = normalise(z0, z1, temperature, width, dtype)
    found = logsumexp(rows.z, dim, rows.scale, rows.cosine, True, shift_of(fixed_shift))
    return found.losses, found.kept, found.d, rows.inv_norm, rows.z


def nt_xent_backward(
    grad: Tensor,
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor,
    kept: Tensor,
    d: Tensor,
    inv_norm: Tensor,
    z: Tensor,
    need_z: bool,
    need_temperature: bool,
    fixed_shift: bool | None,
    bfloat16: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · loss_i: dz0 and dz1 (None unless need_z), dtemperature (None unless need_temperature)."""
    dim, scale = z0.shape[1], temperature.reciprocal()
    rows, unit = weighted_rows(grad, z, dim, scale, kept, True, True, shift_of(fixed_shift))
    dz0, dz1, radial = normalise_backward(grad, unit, scale, d, inv_norm, rows, z0, z1, need_z)
    return dz0, dz1, -0.5 * scale * radial.sum() if need_temperature else None


def saved_rows(z0: Tensor, bfloat16: bool) -> tuple[int, torch.dtype]:
    """Row length and dtype of the normalised rows z that the forward of views like z0 saves."""
    dtype = torch.bfloat16 if bfloat16 else z0.dtype
    return row_width(architecture_of(z0), dtype, int(z0.shape[1])), dtype


def square_logsumexp_forward(q: Tensor, scale: Tensor, exclude_self: bool, *, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """lse_i = log Σ_j exp(scale · q_i · q_j) [n], column i left out of row i with exclude_self.

    A row without candidates gives −inf. The second result is what backward needs, [2, n].
    `bfloat16`: products of rows rounded to bfloat16, whatever their dtype.
    """
    dim, dtype = q.shape[1], torch.bfloat16 if bfloat16 else q.dtype
    z = padded(q.to(dtype), row_width(architecture_of(q), dtype, dim))
    found = logsumexp(z, dim, scale, None, exclude_self, Shift.ONLINE)
    return found.lse, found.kept


def square_logsumexp_backward(
    grad: Tensor,
    q: Tensor,
    scale: Tensor,
    kept: Tensor,
    exclude_self: bool,
    need_q: bool,
    need_scale: bool,
    *,
    bfloat16: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ grad_i · lse_i: dq, the sum of both roles of q (None unless need_q), and dscale likewise."""
    dim, dtype = q.shape[1], torch.bfloat16 if bfloat16 else q.dtype
    z = padded(q.to(dtype), row_width(architecture_of(q), dtype, dim))
    rows, unit = weighted_rows(grad, z, dim, scale, kept, False, exclude_self, Shift.ONLINE)
    rows = rows.sum(0) if len(rows) > 1 else rows[0]
    dscale = 0.5 * unit * (q * rows).sum() if need_scale else None  # not vecdot: autocast and TF32 would round it
    return rows.mul_(scale * unit).to(q.dtype) if need_q else None, dscale


def shift_of(fixed_shift: bool | None) -> Shift:
    """The fixed shift where the caller knows that it fits; elsewhere the device looks at the temperature."""
    return Shift.FIXED if fixed_shift else Shift.DEVICE


def configurations() -> Iterator[Configuration]:
    """What the launchers choose and what tuning tries, for ahead-of-time compilation.

    Architectures that the table does not name take the row of 0, which is compiled for sm_80.
    """
    for row in (*ARCHITECTURES, 0):
        architecture = row or 80
        for dtype, dim, form, shift in CASES if row in (80, 90, 100) else FEWER_CASES:
            width = row_width(row, dtype, dim)
            online = shift == Shift.ONLINE
            sums, gradient = online_kernel if online else logsumexp_kernel, Kernel.ONLINE if online else Kernel.FIXED
            for kernel, kind in ((sums, Kernel.SUM), (gradient_kernel, gradient)):
                for tiles in tiles_of(kind, row, dtype, dim):
                    constexprs = {**form, "ONLINE": online, "GUARDED": True, "PRECISION": exact_precision(row)}
                    constexprs |= {"FOLDED": tiles.folded, **tiles.options(width)}
                    yield _configuration(kernel, triton_type(dtype), constexprs, architecture, matrix=True)
        if row:
            for kernel, blocks in ROWWISE.items():
                constexprs = {**PAIRS, "SHIFT": int(Shift.DEVICE), "FIXED": False, "NEED_Z": True, "WIDTH": 128}
                constexprs |= {"num_warps": 4, "num_stages": 3, **blocks}
                yield _configuration(kernel, "bf16", constexprs, architecture, matrix=False)
    yield from triton_rectangle.configurations()


ROWWISE = {
    normalise_kernel: row_block(128),
    normalise_backward_kernel: row_block(128),
    merge_kernel: {"BLOCK_M": 128},
    weight_kernel: {"BLOCK_M": 128},
    pairwise_weight_kernel: {"BLOCK_M": triton_square_matmul.BLOCK_M, "BLOCK_N": triton_square_matmul.BLOCK_N},
}
PAIRS, SQUARE = {"PAIRS": True, "EXCLUDE_SELF": True}, {"PAIRS": False, "EXCLUDE_SELF": False}
CASES = (
    *((torch.bfloat16, dim, PAIRS, Shift.FIXED) for dim in (64, 128, 256, 512)),
    *((torch.bfloat16, dim, PAIRS, Shift.ONLINE) for dim in (64, 128, 256)),
    (torch.bfloat16, 128, SQUARE, Shift.ONLINE),
    *((dtype, 128, PAIRS, shift) for dtype in (torch.float16, torch.float32) for shift in (Shift.FIXED, Shift.ONLINE)),
)
FEWER_CASES = tuple(
    (dtype, dim, PAIRS, shift)
    for dtype, dim in ((torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128))
    for shift in (Shift.FIXED, Shift.ONLINE)
)

#: Triton's types of what the kernels take; everything else is a size or a stride.
POINTERS = {
    **dict.fromkeys(("p_x0", "p_x1", "p_dx0", "p_dx1", "p_z", "p_w"), ""),  # of the dtype of the rows
    **dict.fromkeys(("p_temperature", "p_inv_norm", "p_cosine", "p_scale", "p_top", "p_sum", "p_kept"), "fp32"),
    **dict.fromkeys(("p_lse", "p_d", "p_losses", "p_grad", "p_unit", "p_weight", "p_rows", "p_radial", "p_s"), "fp32"),
}


def _configuration(
    kernel: Any, rows: str, constexprs: dict[str, Any], architecture: Architecture, *, matrix: bool
) -> Configuration:
    """The part of `constexprs` that `kernel` takes, and the types of its other arguments; z is of type `rows`."""
    names = [parameter.name for parameter in kernel.params]
    fixed = {name: value for name, value in constexprs.items() if name in names}
    return Configuration(
        kernel,
        {name: f"*{POINTERS[name] or rows}" if name in POINTERS else "i32" for name in names if name not in fixed},
        fixed,
        constexprs["num_warps"],
        constexprs["num_stages"],
        (architecture,),
        matrix,
        constexprs.get("maxnreg", 0),
    )
