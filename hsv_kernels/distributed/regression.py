"""Regression losses, means over the rows of all ranks."""

from torch import Tensor

from hsv_kernels import functional
from hsv_kernels.backends import Backend
from hsv_kernels.distributed.collectives import mean_over_ranks, no_rows, world_size

__all__ = ["masked_mse", "negative_cosine"]


def negative_cosine(p: Tensor, z: Tensor, *, eps: float = 1e-8, backend: Backend | None = None) -> Tensor:
    """`hsv_kernels.negative_cosine`, the mean over the rows of all ranks, of which this one may have none."""
    options = {"eps": eps, "backend": backend}
    if world_size() == 1:
        return functional.negative_cosine(p, z, **options)
    total = functional.negative_cosine(p, z, reduction="sum", **options) if len(p) else no_rows(p, z)
    return mean_over_ranks(total, len(p))


def masked_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    *,
    norm_pix: bool = True,
    backend: Backend | None = None,
) -> Tensor:
    """`hsv_kernels.masked_mse` over the masked patches of all ranks: Σ mask · error / Σ mask, both over all ranks.

    The batch may be empty on a rank. Arguments and errors are those of the plain function.
    """
    options = {"norm_pix": norm_pix, "backend": backend}
    if world_size() == 1:
        return functional.masked_mse(pred, images, mask, patch_size, **options)
    if not len(pred):
        return mean_over_ranks(no_rows(pred), 0)
    total = functional.masked_mse(pred, images, mask, patch_size, reduction="sum", **options)
    return mean_over_ranks(total, mask.sum(dtype=total.dtype))
