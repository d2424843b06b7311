"""similarity_logsumexp of any queries and keys in Triton: plain tensors in and out, no autograd.

Logits are kept in base 2 and summed under a running maximum. Each program writes what is its own, and what several
programs hold of one row is added in a fixed order: results do not change from run to run. Tiles without a column that
is left out are summed without masks; docs/kernels/contrast.md says what is saved and why.
"""

from collections.abc import Iterator
from typing import Any

import torch

from hsv_kernels.ops.contrast.triton_rectangle_forward import (
    BLOCK_ROWS,
    logsumexp_forward,
    merge_splits_kernel,
    positive_kernel,
    rectangle_kernel,
)
from hsv_kernels.ops.contrast.triton_rectangle_gradient import key_gradient, key_gradient_kernel
from hsv_kernels.ops.contrast.triton_rectangle_tiles import key_gradient_tiles, rectangle_tiles, whole_chunks
from hsv_kernels.ops.contrast.triton_table import Tiles
from hsv_kernels.ops.triton_utils import Architecture, Configuration, triton_type

__all__ = ["configurations", "key_gradient", "logsumexp_forward"]

#: What the specialisations leave out: nothing, one column of each query, or whatever labels say as well.
FORMS = {
    "keys": {"EXCLUDE_SELF": False, "POSITIVE": False, "LABELS": False},
    "pairs": {"EXCLUDE_SELF": True, "POSITIVE": True, "LABELS": False},
    "labels": {"EXCLUDE_SELF": True, "POSITIVE": True, "LABELS": True},
}


def configurations() -> Iterator[Configuration]:
    """What the launchers choose, for ahead-of-time compilation; other architectures take the row of 0."""
    for architecture, row in ((80, 80), (90, 90), (100, 100), (80, 0)):
        for dtype, dim, form in (
            (torch.bfloat16, 64, "labels"),
            (torch.bfloat16, 128, "keys"),
            (torch.bfloat16, 128, "pairs"),
            (torch.bfloat16, 128, "labels"),
            (torch.bfloat16, 256, "pairs"),
            (torch.bfloat16, 1024, "keys"),
            (torch.float16, 128, "pairs"),
            (torch.float32, 128, "pairs"),
            (torch.float32, 128, "labels"),
        ):
            if row == 0 and dtype != torch.bfloat16:
                continue  # as the row of 80, or as bfloat16
            for mean in (True, False):
                tiles = rectangle_tiles(row, dtype, dim, mean)
                constexprs = {"MEAN": mean, "BY_COLUMNS": False, "stride": whole_chunks(dim, tiles)}
                yield _configuration(rectangle_kernel, dtype, dim, tiles, form, architecture, **constexprs)
                if form == "keys":
                    constexprs = {"MEAN": mean, "BY_COLUMNS": True, "stride": 65536}
                    yield _configuration(rectangle_kernel, dtype, dim, tiles, form, architecture, **constexprs)
            tiles = key_gradient_tiles(row, dtype, dim)
            yield _configuration(key_gradient_kernel, dtype, dim, tiles, form, architecture)
        if row:
            tiles = Tiles(BLOCK_ROWS, 1, 64, 4, 2)
            options = {"MEAN": True, "KEEP": True, "GATHER": True, "COLUMNS": True}
            for kernel in (merge_splits_kernel, positive_kernel):
                yield _configuration(kernel, torch.bfloat16, 128, tiles, "keys", architecture, matrix=False, **options)


def _configuration(
    kernel: Any,
    dtype: torch.dtype,
    dim: int,
    tiles: Tiles,
    form: str,
    architecture: Architecture,
    *,
    matrix: bool = True,
    **constexprs: Any,
) -> Configuration:
    """One specialisation: pointers that the form does not read are None, strides that it knows are constants."""
    given = {**FORMS[form], **constexprs, "PRECISION": "tf32x3", **tiles.options(whole_chunks(dim, tiles))}
    unread = [name for name in ("p_positive", "p_h") if matrix and not given["POSITIVE"]]
    unread += [name for name in ("p_q_labels", "p_k_labels") if not given["LABELS"]]
    unread += [name for name in ("p_mean",) if not given.get("MEAN")]
    rows = ("p_q", "p_k", "p_rows", "p_gathered")
    floats = ("p_scale", "p_top", "p_sum", "p_part", "p_lse", "p_log2_sum", "p_mean", "p_logit", "p_weight", "p_h")
    signature = {
        **dict.fromkeys(rows, f"*{triton_type(dtype)}"),
        **dict.fromkeys((*floats, "p_gradient"), "*fp32"),
        **dict.fromkeys(("p_positive", "p_columns", "p_q_labels", "p_k_labels"), "*i64"),
    }
    names = [parameter.name for parameter in kernel.params]
    constant = [name for name in names if name in given or name in unread]
    return Configuration(
        kernel,
        {name: signature.get(name, "i32") for name in names if name not in constant},
        {name: given.get(name) for name in constant},
        tiles.num_warps,
        tiles.num_stages,
        (architecture,),
        matrix,
    )
