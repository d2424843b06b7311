"""What every objective is: requests, a loss, and perhaps a momentum teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hsv.objectives.request import Encoded, Request, View
from hsv.schedules import Progress
from hsv_kernels import update_teacher

__all__ = ["Batch", "Objective"]


@dataclass
class Batch:
    """What an objective computes its loss from.

    Attributes:
        images: [B, C, H, W] of each view, normalised.
        student: encodings of the objective's `requests`.
        teacher: encodings of its `teacher_requests` by the momentum encoder, without gradient.
        draw: number of the micro-batch since the start of the run.
        counts: images of each rank.
    """

    images: dict[View, Tensor]
    student: dict[Request, Encoded]
    teacher: dict[Request, Encoded]
    draw: int
    counts: Sequence[int]

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))


class Objective(nn.Module):
    """Base of the objectives. `forward` maps a Batch to the loss, a mean over the images of all ranks.

    Attributes:
        requests: encodings that the loss needs.
        teacher_requests: encodings by the momentum encoder.
        momentum: of the teacher at the start, None for methods without one; it rises to 1 unless `momentum_rises`
            is false. Objectives of one momentum and schedule share a momentum encoder.
        error: whether the loss measures an error that falls to 0 from its value at chance. Signed losses and
            self-distillation, which collapse can satisfy, do not; learned uncertainty weights would reward that.
        progress: where in the run the present step is; set before each step.
    """

    requests: Sequence[Request]
    teacher_requests: Sequence[Request] = ()
    momentum: float | None = None
    momentum_rises = True
    error = True
    progress: Progress = Progress(0, 1, 1)

    def chance(self, batch: int) -> float:
        """The loss of a model that knows nothing, among `batch` images; 0 where there is no such value."""
        raise NotImplementedError

    def teacher_heads(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        """(teacher, student) modules of this objective that follow the student as the momentum encoder does."""
        return iter(())

    def lr_scales(self) -> Iterator[tuple[nn.Module, float]]:
        """(module, scale) of this objective's modules whose learning rate is a multiple of that of everything else."""
        return iter(())

    def replaced(self, request: Request, count: int, first_index: int, draw: int) -> tuple[Tensor, Tensor]:
        """For requests with a `Replace` mask: which patches, bool [B, L], and the mask token [D]."""
        raise NotImplementedError(f"{type(self).__name__} asks for replaced patches and does not choose any")

    def schedule(self, steps: int, epoch: int) -> list[str]:
        """Lines that say how the objective's own schedules come out for a run of `steps`, `epoch` steps each pass."""
        return []

    def prepare(self, images: Iterator[Tensor]) -> None:
        """Fit what training starts from to training images [C, H, W], normalised. Called once, when a run begins.

        Every rank is given the same images. What it fits are frozen parameters: saved, and made equal over ranks.
        """

    def before_update(self) -> None:
        """After the backward pass and before the optimiser's step."""

    @torch.no_grad()
    def after_update(self) -> None:
        """After the optimiser's step."""

    def teacher_momentum(self) -> float:
        """Momentum of the present step."""
        if not self.momentum_rises:
            return self.momentum
        return self.progress.cosine(self.momentum, 1.0)

    def update_teacher_heads(self) -> None:
        """Move the teacher's heads towards the student's."""
        for teacher, student in self.teacher_heads():
            update_teacher(teacher, student, self.teacher_momentum())
