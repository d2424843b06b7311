"""Which patches stay, and patches and tokens taken and put back."""

import math

import torch
from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import check_floating, check_integer, check_same, check_shape, patch_grid
from hsv_kernels.ops.masking import function as masking

__all__ = ["gather_patches", "gather_tokens", "random_masking", "restore_tokens"]


def random_masking(
    batch: int,
    num_patches: int,
    *,
    num_keep: int | None = None,
    mask_ratio: float | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    first_index: int = 0,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps exactly K of L patches of each image, uniformly, without replacement (MAE; He et al., 2022).

    Patch l of image b has the 32-bit key Philox-4x32-10(seed; l, first_index + b, offset); the K smallest (key, l) are
    kept. The bits depend on these numbers alone: every backend gives the same masks.

    Args:
        batch: number of images B.
        num_patches: patches of an image L.
        num_keep: K, 1 … L. Or
        mask_ratio: share that is removed, 0 ≤ r < 1; K = max(1, floor(L (1 − r) + 1e-6)).
        seed: [0, 2^63), or a 0-dim int64 tensor read on the device; None draws one from torch's generator for
            that device, without waiting for it.
        offset: [0, 2^56), or a 0-dim int64 tensor; usually the step.
        first_index: number of the first image; a rank passes its own, or all ranks draw the same masks.
        device: where the results live.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None follows `use_backend`.

    Returns:
        ids_keep [B, K] int64 in ascending position; ids_restore [B, L] int64, the place of each patch in
        [kept, removed]; mask [B, L] float32, 1 = removed. None of them carries a gradient.

    Raises:
        ValueError: counts, ratio, seed or offset out of range, both or neither of num_keep and mask_ratio.
    """
    for name, value in (("batch", batch), ("num_patches", num_patches)):
        check_integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    keep = _num_keep(num_patches, num_keep, mask_ratio)
    check_integer("first_index", first_index)
    if first_index < 0 or first_index + batch > 2**32:
        raise ValueError(f"first_index must be in [0, 2^32 - batch]; got {first_index}")
    like = torch.empty(0, dtype=torch.float32, device=device)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=device)
    seed = _counter("seed", seed, 2**63, like.device)
    offset = _counter("offset", offset, 2**56, like.device)
    name = resolve("masking", like, backend)
    return masking.random_masking(batch, num_patches, keep, seed, offset, first_index, backend=name)


def _num_keep(num_patches: int, num_keep: int | None, mask_ratio: float | None) -> int:
    if (num_keep is None) == (mask_ratio is None):
        raise ValueError(f"give num_keep or mask_ratio, one of them; got {num_keep!r} and {mask_ratio!r}")
    if mask_ratio is not None:
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1); got {mask_ratio!r}")
        return max(1, math.floor(num_patches * (1 - mask_ratio) + 1e-6))
    check_integer("num_keep", num_keep)
    if not 1 <= num_keep <= num_patches:
        raise ValueError(f"num_keep must be in [1, {num_patches}]; got {num_keep!r}")
    return num_keep


def _counter(name: str, value: int | Tensor, limit: int, device: torch.device) -> Tensor:
    """`value` as a 0-dim int64 tensor on `device`; a tensor's value is never read here."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype != torch.int64 or value.device != device:
            raise ValueError(
                f"{name} must be an int or a 0-dim int64 tensor on {device}; "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        return value
    check_integer(name, value)
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be in [0, 2^{limit.bit_length() - 1}); got {value!r}")
    return torch.full((), value, dtype=torch.int64, device=device)


def gather_patches(
    images: Tensor, ids_keep: Tensor, patch_size: int | tuple[int, int], *, backend: Backend | None = None
) -> Tensor:
    """The chosen patches, straight from the image.

    Args:
        images: [B, C, H, W].
        ids_keep: [B, K] int64, patch numbers in row-major order of the patch grid.
        patch_size: pixels, one number or (p, q), dividing H and W.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None follows `use_backend`.

    Returns:
        [B, K, p·q·C] in (p, q, c) order, pixel-major with the channel last. A patch embedding that is a convolution has
        (c, p, q) weights: use `weight.permute(0, 2, 3, 1).flatten(1)`.

    Raises:
        ValueError: a patch that does not divide the image, shapes, dtypes or devices that do not fit.
    """
    p, q = patch_grid(images, patch_size)
    _check_ids("ids_keep", ids_keep, images, (images.shape[2] // p) * (images.shape[3] // q))
    return masking.gather_patches(images, ids_keep, p, q, backend=resolve("masking", images, backend))


def gather_tokens(tokens: Tensor, ids_keep: Tensor, *, backend: Backend | None = None) -> Tensor:
    """The chosen rows of each sequence: out[b, k] = tokens[b, ids_keep[b, k]].

    Args:
        tokens: [B, L, D].
        ids_keep: [B, K] int64, without duplicates (HSV_CHECK=1 verifies that).
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None follows `use_backend`.

    Returns:
        [B, K, D] of the dtype of `tokens`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, "B", "L", "D")
    _check_ids("ids_keep", ids_keep, tokens, tokens.shape[1])
    return masking.gather_tokens(tokens, ids_keep, backend=resolve("masking", tokens, backend))


def restore_tokens(
    tokens: Tensor, ids_restore: Tensor, mask_token: Tensor, *, backend: Backend | None = None
) -> Tensor:
    """Puts visible tokens back in their places and the mask token everywhere else (the decoder's input of MAE).

        out[b, l] = tokens[b, r] if r < K else mask_token,  r = ids_restore[b, l]

    Args:
        tokens: [B, K, D] visible tokens.
        ids_restore: [B, L] int64, a permutation of 0 … L − 1 for each image.
        mask_token: [D], or any shape with D values, [1, 1, D] for instance.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; None follows `use_backend`.

    Returns:
        [B, L, D] of the dtype that torch.cat would promote to. The mask token's gradient is a float32 sum in a fixed
        order.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_floating("tokens", tokens)
    check_shape("tokens", tokens, "B", "K", "D")
    check_floating("mask_token", mask_token)
    if mask_token.numel() != tokens.shape[2]:
        raise ValueError(f"mask_token must have D = {tokens.shape[2]} values; got {list(mask_token.shape)}")
    check_same("mask_token", mask_token, "tokens", tokens, dtype=False)
    _check_ids("ids_restore", ids_restore, tokens, None)
    if ids_restore.shape[1] < tokens.shape[1]:
        raise ValueError(f"ids_restore must have L ≥ K = {tokens.shape[1]} columns; got {ids_restore.shape[1]}")
    wider = mask_token if mask_token.dtype == torch.float64 else tokens
    return masking.restore_tokens(tokens, ids_restore, mask_token, backend=resolve("masking", wider, backend))


def _check_ids(name: str, ids: Tensor, rows: Tensor, most: int | None) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 tensor; got {getattr(ids, 'dtype', type(ids).__name__)}")
    check_shape(name, ids, "B", "K")
    if ids.shape[0] != rows.shape[0] or (most is not None and ids.shape[1] > most):
        limit = "" if most is None else f" with at most {most} columns"
        raise ValueError(f"{name} must have one row for each of {rows.shape[0]} samples{limit}; got {list(ids.shape)}")
    check_same(name, ids, "the input", rows, dtype=False)
