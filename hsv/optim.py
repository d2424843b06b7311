"""The optimiser and its schedule, both functions of the configuration and the step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from hsv.config import Config
from hsv.objectives import Objective
from hsv.schedules import Progress

__all__ = ["adamw", "clipped_parameters", "learning_rate_factor", "set_learning_rate", "set_weight_decay"]

KINDS = ("matrices", "vectors", "weighting")
UNDECAYED = ("pos_embed", "cls_token", "reg_token", "mask_token", "temperature")


def adamw(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """AdamW in groups: matrices with decay; norms, biases, tokens and positions without; loss weights.

    Each group's `base_lr` is the rate at the top of the schedule; `clipped` says whether clipping sees it. Modules
    whose rate an objective scales have groups of their own. Parameters are named, so that a resumed run finds their
    moments.
    """
    settings = config.optimiser
    rate = settings.base_lr * config.run.batch_size / 256
    scales = {
        id(parameter): scale
        for objective in model.modules()
        if isinstance(objective, Objective)
        for module, scale in objective.lr_scales()
        for parameter in module.parameters()
    }
    groups: dict[tuple[str, float], list[tuple[str, nn.Parameter]]] = {(kind, 1.0): [] for kind in KINDS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = _kind_of(name, parameter), scales.get(id(parameter), 1.0)
            groups.setdefault(key, []).append((name, parameter))
    decay = {"matrices": settings.weight_decay, "vectors": 0.0, "weighting": 0.0}
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "base_lr": config.weighting.lr if kind == "weighting" else rate * scale,
                "weight_decay": decay[kind],
                "decayed": kind == "matrices",
                "clipped": kind != "weighting",
            }
            for (kind, scale), members in groups.items()
            if members
        ],
        lr=rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )


def _kind_of(name: str, parameter: nn.Parameter) -> str:
    if name.split(".")[0] == "weighting":
        return "weighting"
    return "vectors" if parameter.ndim < 2 or name.split(".")[-1] in UNDECAYED else "matrices"


def clipped_parameters(optimiser: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters whose common gradient norm is measured and clipped."""
    return (p for group in optimiser.param_groups if group["clipped"] for p in group["params"])


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the top learning rate at `step` of `steps`: linear up to `warmup`, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimiser: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` × its own top rate."""
    for group in optimiser.param_groups:
        group["lr"] = factor * group["base_lr"]


def set_weight_decay(optimiser: torch.optim.Optimizer, config: Config, progress: Progress) -> None:
    """Set the decay of the groups that have one to that of the present step."""
    settings = config.optimiser
    if settings.weight_decay_end is not None:
        for group in optimiser.param_groups:
            if group["decayed"]:
                group["weight_decay"] = progress.cosine(settings.weight_decay, settings.weight_decay_end)
