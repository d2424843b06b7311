"""Pairs of rows that share a label, in memory that grows with the pairs and not with all rows against all."""

import torch
from torch import Tensor

__all__ = ["class_numbers", "logsumexp_by_anchor", "matching_pairs", "pair_logits"]


def class_numbers(labels: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [n] and [m] of any dtype as 0 … classes − 1, equal where they are equal."""
    both = torch.cat([labels, other]).unique(return_inverse=True)[1]
    return both[: len(labels)], both[len(labels) :]


def matching_pairs(labels: Tensor, other: Tensor, self_offset: int | None = None) -> tuple[Tensor, Tensor]:
    """All (i, j) with labels_i = other_j, int64 [P] each; without j = i + self_offset if one is given.

    labels [n] and other [m] are integers. Their number is read: this waits for the device.
    """
    values, order = other.sort(stable=True)
    first = torch.searchsorted(values, labels)
    counts = torch.searchsorted(values, labels, right=True) - first
    i = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
    place = torch.arange(len(i), device=labels.device) - (counts.cumsum(0) - counts)[i]
    j = order[first[i] + place]
    if self_offset is None:
        return i, j
    others = i + self_offset != j
    return i[others], j[others]


def pair_logits(q: Tensor, k: Tensor, i: Tensor, j: Tensor, scale: float | Tensor) -> Tensor:
    """scale · q_i · k_j [P], in float32 at least: from gathered rows, or from all products where these are fewer."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    if len(i) * q.shape[1] <= len(q) * len(k):
        return (q[i] * k[j]).sum(1) * scale
    return (q @ k.T)[i, j] * scale


def logsumexp_by_anchor(logits: Tensor, anchor: Tensor, anchors: int) -> Tensor:
    """log Σ exp of the logits [P] of each anchor, [anchors]; −inf for one without any, NaN for one with a NaN."""
    with torch.no_grad():
        most = logits.new_full((anchors,), -torch.inf).scatter_reduce(0, anchor, logits, "amax")
        shift = most.where(most > -torch.inf, 0)
    total = logits.new_zeros(anchors).index_add(0, anchor, (logits - shift[anchor]).exp())
    return total.where(total != 0, 1).log().where(total != 0, -torch.inf) + shift
