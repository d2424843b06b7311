"""One loss out of several."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hsv.config import WeightingConfig

__all__ = ["Weighting"]

BOUND = 4.0  # learned weights lie in [1 / BOUND, BOUND]


class Weighting(nn.Module):
    """Weighted sum of losses that were divided by their value at chance.

    `uncertainty` (after Kendall et al. 2018, arXiv:1705.07115) learns s_i = ln 4 · tanh(u_i) in

        total = Σ_i exp(−s_i) · L_i + s_i

    whose minimum over s_i is a weight of 1 / L_i; the bound keeps it in [1/4, 4] without a dead gradient.
    `fixed` multiplies by given numbers. A single objective has weight 1.
    """

    def __init__(self, names: list[str], config: WeightingConfig) -> None:
        super().__init__()
        self.names = names
        self.learned = config.kind == "uncertainty" and len(names) > 1
        fixed = [1.0 if len(names) == 1 else config.fixed.get(name, 1.0) for name in names]
        self.register_buffer("fixed", torch.tensor(fixed), persistent=False)
        if self.learned:
            self.u = nn.Parameter(torch.zeros(len(names)))

    def log_scales(self) -> Tensor:
        """s, one per objective."""
        return math.log(BOUND) * torch.tanh(self.u)

    def weights(self) -> Tensor:
        """Current weight of each objective, without gradient."""
        return torch.exp(-self.log_scales().detach()) if self.learned else self.fixed

    def forward(self, losses: Tensor) -> Tensor:
        """Losses relative to chance, one per objective, to the scalar that is differentiated."""
        if not self.learned:
            return (self.fixed * losses).sum()
        scales = self.log_scales()
        return (torch.exp(-scales) * losses + scales).sum()
