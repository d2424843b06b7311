"""Linear probes: logistic regression on frozen features, with all labels or with a few per class."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hsv.evaluate.checks import check_labelled

__all__ = ["L2_GRID", "MeanStd", "few_label_accuracy", "linear_accuracy"]

L2_GRID = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5)


class MeanStd(NamedTuple):
    mean: float
    std: float


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    seed: int = 0,
    l2: Sequence[float] = L2_GRID,
) -> float:
    """Test accuracy of logistic regression on standardised features.

    train [m, D], test [n, D], integer labels. The weight λ of mean cross-entropy + λ/2 ‖W‖² is the value of
    `l2` that does best on a seeded 10 % of the training part (the stronger of equals); the probe is then
    fitted to the whole training part, and the test part is read once.
    """
    train, y = check_labelled(train, train_labels, "train")
    test, test_y = check_labelled(test, test_labels, "test")
    classes, y = y.unique(return_inverse=True)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).to(train.device)
    held, kept = order[: len(train) // 10], order[len(train) // 10 :]
    grid = sorted(l2, reverse=True)
    best, start = grid[len(grid) // 2], None
    if len(held):
        probes = _path(train[kept], y[kept], len(classes), grid)
        scores = [(probe.predict(train[held]) == y[held]).sum().item() for probe in probes]
        chosen = scores.index(max(scores))
        best, start = grid[chosen], probes[chosen].weight
    probe = _path(train, y, len(classes), [best], start)[-1]
    return (classes[probe.predict(test)] == test_y).double().mean().item()


def few_label_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    per_class: int = 10,
    draws: int = 10,
    seed: int = 0,
    l2: float = 1e-2,
) -> MeanStd:
    """Mean and standard deviation, over draws, of test accuracy with per_class labelled images a class.

    A class with fewer training images gives all it has. λ is fixed, since choosing it would need labels
    beyond the few; draw d of a seed takes the same images whatever the features, so that rows of a table
    are paired.
    """
    train, y = check_labelled(train, train_labels, "train")
    test, test_y = check_labelled(test, test_labels, "test")
    if per_class < 1 or draws < 1:
        raise ValueError(f"per_class, draws: got {per_class}, {draws}; allowed: whole numbers from 1")
    classes, y = y.unique(return_inverse=True)
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in range(draws):
        order = torch.randperm(len(train), generator=generator).to(y.device)
        few = torch.cat([order[y[order] == c][:per_class] for c in range(len(classes))])
        probe = _path(train[few], y[few], len(classes), [l2])[-1]
        accuracies.append((classes[probe.predict(test)] == test_y).double().mean())
    result = torch.stack(accuracies)
    return MeanStd(result.mean().item(), result.std(correction=0).item())


class _Probe(NamedTuple):
    mean: Tensor  # [D]
    std: Tensor  # [D]
    weight: Tensor  # [D + 1, classes], the last row is the bias

    def predict(self, x: Tensor) -> Tensor:
        return (((x - self.mean) / self.std) @ self.weight[:-1] + self.weight[-1]).argmax(1)


def _path(x: Tensor, y: Tensor, classes: int, l2: Sequence[float], start: Tensor | None = None) -> list[_Probe]:
    """One probe for each λ, from the strongest to the weakest, each started from the one before."""
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max().clamp_min(1e-12), std, torch.ones_like(std))
    x = (x - mean) / std
    weight = torch.zeros(x.shape[1] + 1, classes, device=x.device) if start is None else start
    probes = []
    for value in l2:
        weight = _fit(x, y, weight, value)
        probes.append(_Probe(mean, std, weight))
    return probes


def _fit(x: Tensor, y: Tensor, start: Tensor, l2: float, steps: int = 100) -> Tensor:
    """argmin over W, b of mean cross-entropy(x W + b, y) + λ/2 ‖W‖², convex, by L-BFGS from `start`."""
    weight = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [weight],
        max_iter=steps,
        history_size=10,
        tolerance_grad=1e-5,
        tolerance_change=1e-8,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight[:-1] + weight[-1], y) + l2 / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    return weight.detach()
