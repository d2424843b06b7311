"""Self-distillation whose loss, centre and Sinkhorn–Knopp range over all ranks."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hsv_kernels import functional
from hsv_kernels.backends import Backend
from hsv_kernels.distributed.collectives import (
    all_reduce_sum,
    logsumexp_over_ranks,
    mean_over_ranks,
    no_rows,
    world_size,
)

__all__ = ["distillation_loss", "sinkhorn_centre"]


def distillation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    centre: Tensor | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    weights: Tensor | None = None,
    samples: int | None = None,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """`hsv_kernels.distillation_loss` over the rows of all ranks, and the teacher's mean over them.

        loss = Σ_n w_n l_n / Σ_n w_n,   or Σ_n w_n l_n / Σ samples,   sums over all ranks

    Args:
        student, teacher: logits of this rank's N rows, which may differ between ranks and may be 0.
        student_temperature, teacher_temperature, centre, pairs, weights, backend: as in the plain function.
        samples: what this rank adds to the divisor in place of Σ w_n. With w_n = 1 / (masked patches of the image) and
            samples the rank's images, the loss is iBOT's: the mean over all images, 0 for one without masked patches.

    Returns:
        The loss, equal on all ranks, and the mean [K] of the teacher's logits over all ranks' rows; both are 0 where
        no rank has rows.

    Raises:
        ValueError, BackendError: as the plain function.
    """
    students, teachers = ([x] if isinstance(x, Tensor) else list(x) for x in (student, teacher))
    rows, like = teachers[0].shape[-2], teachers[0]
    if rows:
        total, mean = functional.distillation_loss(
            *(students, teachers),
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            centre=centre,
            pairs=pairs,
            weights=weights,
            reduction="sum",
            backend=backend,
        )
    else:
        dtype = torch.promote_types(like.dtype, torch.float32)
        total, mean = no_rows(*students).to(dtype), like.new_zeros(like.shape[-1], dtype=dtype)
    if samples is None:
        samples = rows if weights is None else weights.sum(dtype=total.dtype)
    return mean_over_ranks(total, samples), _row_mean(mean, rows)


def _row_mean(mean: Tensor, rows: int) -> Tensor:
    """The mean [K] over the rows of all ranks, from this rank's over its own; 0 where there are none."""
    if world_size() == 1:
        return mean
    sums = all_reduce_sum(torch.cat([mean * rows, mean.new_full((1,), rows)]))
    return sums[:-1] / sums[-1].clamp_min(1)


def sinkhorn_centre(
    teacher: Tensor | Sequence[Tensor],
    temperature: float | Tensor,
    *,
    iterations: int = 3,
    backend: Backend | None = None,
) -> Tensor:
    """`hsv_kernels.sinkhorn_centre` with the samples of all ranks, of which this one may have none.

    A prototype's sum over ranks is a log-sum-exp of theirs, so that no rank's exponentials overflow. Without samples on
    any rank the centre is −inf, which a loss without rows does not read.
    """
    options = {"iterations": iterations, "reduce": logsumexp_over_ranks, "backend": backend}
    return functional.sinkhorn_centre(teacher, temperature, **options)
