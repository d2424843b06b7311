"""NT-Xent, InfoNCE and the similarity + logsumexp beneath them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels.backends import Backend, resolve
from hsv_kernels.checks import (
    REDUCTIONS,
    check_choice,
    check_dot_dtype,
    check_floating,
    check_integer,
    check_rows,
    check_same,
    check_scalar,
    check_shape,
)
from hsv_kernels.ops.contrast import function as contrast
from hsv_kernels.ops.tensors import reduce_losses
from hsv_kernels.rows import unit_rows

__all__ = ["info_nce", "nt_xent", "similarity_logsumexp"]


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
    check_rows("z0", z0, "z1", z1)
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
    check_rows("q", q, "k", k, dtype=False)
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
    return reduce_losses(losses, reduction)
