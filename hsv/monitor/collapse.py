"""Two numbers that tell whether an encoder still tells images apart, and the sentence that they come to."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["collapse_verdict", "effective_rank", "feature_spread", "verdicts"]

LEAST_SPREAD, LEAST_RANK = 0.1, 2.0
STUCK = 0.99  # of the loss at chance


def _check(z: Tensor) -> Tensor:
    if z.ndim != 2 or z.shape[0] < 1:
        raise ValueError(f"z: got shape {list(z.shape)}; allowed: features [n, D] with n ≥ 1")
    return z.detach().float()


def feature_spread(z: Tensor) -> Tensor:
    """√D · mean_d std_n(z / ‖z‖), a 0-dim float32 tensor on z's device.

    z [n, D] of any floating type. 1 when the directions fill the sphere evenly, 0 when all rows point the
    same way (the measure of SimSiam, Chen and He 2021). Nothing is read on the host.
    """
    z = F.normalize(_check(z), dim=1)  # [n, D]
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


def effective_rank(z: Tensor) -> Tensor:
    """exp(−Σ p ln p) with p = σ / Σσ, σ the singular values of the centred z, a 0-dim float32 tensor.

    z [n, D] of any floating type. The number of directions in which features vary, from 1 to min(n − 1, D),
    0 when they do not vary (Roy and Vetterli 2007; on uncentred features, RankMe of Garrido et al. 2023), NaN when one
    of them is not finite.
    """
    z = _check(z)
    finite = z.isfinite().all()
    sigma = torch.linalg.svdvals((z - z.mean(0)).nan_to_num(0.0, 0.0, 0.0))  # [min(n, D)]
    p = sigma / sigma.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.where(sigma.sum() > 0, torch.special.entr(p).sum().exp(), torch.zeros_like(p[0]))
    return torch.where(finite, rank, torch.nan)


def collapse_verdict(*, spread: float | None = None, rank: float | None = None) -> str | None:
    """What to tell of features with this spread and effective rank; None when nothing is wrong with them."""
    if spread is not None and spread < LEAST_SPREAD:
        return f"collapsed: all features point the same way (feature spread {spread:.2g}, below {LEAST_SPREAD:g})"
    if rank is not None and rank < LEAST_RANK:
        return f"collapsed: features vary along one direction (effective rank {rank:.2g}, below {LEAST_RANK:g})"
    return None


def verdicts(metrics: Mapping[str, float | None], chances: Mapping[str, float]) -> list[str]:
    """Plain sentences about features that collapsed and losses that are no better than chance; none if all is well.

    Args:
        metrics: `feature_spread`, `effective_rank` and `loss/<objective>`, those that there are.
        chances: of each objective the loss of a model that knows nothing, 0 where there is no such value.
    """
    found = collapse_verdict(spread=metrics.get("feature_spread"), rank=metrics.get("effective_rank"))
    lines = [found] if found else []
    for name, chance in chances.items():
        loss = metrics.get(f"loss/{name}")
        if chance and loss is not None and loss >= STUCK * chance:
            lines.append(f"{name} has not learned: its loss is {loss:.3g}, and knowing nothing gives {chance:.3g}")
    return lines
