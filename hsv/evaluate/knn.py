"""Nearest neighbours by cosine similarity, and the accuracy of their vote."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv.evaluate.checks import check_features, check_labelled

__all__ = ["Neighbours", "knn_accuracy", "nearest_neighbours"]


class Neighbours(NamedTuple):
    similarity: Tensor  # [n, k] float32, cosine, largest first
    index: Tensor  # [n, k] int64, rows of the bank


def nearest_neighbours(
    bank: Tensor, queries: Tensor, k: int, *, chunk: int = 1024, exclude_self: bool = False
) -> Neighbours:
    """The k rows of bank [m, D] most similar to each row of queries [n, D], by cosine.

    chunk: queries compared at a time; extra memory is chunk × m float32 values.
    exclude_self: queries are the bank itself, and no row is its own neighbour.
    """
    bank, queries = check_features(bank, "bank"), check_features(queries, "queries")
    if bank.shape[1] != queries.shape[1]:
        raise ValueError(f"queries: got width {queries.shape[1]}; allowed: that of the bank, {bank.shape[1]}")
    if exclude_self and len(bank) != len(queries):
        raise ValueError(f"queries: got {len(queries)} rows; allowed with exclude_self: those of the bank, {len(bank)}")
    most = len(bank) - int(exclude_self)
    if not 1 <= k <= most:
        raise ValueError(f"k: got {k}; allowed: 1 to {most} for a bank of {len(bank)} rows")
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    parts = []
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T  # [chunk, m]
        if exclude_self:
            similarity.diagonal(start).fill_(-torch.inf)
        parts.append(similarity.topk(k, dim=1))
    return Neighbours(*(torch.cat(part) for part in zip(*parts, strict=True)))


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class gets most votes; each of the k nearest votes exp(cosine / temperature).

    bank [m, D], queries [n, D], integer labels [m] and [n]. The weighted vote of Wu et al. 2018. A class that
    the bank lacks counts as missed. A bank of fewer than k rows votes with all it has.
    """
    bank, bank_labels = check_labelled(bank, bank_labels, "bank")
    queries, labels = check_labelled(queries, labels, "queries")
    if not temperature > 0:
        raise ValueError(f"temperature: got {temperature}; allowed: numbers > 0")
    similarity, index = nearest_neighbours(bank, queries, min(k, len(bank)))
    classes, position = bank_labels.unique(return_inverse=True)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # [n, k], the nearest one votes 1
    votes = torch.zeros(len(queries), len(classes), device=weight.device)
    votes.scatter_add_(1, position[index], weight)
    return (classes[votes.argmax(1)] == labels).double().mean().item()
