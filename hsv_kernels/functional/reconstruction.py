"""MAE's loss and the pixels that it predicts."""

from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import REDUCTIONS, check_choice, check_floating, check_same, patch_grid
from hsv_kernels.ops.reconstruction import function as reconstruction

__all__ = ["denormalise_patches", "masked_mse"]


def masked_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    *,
    norm_pix: bool = True,
    reduction: str = "mean",
    backend: Backend | None = None,
) -> Tensor:
    """Mean squared error on masked patches, the targets read straight from the image (MAE; He et al., 2022).

        loss = Σ_bl mask_bl · mean_pixels (pred_bl − target_bl)² / Σ_bl mask_bl

    With norm_pix each target patch x is (x − mean) / sqrt(var + 1e-6), var unbiased.

    Args:
        pred: [B, L, p·q·C], pixels in (p, q, c) order.
        images: [B, C, H, W]; they get no gradient.
        mask: [B, L] of any real dtype, 1 = masked and counted, 0 = visible and left out (neither read nor counted,
            whatever it holds); any non-negative weight works.
        patch_size: pixels, one number or (p, q), dividing H and W.
        norm_pix: normalise each target patch by its own mean and deviation.
        reduction: "mean" as above (0 where nothing is masked), "sum" of the numerator, or "none" for [B, L] values.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None follows `use_backend`.

    Returns:
        float64 for float64 predictions, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, images or a mask that require grad, norm_pix with one
            value per patch.
    """
    p, q = patch_grid(images, patch_size)
    grid = (images.shape[2] // p) * (images.shape[3] // q)
    values = p * q * images.shape[1]
    check_floating("pred", pred)
    if pred.shape != (images.shape[0], grid, values):
        raise ValueError(f"pred must be {[images.shape[0], grid, values]} for these images; got {list(pred.shape)}")
    if not isinstance(mask, Tensor) or mask.is_complex() or mask.shape != pred.shape[:2]:
        given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must be a real tensor {list(pred.shape[:2])}; got {given}")
    check_same("images", images, "pred", pred, dtype=False)
    check_same("mask", mask, "pred", pred, dtype=False)
    if images.requires_grad:
        raise ValueError("images must not require grad: they are the target; pass images.detach()")
    if mask.requires_grad:
        raise ValueError("mask must not require grad: it gets no gradient; pass mask.detach()")
    if norm_pix and values < 2:
        raise ValueError(
            f"norm_pix needs at least two values in a patch; got {values} (the unbiased variance of one is NaN)"
        )
    check_choice("reduction", reduction, REDUCTIONS)
    name = resolve("reconstruction", pred, backend)
    return reconstruction.masked_mse(pred, images, mask, p, q, norm_pix, reduction, backend=name)


def denormalise_patches(
    pred: Tensor, images: Tensor, patch_size: int | tuple[int, int], *, norm_pix: bool = True
) -> Tensor:
    """Turns predicted patches into an image, undoing norm_pix with each patch's own mean and deviation.

    Args:
        pred: [B, L, p·q·C], pixels in (p, q, c) order.
        images: [B, C, H, W] that the predictions belong to.
        patch_size: pixels, one number or (p, q), dividing H and W.
        norm_pix: as in the loss; False only folds the patches.

    Returns:
        [B, C, H, W] of the dtype of `pred`.

    Raises:
        ValueError: shapes that do not fit.
    """
    p, q = patch_grid(images, patch_size)
    rows, columns = images.shape[2] // p, images.shape[3] // q
    expected = (images.shape[0], rows * columns, p * q * images.shape[1])
    check_floating("pred", pred)
    if pred.shape != expected:
        raise ValueError(f"pred must be {list(expected)} for these images; got {list(pred.shape)}")
    check_same("images", images, "pred", pred, dtype=False)
    if norm_pix and expected[2] < 2:
        raise ValueError("norm_pix needs at least two values in a patch; got 1 (the unbiased variance of one is NaN)")
    return reconstruction.denormalise_patches(pred, images, p, q, norm_pix)
