"""Contrastive losses whose negatives come from all ranks."""

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

__all__ = ["Negatives", "nt_xent"]

#: Where negatives come from: all ranks, gathered at once or passed round a ring, or this rank's own rows.
Negatives = Literal["gather", "ring", "local"]


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    negatives: Negatives = "gather",
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
    z = _unit(torch.cat([z0, z1]))
    other_view = torch.arange(2 * n, device=z.device).roll(n)
    return _mean_loss(z, z, other_view, temperature, True, negatives, dot_dtype, backend)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, computed in at least float32 and rounded to the type of `x`."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), eps=1e-12).to(x.dtype)


def _mean_loss(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    temperature: float | Tensor,
    exclude_self: bool,
    negatives: Negatives,
    dot_dtype: torch.dtype | None,
    backend: Backend | None,
) -> Tensor:
    """The mean of softplus(d) over all ranks, with d = log Σ_negatives exp − the positive's logit."""
    check_scalar("temperature", temperature, q, positive=True)
    if isinstance(temperature, Tensor):
        temperature = temperature.where((temperature > 0) & (temperature < torch.inf), torch.nan)
    difference = ring_difference if negatives == "ring" else _gathered_difference
    d = difference(q, k, positive, 1 / temperature, exclude_self, dot_dtype, backend)
    return mean_over_ranks(-F.logsigmoid(-d).sum(), len(q))


def _gathered_difference(
    q: Tensor,
    k: Tensor,
    positive: Tensor,
    scale: float | Tensor,
    exclude_self: bool,
    dot_dtype: torch.dtype | None,
    backend: Backend | None,
) -> Tensor:
    """As `ring_difference`, with the keys of all ranks at once."""
    counts = row_counts(k)
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
