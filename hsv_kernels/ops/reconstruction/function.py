"""The masked mean squared error as a custom operator with its gradient."""

from torch import Tensor

from hsv_kernels.ops.reconstruction import reference
from hsv_kernels.ops.reconstruction.reference import denormalise_patches

__all__ = ["denormalise_patches", "masked_mse"]


def masked_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    p: int,
    q: int,
    norm_pix: bool,
    reduction: str,
    *,
    backend: str,
) -> Tensor:
    return reference.masked_mse(pred, images, mask, p, q, norm_pix, reduction)
