"""What DINO and iBOT share: heads, the centre of the teacher's logits and the schedule of its temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hsv.config import SelfDistillationConfig
from hsv.models import Encoder, Prototypes, mlp, teacher_of
from hsv.objectives.objective import Objective
from hsv.schedules import Progress, capped
from hsv_kernels.distributed import distillation_loss, sinkhorn_centre

__all__ = ["Distillation", "SelfDistillation"]


class SelfDistillation(Objective):
    """Base of both: a head of K prototypes and its teacher; the prototypes are frozen at first."""

    error = False

    def __init__(self, encoder: Encoder, config: SelfDistillationConfig) -> None:
        super().__init__()
        self.config, self.momentum = config, config.momentum
        self.head = distillation_head(encoder.dim, config)
        self.teacher_head = teacher_of(self.head)

    def chance(self, batch: int) -> float:
        """ln K: every prototype as likely."""
        return math.log(self.config.out_dim)

    def teacher_heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        yield self.teacher_head, self.head

    def before_update(self) -> None:
        if self.progress.within(self.config.freeze_last_epochs):
            self.head[-1].weight.grad = None

    def after_update(self) -> None:
        for module in self.modules():
            if isinstance(module, Distillation):
                module.move_centre()


def distillation_head(dim: int, config: SelfDistillationConfig) -> nn.Sequential:
    """Layers, the last a bottleneck on the unit sphere, and prototypes: [N, dim] → logits [N, K] in [−1, 1]."""
    widths = [dim, *[config.hidden_dim] * (config.head_layers - 1), config.bottleneck_dim]
    layers = mlp(widths, norm=config.batch_norm, last_norm=config.batch_norm, activation="gelu")
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return layers.append(Prototypes(config.bottleneck_dim, config.out_dim))


class Distillation(nn.Module):
    """Cross-entropy against a sharpened and centred teacher, with the centre as its state.

    Args:
        config: temperatures and centring.
        count: K, logits of a row.
    """

    def __init__(self, config: SelfDistillationConfig, count: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("centre", torch.zeros(count))
        self.means: list[Tensor] = []  # of the teacher's logits in the batches of this step

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        progress: Progress,
        *,
        pairs: Sequence[tuple[int, int]] | None = None,
        weights: Tensor | None = None,
        samples: int | None = None,
    ) -> Tensor:
        """Student logits [S, N, K] and teacher logits [T, N, K] to the loss of all ranks.

        The other arguments are those of `hsv_kernels.distributed.distillation_loss`.
        """
        temperature = self.teacher_temperature(progress)
        centre = self.centre
        if self.config.centring == "sinkhorn":
            centre = sinkhorn_centre(teacher, temperature)
        loss, teacher_mean = distillation_loss(
            student,
            teacher,
            student_temperature=self.config.student_temperature,
            teacher_temperature=temperature,
            centre=centre,
            pairs=pairs,
            weights=weights,
            samples=samples,
        )
        if self.training and self.config.centring == "mean":
            self.means.append(teacher_mean.to(self.centre.dtype))
        return loss

    @torch.no_grad()
    def move_centre(self) -> None:
        """Towards the mean of the step's batches; those without rows, whose mean is 0, do not count."""
        if not self.means:
            return
        means = torch.stack(self.means)
        self.means.clear()
        filled = means.any(1).sum()
        moved = torch.lerp(means.sum(0) / filled.clamp_min(1), self.centre, self.config.centre_momentum)
        self.centre.copy_(torch.where(filled > 0, moved, self.centre))

    def teacher_temperature(self, progress: Progress) -> float:
        """τ_t of the present step."""
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return start + (end - start) * progress.ramp(self.config.teacher_temperature_epochs)

    def schedule(self, steps: int, epoch: int) -> list[str]:
        """The temperature's warm-up and the frozen prototypes, in steps."""
        warmup = capped(self.config.teacher_temperature_epochs, steps, epoch)
        frozen = capped(self.config.freeze_last_epochs, steps, epoch)
        start, end = self.config.teacher_temperature_start, self.config.teacher_temperature
        return [f"teacher's temperature {start:g} → {end:g} over {warmup:,} steps, prototypes fixed for {frozen:,}"]
