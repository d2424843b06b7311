"""One loss out of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hsv.config import WeightingConfig
from hsv.objectives.objective import Objective
from hsv.schedules import Progress
from hsv_kernels.distributed import all_reduce_sum, world_size

__all__ = ["Weighting"]

BOUND = 4.0  # weights that are found lie in [1 / BOUND, BOUND]
MEMORY = 0.5  # of the mean of gradient norms, per measurement


class Weighting(nn.Module):
    """Weighted sum of losses that were divided by their value at chance.

    `uncertainty` (after Kendall et al. 2018, arXiv:1705.07115) learns s_i = ln 4 · tanh(u_i) in

        total = Σ_i exp(−s_i) · L_i + s_i

    whose minimum over s_i is a weight of 1 / L_i; the bound keeps it in [1/4, 4] without a dead gradient.
    `gradient_norm` (after Chen et al. 2018, arXiv:1711.02257) measures n_i = ‖∂L_i / ∂encoder‖ every so many steps and
    weights by the geometric mean of the norms over n_i, within the same bounds. `fixed` multiplies by given numbers.
    A single objective has weight 1. What is found is kept by the objectives' names, whatever their order.

    Args:
        objectives: by name.
        config: which of them.

    Raises:
        ValueError: `uncertainty` for a loss that it would let collapse.
    """

    def __init__(self, objectives: Mapping[str, Objective], config: WeightingConfig) -> None:
        super().__init__()
        self.names, self.every, several = list(objectives), config.measure_every, len(objectives) > 1
        others = [name for name, objective in objectives.items() if not objective.error]
        if config.kind == "uncertainty" and several and others:
            raise ValueError(
                f"weighting.kind: got 'uncertainty' with {', '.join(others)}, whose loss collapse can satisfy; "
                "allowed: 'gradient_norm' or 'fixed'"
            )
        kind = config.kind
        if kind == "auto":
            kind = "gradient_norm" if others else "uncertainty"
        self.kind = kind if several else "fixed"
        fixed = [config.fixed.get(name, 1.0) if several else 1.0 for name in self.names]
        self.register_buffer("fixed", torch.tensor(fixed), persistent=False)
        if self.kind == "uncertainty":
            self.u = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in self.names})
        if self.kind == "gradient_norm":
            for name in self.names:
                self.register_buffer(f"log_norm_{name}", torch.tensor(torch.nan))

    def log_scales(self) -> Tensor:
        """s, one per objective."""
        return math.log(BOUND) * torch.tanh(torch.stack([self.u[name] for name in self.names]))

    def log_norms(self) -> list[Tensor]:
        """Mean of the logarithms of each objective's gradient norms, NaN before the first measurement."""
        return [getattr(self, f"log_norm_{name}") for name in self.names]

    def weights(self) -> Tensor:
        """Current weight of each objective, without gradient."""
        if self.kind == "uncertainty":
            return torch.exp(-self.log_scales().detach())
        if self.kind == "gradient_norm":
            log_norms = torch.stack(self.log_norms())
            balanced = torch.exp(log_norms.nanmean() - log_norms).clamp(1 / BOUND, BOUND)
            return balanced.nan_to_num(1.0)  # before the first measurement
        return self.fixed

    def describe(self) -> str:
        """The kind of weights in use."""
        if self.kind == "fixed":
            return ", ".join(f"{name} {weight:g}" for name, weight in zip(self.names, self.fixed.tolist(), strict=True))
        found = "learned" if self.kind == "uncertainty" else f"from gradient norms every {self.every} steps"
        return f"{self.kind}, {found}, within [{1 / BOUND:g}, {BOUND:g}]"

    def forward(self, losses: Tensor) -> Tensor:
        """Losses relative to chance, one per objective, to the scalar that is differentiated."""
        if self.kind != "uncertainty":
            return (self.weights() * losses).sum()
        scales = self.log_scales()
        return (torch.exp(-scales) * losses + scales).sum()

    def measures(self, progress: Progress) -> bool:
        """Whether gradients are measured in this step: the first, and then every so many."""
        due = progress.step == 0 or (progress.step + 1) % self.every == 0
        return self.training and torch.is_grad_enabled() and len(self.names) > 1 and due

    def measure(self, losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Norm of each relative loss's gradient on the encoder, and the cosine of each pair, averaged over ranks."""
        gradients = [_flat_gradient(loss, parameters) for loss in losses]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        if self.kind == "gradient_norm":
            for mean, now in zip(self.log_norms(), norms.log(), strict=True):
                moved = torch.where(mean.isnan(), now, torch.lerp(now, mean, MEMORY))
                mean.copy_(torch.where(now.isfinite(), moved, mean))  # no gradient has no length
        logs = {f"gradient/{name}": norm for name, norm in zip(self.names, norms, strict=True)}
        for i, one in enumerate(self.names):
            for j in range(i):
                lengths = (norms[i] * norms[j]).clamp_min(torch.finfo(norms.dtype).tiny)
                cosine = gradients[i] @ gradients[j] / lengths
                logs[f"gradient_cosine/{self.names[j]}·{one}"] = cosine
        return logs


def _flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the mean over ranks, as one vector."""
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    return all_reduce_sum(torch.cat([part.flatten() for part in parts])) / world_size()
