"""The contrastive losses that hsv is measured against, each as a function that its library or its paper defines."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DEVICE, Returned

TEMPERATURE = 0.1

Loss = Callable[..., Tensor]


def compiled(function: Callable[..., Returned]) -> Callable[[], Callable[..., Returned]]:
    """torch.compile of `function`, for fixed shapes and without falling back to eager parts."""
    return lambda: torch.compile(function, dynamic=False, fullgraph=True)


def autocast(function: Loss) -> Loss:
    """`function` as it runs under bfloat16 autocast."""

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return function(*inputs)

    return run


def eager_nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    """NT-Xent as it is usually written: one cross-entropy over the masked similarity matrix."""
    n = z0.shape[0]
    z = F.normalize(torch.cat([z0, z1]))
    logits = z @ z.T / TEMPERATURE
    logits.fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def lightly_nt_xent() -> Loss:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=TEMPERATURE)


def metric_learning_nt_xent() -> Loss:
    """pytorch-metric-learning: one label for both views of an image."""
    from pytorch_metric_learning.losses import NTXentLoss

    loss = NTXentLoss(temperature=TEMPERATURE)

    def run(z0: Tensor, z1: Tensor) -> Tensor:
        labels = torch.arange(z0.shape[0], device=z0.device).repeat(2)
        return loss(torch.cat([z0, z1]), labels)

    return run


def solo_learn_nt_xent() -> Loss:
    """solo-learn's form of SimCLR: exponentials of all similarities, summed under masks of equal and other indices."""

    def run(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]))
        index = torch.arange(z0.shape[0], device=z.device).repeat(2)
        same = (index[:, None] == index).float()
        others = 1 - same
        exponentials = torch.exp(z @ z.T / TEMPERATURE)
        positive = (exponentials * same.fill_diagonal_(0)).sum(1)
        return -torch.log(positive / (positive + (exponentials * others).sum(1))).mean()

    return run


def chunked_nt_xent() -> Loss:
    """torch's chunked linear_cross_entropy, which cannot leave column i out of row i: it comes off afterwards.

    With S_ii as the target its loss is l = log Σ_j exp S_ij − S_ii, so log Σ_{j≠i} exp S_ij = S_ii + log(exp l − 1).
    """
    cross_entropy, options = _linear_cross_entropy()

    def run(z0: Tensor, z1: Tensor) -> Tensor:
        z = F.normalize(torch.cat([z0, z1]))
        scaled = z / TEMPERATURE
        rows = torch.arange(z.shape[0], device=z.device)
        with_self = cross_entropy(scaled, z, rows, reduction="none", options=options)
        difference = (scaled * (z - z.roll(z0.shape[0], 0))).sum(1)  # S_ii − S_i,pos(i)
        return (torch.log(torch.expm1(with_self)) + difference).mean()

    return run


def eager_queue(q: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """MoCo's loss against a queue: the positive is the first of 1 + K classes."""
    logits = torch.cat([(q * positive).sum(1, keepdim=True), q @ queue.T], 1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(q.shape[0], dtype=torch.long, device=q.device))


def chunked_queue() -> Loss:
    """torch's chunked linear_cross_entropy over the keys of the batch and the queue."""
    cross_entropy, options = _linear_cross_entropy()

    def run(q: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
        rows = torch.arange(q.shape[0], device=q.device)
        return cross_entropy(q / TEMPERATURE, torch.cat([positive, queue]), rows, options=options)

    return run


def _linear_cross_entropy() -> tuple[Loss, object]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    return F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
