"""The public functions: each checks its input, chooses a backend and calls the operation."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import (
    check_choice,
    check_dot_dtype,
    check_floating,
    check_integer,
    check_same,
    check_scalar,
    check_shape,
    patch_grid,
)
from hsv_kernels.ops.contrast import function as contrast
from hsv_kernels.ops.cosine import function as cosine
from hsv_kernels.ops.distillation import function as distillation
from hsv_kernels.ops.masking import function as masking
from hsv_kernels.ops.reconstruction import function as reconstruction
from hsv_kernels.rows import unit_rows

__all__ = [
    "denormalise_patches",
    "distillation_loss",
    "gather_patches",
    "gather_tokens",
    "info_nce",
    "masked_mse",
    "negative_cosine",
    "nt_xent",
    "random_masking",
    "restore_tokens",
    "similarity_logsumexp",
    "sinkhorn_centre",
]

REDUCTIONS = ("mean", "sum", "none")


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    reduction: str = "mean",
    dot_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """NT-Xent, the contrastive loss of SimCLR (Chen et al., 2020), without the 2N × 2N similarity matrix.

    With z the L2-normalised rows of [z0; z1], S = z zᵀ / temperature and pos(i) the other view of i:

        loss_i = log Σ_{j≠i} exp S_ij − S_i,pos(i)

    Args:
        z0, z1: [N, D] embeddings of two views, float32, float64, bfloat16 or float16; normalised inside.
        temperature: positive number, or a 0-dim tensor, which may require grad and whose value the host never reads
            (a value that is not positive and finite then gives NaN).
        reduction: "mean" over the 2N anchors, "sum", or "none" for [2N] values, z0's anchors first.
        dot_dtype: torch.bfloat16 takes bfloat16 products of float32 embeddings, faster where the machine has them
            (float32 products serve CPUs that have none); None takes products of the embeddings' type. Sums, norms and
            positives are float32 either way.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        float64 for float64 input, float32 otherwise. A single pair has no negative: its loss is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, a temperature out of range.
        BackendError: a named backend that cannot serve the call.
    """
    check_floating("z0", z0)
    check_shape("z0", z0, "N", "D")
    check_floating("z1", z1)
    if z1.shape != z0.shape:
        raise ValueError(f"z1 must have the shape of z0, {list(z0.shape)}; got {list(z1.shape)}")
    check_same("z1", z1, "z0", z0)
    check_scalar("temperature", temperature, z0, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    bfloat16 = check_dot_dtype(dot_dtype, z0)
    return contrast.nt_xent(z0, z1, temperature, bfloat16, reduction, backend=resolve("contrast", z0, backend))


def similarity_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    exclude_self: bool = False,
    self_offset: int = 0,
    positive: Tensor | None = None,
    q_labels: Tensor | None = None,
    k_labels: Tensor | None = None,
    dot_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp of scaled similarities, the primitive of contrastive losses.

        lse_i = log Σ_{j ∈ C(i)} exp(scale · q_i · k_j)

    C(i) is every key, less column i + self_offset with exclude_self, less the positive, less columns of an equal label.
    Nothing is normalised here.

    Args:
        q: [n, D] queries.
        k: [m, D] keys of any strides; None is k = q, whose gradient is the sum of both roles. Keys that require no
            gradient cost none: backward does not read them, so that a queue may be overwritten before it.
        scale: finite number of any sign, or a 0-dim tensor, which may require grad; 1 / temperature in most losses.
        exclude_self: leave column i + self_offset out of row i.
        positive: int64 [n], a column of k for each query, or rows [n, D]; left out of the sum.
        q_labels, k_labels: integers [n] and [m]; columns whose label equals the row's are left out.
        dot_dtype: torch.bfloat16 takes bfloat16 products of float32 rows, faster where the machine has them (float32
            products serve CPUs that have none); None takes products of the rows' type. Sums and positives are float32
            either way.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        lse [n]; with `positive` (d, positive_logit), both [n], where positive_logit = scale · q_i · positive_i and
        d = lse − positive_logit. float64 for float64 input, float32 otherwise. A row without candidates gives −inf and
        a zero gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        IndexError: a positive column that k does not have (on the CPU, and elsewhere with HSV_CHECK=1, which waits for
            the device; undefined without).
        BackendError: a named backend that cannot serve the call.
    """
    check_floating("q", q)
    check_shape("q", q, "n", "D")
    keys = q if k is None else k
    if k is not None:
        check_floating("k", k)
        check_shape("k", k, "m", "D")
        if k.shape[1] != q.shape[1]:
            raise ValueError(f"k must have the {q.shape[1]} dimensions of q; got {k.shape[1]}")
        check_same("k", k, "q", q)
    check_scalar("scale", scale, q, positive=False)
    check_integer("self_offset", self_offset)
    if self_offset and not exclude_self:
        raise ValueError(f"self_offset needs exclude_self=True; got self_offset={self_offset} without it")
    _check_positive(positive, q)
    _check_labels(q_labels, k_labels, q, keys)
    bfloat16 = check_dot_dtype(dot_dtype, q)
    form = contrast.Form(exclude_self, self_offset, positive, q_labels, k_labels, bfloat16)
    return contrast.similarity_logsumexp(q, k, scale, form, backend=resolve("contrast", q, backend))


def _check_positive(positive: Tensor | None, q: Tensor) -> None:
    if positive is None:
        return
    if not isinstance(positive, Tensor):
        raise ValueError(f"positive must be an int64 tensor [n] or rows [n, D]; got {type(positive).__name__}")
    if positive.dtype == torch.int64:
        check_shape("positive", positive, "n")
        check_same("positive", positive, "q", q, dtype=False)
    else:
        check_floating("positive", positive)
        check_shape("positive", positive, "n", "D")
        check_same("positive", positive, "q", q)
    if positive.shape != q.shape[: positive.dim()]:
        raise ValueError(f"positive must be int64 [n] or rows [n, D] for q {list(q.shape)}; got {list(positive.shape)}")


def _check_labels(q_labels: Tensor | None, k_labels: Tensor | None, q: Tensor, k: Tensor) -> None:
    if (q_labels is None) != (k_labels is None):
        raise ValueError("q_labels and k_labels go together; got one of them")
    for name, labels, rows in (("q_labels", q_labels, q), ("k_labels", k_labels, k)):
        if labels is None:
            continue
        wrong = not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex()
        if wrong or labels.shape != rows.shape[:1]:
            given = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(f"{name} must be integers [{rows.shape[0]}]; got {given}")
        check_same(name, labels, "q", q, dtype=False)


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    normalise: bool = True,
    reduction: str = "mean",
    dot_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """InfoNCE of queries against keys: MoCo v2 with a queue (He et al., 2020), MoCo v3 without (Chen et al., 2021).

    With S_ij = q_i · k_j / temperature and N_i the negatives of query i, which are the rows of the queue or, without
    one, the keys of the other queries:

        loss_i = log(exp S_ii + Σ_{j ∈ N_i} exp S_ij) − S_ii

    The queue is not concatenated, nor copied but by the reference backend, and backward does not read it, so that
    `KeyQueue.push` may come before it. MoCo v3's published loss is 2 · temperature times this one, for both orders of
    the views: the caller scales and adds.

    Args:
        q: [N, D] queries of any floating dtype.
        k: [N, D] keys, k_i the positive of q_i. From a teacher they require no gradient; otherwise they get theirs.
        queue: [K, D] negatives, unit rows: `normalise` leaves them as they are. Computed in the queue's dtype, else in
            the wider one of q and k.
        temperature: positive number, or a 0-dim tensor, which may require grad and whose value the host never reads.
        normalise: divide rows of q and k by max(‖row‖, 1e-12).
        reduction: "mean" over the queries, "sum", or "none" for [N] values.
        dot_dtype: torch.bfloat16 takes bfloat16 products of float32 rows, as in `nt_xent`.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        float64 for float64 rows, float32 otherwise. A single query without a queue has no negative: its loss is 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, a temperature out of range.
        BackendError: a named backend that cannot serve the call.
    """
    check_floating("q", q)
    check_shape("q", q, "N", "D")
    check_floating("k", k)
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}; got {list(k.shape)}")
    check_same("k", k, "q", q, dtype=False)
    if queue is not None:
        check_floating("queue", queue)
        check_shape("queue", queue, "K", "D")
        if queue.shape[1] != q.shape[1]:
            raise ValueError(f"queue must have the {q.shape[1]} dimensions of q; got {queue.shape[1]}")
        check_same("queue", queue, "q", q, dtype=False)
    check_choice("reduction", reduction, REDUCTIONS)
    dtype = torch.promote_types(q.dtype, k.dtype) if queue is None else queue.dtype
    check_scalar("temperature", temperature, q if queue is None else queue, positive=True)
    q, k = ((unit_rows(x, dtype) if normalise else x.to(dtype)) for x in (q, k))
    positive = torch.arange(len(q), device=q.device) if queue is None else k
    d, _ = similarity_logsumexp(
        *(q, k if queue is None else queue),
        scale=1 / temperature,
        positive=positive,
        dot_dtype=dot_dtype,
        backend=backend,
    )
    losses = F.softplus(d, threshold=40)  # log(1 + exp d); beyond, the difference from d is below double precision
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def negative_cosine(
    p: Tensor,
    z: Tensor,
    *,
    reduction: str = "mean",
    eps: float = 1e-8,
    backend: Backend | None = None,
) -> Tensor:
    """Negative cosine of predictions and targets, the loss of SimSiam (Chen & He, 2021) and BYOL (Grill et al., 2020).

        loss_i = −⟨p_i, z_i⟩ / (max(‖p_i‖, eps) · max(‖z_i‖, eps))

    SimSiam averages it over both orders of the views; BYOL's regression is 2 + 2 · loss. Both tensors get a gradient:
    the stop-gradient is the caller's `z.detach()`. Below eps a norm is the constant eps, in value and in gradient; a
    row p_i = 0 has loss 0 and the gradient −z_i / (eps · ‖z_i‖). Values are those of torch's cosine_similarity; its
    gradient differs for rows of 0 < ‖row‖ < eps, where it is not that of the value.

    Args:
        p, z: [N, D] of one dtype, float32, float64, bfloat16 or float16, and of any strides.
        reduction: "mean" over the rows, "sum", or "none" for [N] values.
        eps: the least norm, positive.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        float64 for float64 rows, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, an eps out of range.
        BackendError: a named backend that cannot serve the call.
    """
    check_floating("p", p)
    check_shape("p", p, "N", "D")
    check_floating("z", z)
    if z.shape != p.shape:
        raise ValueError(f"z must have the shape of p, {list(p.shape)}; got {list(z.shape)}")
    check_same("z", z, "p", p)
    if isinstance(eps, Tensor):
        raise ValueError(f"eps must be a number; got a tensor of shape {list(eps.shape)}")
    check_scalar("eps", eps, p, positive=True)
    check_choice("reduction", reduction, REDUCTIONS)
    return cosine.negative_cosine(p, z, float(eps), reduction, backend=resolve("cosine", p, backend))


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


def distillation_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    centre: Tensor | None = None,
    pairs: Iterable[tuple[int, int]] | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Self-distillation's cross-entropy (DINO; Caron et al., 2021; iBOT; Zhou et al., 2022) and the teacher's mean.

        q_t  = softmax((teacher_t − centre) / teacher_temperature)
        l_n  = mean over pairs (t, s) of −Σ_k q_tnk log softmax(student_s / student_temperature)_nk
        loss = Σ_n w_n l_n / Σ_n w_n

    Args:
        student: logits [S, N, K] of S views, or a sequence of tensors [N, K] or [S_i, N, K], whose views are numbered
            in order. Each tensor gets a gradient of its own; none is copied into a stack.
        teacher: logits in the same forms, T views of the same N, K and dtype; they must not require grad.
        student_temperature: positive number, or a 0-dim tensor, whose value the host never reads on a GPU (one that is
            not positive and finite gives NaN). Temperatures get no gradient.
        teacher_temperature: likewise.
        centre: [K] subtracted from the teacher's logits, None for none; `sinkhorn_centre` gives that of SwAV.
        pairs: (teacher view, student view), any number of them. None is every pair t ≠ s, as in DINO, where the first T
            student views are those of the teacher; (0, 0) where both have one view, as in iBOT.
        weights: [N] of the rows, any real dtype; None is 1 for each.
        reduction: "mean" as above (0 where the weights add up to 0), "sum" of w_n l_n, which is iBOT's loss where
            w_n = 1 / (masked patches of the image) / images, or "none" for [N] values w_n l_n.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        The loss, and the mean [K] of the teacher's logits over T and N, before centre and temperature, which is what
        DINO's centre is a moving average of; it has no gradient. float64 for float64 logits, float32 otherwise.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty batch, a pair of views that are not there, a
            temperature out of range, a teacher, centre, temperature or weights that require grad.
        BackendError: a named backend that cannot serve the call.
    """
    students, teachers = _logits("student", student), _logits("teacher", teacher)
    like = students[0]
    if teachers[0].shape[-2:] != like.shape[-2:]:
        raise ValueError(
            f"teacher must have rows and columns [N, K] of student, {list(like.shape[-2:])}; "
            f"got {list(teachers[0].shape[-2:])}"
        )
    check_same("teacher", teachers[0], "student", like)
    N, K = like.shape[-2:]
    _check_vector("centre", centre, K, like)
    _check_vector("weights", weights, N, like)
    for name, value in (("student_temperature", student_temperature), ("teacher_temperature", teacher_temperature)):
        check_scalar(name, value, like, positive=True)
    constants = {"teacher_temperature": teacher_temperature, "student_temperature": student_temperature}
    _check_constants(teacher=teachers, centre=centre, weights=weights, **constants)
    chosen = _pairs(pairs, distillation.count_views(teachers), distillation.count_views(students))
    check_choice("reduction", reduction, REDUCTIONS)
    temperatures = student_temperature, teacher_temperature
    name = resolve("distillation", like, backend)
    return distillation.distillation_loss(
        students, teachers, *temperatures, centre, chosen, weights, reduction, backend=name
    )


def sinkhorn_centre(
    teacher: Tensor | Sequence[Tensor],
    temperature: float | Tensor,
    *,
    iterations: int = 3,
    reduce: Callable[[Tensor], Tensor] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sinkhorn–Knopp (SwAV; Caron et al., 2020) as a centre for `distillation_loss`.

    Its assignments are exp(t_ik / temperature − u_i − v_k), and its last step normalises each sample: they are the
    softmax of (t_i − c) / temperature with c = temperature · v. From u = 0, `iterations` times, the second step of the
    last time being left to that softmax:

        v_k = log Σ_i exp(t_ik / temperature − u_i)        prototypes
        u_i = log Σ_k exp(t_ik / temperature − v_k)        samples

    Args:
        teacher: logits [N, K] or [T, N, K], or a sequence of these, whose T · N rows are the samples, none of them
            only with `reduce`; they must not require grad.
        temperature: positive number, or a 0-dim tensor, whose value the host never reads on a GPU (one that is not
            positive and finite gives NaN); the teacher_temperature of the loss, SwAV's epsilon.
        iterations: how often prototypes and samples are normalised, 1 or more; SwAV's 3.
        reduce: maps v [K], logs of sums over this process's samples (−inf where it has none), to the logs of the sums
            over those of all.
        backend: "auto", "reference", "cpu" or "triton"; None follows `use_backend`.

    Returns:
        centre [K], float64 for float64 logits, float32 otherwise; without a gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, no samples, fewer than one iteration, a temperature out
            of range, a teacher or a temperature that requires grad.
        BackendError: a named backend that cannot serve the call.
    """
    teachers = _logits("teacher", teacher, least=0 if reduce else 1)
    check_scalar("temperature", temperature, teachers[0], positive=True)
    _check_constants(teacher=teachers, temperature=temperature)
    check_integer("iterations", iterations)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    name = resolve("distillation", teachers[0], backend)
    return distillation.sinkhorn_centre(teachers, temperature, iterations, reduce, backend=name)


def _logits(name: str, logits: Tensor | Sequence[Tensor], *, least: int = 1) -> list[Tensor]:
    """`logits` as a list of tensors [N, K] and [views, N, K] of one N, K, dtype and device; N is `least` or more."""
    tensors = [logits] if isinstance(logits, Tensor) else list(logits)
    if not tensors:
        raise ValueError(f"{name} must be a tensor or a sequence of tensors; got none")
    for tensor in tensors:
        check_floating(name, tensor)
        empty = tensor.dim() > 1 and (tensor.shape[-2] < least or 0 in (*tensor.shape[:-2], tensor.shape[-1]))
        if tensor.dim() not in (2, 3) or empty or tensor.shape[-2:] != tensors[0].shape[-2:]:
            raise ValueError(
                f"{name} must be [N, K] or [views, N, K], of one N and K and without an empty dimension; "
                f"got {', '.join(str(list(x.shape)) for x in tensors)}"
            )
        check_same(f"each of {name}", tensor, "the first", tensors[0])
    return tensors


def _check_vector(name: str, vector: Tensor | None, size: int, like: Tensor) -> None:
    if vector is None:
        return
    if not isinstance(vector, Tensor) or vector.is_complex() or vector.shape != (size,):
        given = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"{name} must be None or a real tensor [{size}]; got {given}")
    check_same(name, vector, "the logits", like, dtype=False)


def _check_constants(**values: object) -> None:
    """Of these arguments, tensors and lists of them, none may require a gradient."""
    for name, value in values.items():
        for x in value if isinstance(value, list) else (value,):
            if isinstance(x, Tensor) and x.requires_grad:
                raise ValueError(f"{name} must not require grad: it gets no gradient; pass {name}.detach()")


def _pairs(pairs: Iterable[tuple[int, int]] | None, T: int, S: int) -> list[tuple[int, int]]:
    """Pairs (teacher view, student view) of T and S views, checked."""
    if pairs is None:
        return [(t, s) for t in range(T) for s in range(S) if t != s] or [(0, 0)]
    chosen = [tuple(pair) for pair in pairs]
    for pair in chosen:
        if len(pair) != 2 or not (0 <= pair[0] < T and 0 <= pair[1] < S):
            raise ValueError(f"pairs must be (teacher, student) below ({T}, {S}); got {pair}")
    if not chosen:
        raise ValueError("pairs must name at least one (teacher, student); got none")
    return chosen
