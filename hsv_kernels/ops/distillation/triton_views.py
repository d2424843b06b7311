"""What the distillation kernels in Triton share: views brought into as few strided tensors as may be."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["LOWEST", "greatest", "groups_of", "runs", "stacked"]

#: Stands in for the maximum of logits that are all −inf, so that none of them is subtracted from itself.
LOWEST = tl.constexpr(-1e38)


@triton.jit
def greatest(b_x, AXIS: tl.constexpr):
    """The greatest of `b_x` along the axis; LOWEST where all are −inf."""
    b_m = tl.max(b_x, AXIS)
    return tl.where(b_m == float("-inf"), LOWEST, b_m)


def runs(rows: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
    """The number of the first view, and views [V, N, K], of each run of `rows` that lie at equal distances.

    Nothing is copied: stacked views, and chunks of one tensor, are one run, tensors of their own one each.
    """
    found, first = [], 0
    while first < len(rows):
        one, count, distance = rows[first], 1, 0
        for i in range(first + 1, len(rows)):
            after = _distance(rows[i - 1], rows[i])
            if after is None or (count > 1 and after != distance):
                break
            count, distance = count + 1, after
        found.append((first, one.as_strided((count, *one.shape), (distance, *one.stride()), one.storage_offset())))
        first += count
    return found


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """All views, [V, N, K]: as they lie where that is one run, copied otherwise."""
    found = runs(rows)
    return found[0][1] if len(found) == 1 else torch.stack(list(rows))


def groups_of(rows: int, blocks: int, processors: int) -> tuple[int, int]:
    """Rows of a program, and the number of such groups: about eight programs for each multiprocessor."""
    groups = min(rows, triton.cdiv(8 * processors, blocks))
    size = triton.cdiv(rows, groups)
    return size, triton.cdiv(rows, size)


def _distance(one: Tensor, other: Tensor) -> int | None:
    """Elements from `one` on to `other` within one storage; None where they lie apart, or differ in strides."""
    same = one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.stride() == other.stride()
    distance = other.storage_offset() - one.storage_offset()
    return distance if same and distance >= 0 else None
