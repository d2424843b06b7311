"""The losses as modules."""

import torch
from torch import Tensor, nn

from hsv_kernels.backends import Backend
from hsv_kernels.functional import masked_mse, nt_xent

__all__ = ["MaskedMSELoss", "NTXentLoss"]


class NTXentLoss(nn.Module):
    """NT-Xent over two views; see :func:`hsv_kernels.nt_xent` for the equation.

    Args:
        temperature: positive number, or a 0-dim tensor or parameter, which may be learned.
        reduction: "mean" over the 2N anchors, "sum", or "none" for [2N] values.
        dot_dtype: torch.bfloat16 for bfloat16 products of float32 embeddings; None follows the embeddings.
        backend: None follows `use_backend`.
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        reduction: str = "mean",
        dot_dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.reduction = reduction
        self.dot_dtype = dot_dtype
        self.backend = backend

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return nt_xent(
            *(z0, z1, self.temperature),
            reduction=self.reduction,
            dot_dtype=self.dot_dtype,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        shown = "learned" if isinstance(self.temperature, torch.Tensor) else self.temperature
        return f"temperature={shown}, reduction={self.reduction!r}"


class MaskedMSELoss(nn.Module):
    """Mean squared error on masked patches; see :func:`hsv_kernels.masked_mse` for the equation.

    Args:
        patch_size: pixels, one number or (height, width).
        norm_pix: normalise each target patch by its own mean and deviation.
        reduction: "mean" over masked patches, "sum", or "none" for [B, L] values.
        backend: None follows `use_backend`.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        *,
        norm_pix: bool = True,
        reduction: str = "mean",
        backend: Backend | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix = norm_pix
        self.reduction = reduction
        self.backend = backend

    def forward(self, pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return masked_mse(
            *(pred, images, mask, self.patch_size),
            norm_pix=self.norm_pix,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, norm_pix={self.norm_pix}, reduction={self.reduction!r}"
