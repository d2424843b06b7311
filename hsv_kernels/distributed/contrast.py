"""Contrastive losses whose negatives come from all ranks."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv_kernels import functional
from hsv_kernels.backends import Backend
from hsv_kernels.checks import check_choice, check_scalar
from hsv_kernels.distributed.collectives import (
    all_gather_rows,
    mean_over_ranks,
    no_rows,
    rank,
    row_counts,
    world_size,
)
from hsv_kernels.distributed.ring import ring_difference
from hsv_kernels.rows import unit_rows

__all__ = ["Negatives", "info_nce", "nt_xent"]

#: Where negatives come from: all ranks, gathered at once or passed round a ring, or this rank's own rows.
Negatives = Literal["gather", "ring", "local"]


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    negatives: Negatives = "gather",
    counts: Sequence[int] | None = None,
    dot_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """NT-Xent (Chen et al., 2020), the mean over the anchors of all ranks.

    Each rank holds its own anchors against the candidates: of M rows over W ranks it computes 1/W of the M × M
    similarities.

    Args:
        z0, z1: [n, D] embeddings of this rank's images in two views; n may differ between ranks and may be 0.
        temperature: as in `hsv_kernels.nt_xent`; a learned one gets the gradient of the value as well.
        negatives: "gather" holds the rows of all ranks, O(M · D); "ring" passes them on block by block, forward and
            again backward, O(n · D), and computes a block's similarities twice; "local" takes this rank's rows alone.
        counts: n of each rank; None exchanges them, for which a GPU is waited for.
        dot_dtype, backend: as in `hsv_kernels.nt_xent`.

    Returns:
        The loss, a scalar, equal on all ranks; its gradient as the package states it.

    Raises:
        ValueError, BackendError: as `hsv_kernels.nt_xent`, and for an unknown `negatives`.
    """
    check_choice("negatives", negatives, get_args(Negatives))
    if world_size() == 1:
        return functional.nt_xent(z0, z1, temperature, dot_dtype=dot_dtype, backend=backend)
    if z1.shape != z0.shape:
        raise ValueError(f"z1 must have the shape of z0, {list(z0.shape)}; got {list(z1.shape)}")
    n = len(z0)
    if negatives == "local":
        options = {"reduction": "sum", "dot_dtype": dot_dtype, "backend": backend}
        total = functional.nt_xent(z0, z1, temperature, **options) if n else no_rows(z0, z1, temperature)
        return mean_over_ranks(total, 2 * n)
    z = unit_rows(torch.cat([z0, z1]))
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    both = None if counts is None else [2 * count for count in counts]
    return _mean_loss(z, z, other_view, temperature, True, negatives, both, dot_dtype, backend)


def info_nce(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    normalise: bool = True,
    negatives: Negatives = "gather",
    key_gradient: bool = False,
    counts: Sequence[int] | None = None,
    dot_dtype: torch.dtype | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """InfoNCE of queries against keys (MoCo), the mean over the queries of all ranks.

    With a queue (v2) a rank's queries meet that queue, which is the same on all ranks if each pushes
    `all_gather_rows(k)`. Without one (v3) the negatives are the other queries' keys.

    Args:
        q, k: [n, D] queries and keys of this rank; n may differ between ranks and may be 0.
        queue: [K, D] or None, as in `hsv_kernels.info_nce`.
        temperature, normalise, dot_dtype, backend: as in `hsv_kernels.info_nce`.
        negatives, counts: as in `nt_xent`, where there is no queue.
        key_gradient: let keys have a gradient. False detaches them, as published: they come from a teacher, and in a
            ring no gradients travel with them.

    Returns:
        The loss, a scalar, equal on all ranks; its gradient as the package states it.

    Raises:
        ValueError, BackendError: as `hsv_kernels.info_nce`, and for an unknown `negatives`.
    """
    check_choice("negatives", negatives, get_args(Negatives))
    k = k if key_gradient else k.detach()
    options = {"temperature": temperature, "normalise": normalise, "dot_dtype": dot_dtype, "backend": backend}
    if world_size() == 1:
        return functional.info_nce(q, k, queue, **options)
    if queue is not None or negatives == "local":
        some = len(q) > 0
        total = functional.info_nce(q, k, queue, reduction="sum", **options) if some else no_rows(q, k, temperature)
        return mean_over_ranks(total, len(q))
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {list(q.shape)}; got {list(k.shape)}")
    dtype = torch.promote_types(q.dtype, k.dtype)
    q, k = ((unit_rows(x, dtype) if normalise else x.to(dtype)) for x in (q, k))
    same_image = torch.arange(len(q), device=q.device)
    return _mean_loss(q, k, same_image, temperature, False, negatives, counts, dot_dtype, backend)


def _mean_loss(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    temperature: float | Tensor,
    exclude_self: bool,
    negatives: Negatives,
    counts: Sequence[int] | None,
    dot_dtype: torch.dtype | None,
    backend: Backend | None,
) -> Tensor:
    """The mean of softplus(d) over all ranks, with d = log Σ_negatives exp − the positive's logit."""
    check_scalar("temperature", temperature, q, positive=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.where((temperature > 0) & (temperature < torch.inf), torch.nan)
    difference = ring_difference if negatives == "ring" else _gathered_difference
    counts = row_counts(k) if counts is None else list(counts)
    d = difference(q, k, positive, 1 / temperature, exclude_self, counts, dot_dtype, backend)
    return mean_over_ranks(-F.logsigmoid(-d).sum(), len(q))


def _gathered_difference(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    scale: float | Tensor,
    exclude_self: bool,
    counts: list[int],
    dot_dtype: torch.dtype | None,
    backend: Backend | None,
) -> Tensor:
    """As `ring_difference`, with the keys of all ranks at once."""
    every, start = all_gather_rows(k, counts), sum(counts[: rank()])
    if not len(q):
        return (q * scale).sum(1) + no_rows(every)
    d, _ = functional.similarity_logsumexp(
        *(q, every),
        scale=scale,
        exclude_self=exclude_self,
        self_offset=start if exclude_self else 0,
        positive=positive + start,
        dot_dtype=dot_dtype,
        backend=backend,
    )
    return d
