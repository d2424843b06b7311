"""Any set of objectives over one encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, teacher_of
from hsv.monitor import effective_rank, feature_spread
from hsv.objectives.beit import BEiT
from hsv.objectives.byol import BYOL
from hsv.objectives.can import CAN
from hsv.objectives.cmae import CMAE
from hsv.objectives.cpc import CPC
from hsv.objectives.dae import DAE
from hsv.objectives.dino import DINO
from hsv.objectives.encode import Draw, encode
from hsv.objectives.ibot import IBOT
from hsv.objectives.mae import MAE
from hsv.objectives.moco import MoCo
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Drop, Request, View
from hsv.objectives.simclr import SimCLR
from hsv.objectives.simsiam import SimSiam
from hsv.objectives.swav import SwAV
from hsv.objectives.weighting import Weighting
from hsv.schedules import Progress
from hsv_kernels import update_teacher
from hsv_kernels.distributed import all_gather_rows, rank, world_size

__all__ = ["OBJECTIVES", "Hybrid", "build_hybrid"]

RANKED = 512  # images whose features the effective rank is taken of

OBJECTIVES: dict[str, type[Objective]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "dino": DINO,
    "swav": SwAV,
    "mae": MAE,
    "ibot": IBOT,
    "beit": BEiT,
    "cpc": CPC,
    "dae": DAE,
    "can": CAN,
    "cmae": CMAE,
}
"""The objectives by their names in the configuration."""


class Hybrid(nn.Module):
    """Encoder, objectives and the weighting of their losses as one module with one forward.

    Each distinct (view, mask) is encoded once, sequences of one length together in one batch. Objectives whose
    teachers have one momentum and schedule share a momentum encoder.

    Args:
        encoder: the shared encoder.
        objectives: by name, in the order of their losses.
        weighting: makes one loss of theirs.
        seed: of masks and noise.
        chunks: parts in which a batch is encoded; see `Encoder.transform`.
        negatives: of contrastive losses; among those of "local" a loss at chance is that of a rank's own images.

    Raises:
        ValueError: views that the encoder cannot take, by the objective's name.
    """

    def __init__(
        self,
        encoder: Encoder,
        objectives: dict[str, Objective],
        weighting: Weighting,
        seed: int,
        *,
        chunks: int = 1,
        negatives: str = "gather",
    ) -> None:
        super().__init__()
        for name, objective in objectives.items():
            for request in (*objective.requests, *objective.teacher_requests):
                _check_view(name, request, encoder)
        self.encoder, self.objectives, self.weighting = encoder, nn.ModuleDict(objectives), weighting
        self.seed, self.chunks, self.negatives = seed, chunks, negatives
        self.requests = _distinct(objective.requests for objective in objectives.values())
        self.teacher_requests = {
            key: _distinct(o.teacher_requests for o in objectives.values() if _teacher_key(o) == key)
            for key in dict.fromkeys(map(_teacher_key, objectives.values()))
            if key is not None
        }
        self.teachers = nn.ModuleDict({key: teacher_of(encoder) for key in self.teacher_requests}).eval()
        every = [self.requests, *self.teacher_requests.values()]
        self.views = list(dict.fromkeys(request.view for requests in every for request in requests))
        self.start_step(Progress(0, 1, 1))

    def train(self, mode: bool = True) -> Hybrid:
        """Momentum encoders stay as they are evaluated: without drop-path."""
        super().train(mode)
        self.teachers.eval()
        return self

    def forward(
        self, images: list[Tensor], draw: int, counts: Sequence[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of a batch.

        Args:
            images: one normalised [B, C, H, W] for each of `views`.
            draw: number of the micro-batch since the start of the run; masks and noise are a function of it.
            counts: images of each rank, which may be 0; None says that all have as many as this one.
        """
        counts = list(counts) if counts else [len(images[0])] * world_size()
        by_view = dict(zip(self.views, images, strict=True))
        first_index = sum(counts[: rank()])
        student = self.encode(by_view, draw, first_index)
        teachers = self.encode_with_teachers(by_view, draw, first_index)
        chances, logs, relative = self.chances(sum(counts)), {}, []
        for name, objective in self.objectives.items():
            loss = objective(Batch(by_view, student, teachers.get(_teacher_key(objective), {}), draw, counts))
            relative.append(loss / (chances[name] or 1.0))
            logs[f"loss/{name}"] = loss.detach()
        if self.fresh and self.weighting.measures(self.progress):
            logs |= self.weighting.measure(relative, [p for p in self.encoder.parameters() if p.requires_grad])
        self.fresh = False
        total = self.weighting(torch.stack(relative))
        logs["loss/total"] = total.detach()
        logs |= dict(zip((f"weight/{name}" for name in self.objectives), self.weighting.weights(), strict=True))
        if self.watched:
            pooled = student[self.requests[0]].pool(self.encoder.pool).detach()
            pooled = all_gather_rows(pooled, counts)
            logs["feature_spread"] = feature_spread(pooled)
            logs["effective_rank"] = effective_rank(pooled[:RANKED])
        return total, logs

    def encode(self, images: dict[View, Tensor], draw: int, first_index: int = 0) -> dict[Request, Any]:
        """The student's encoding of every distinct request."""
        drawn = Draw(self.seed, draw, first_index)
        return encode(self.encoder, self.requests, images, drawn, self.objectives, chunks=self.chunks)

    @torch.no_grad()
    def encode_with_teachers(
        self, images: dict[View, Tensor], draw: int, first_index: int = 0
    ) -> dict[str, dict[Request, Any]]:
        """Every momentum encoder's encodings."""
        return {
            key: encode(self.teachers[key], requests, images, Draw(self.seed, draw, first_index), self.objectives)
            for key, requests in self.teacher_requests.items()
        }

    def start_step(self, progress: Progress, *, watched: bool = True) -> None:
        """Set where the run is, which schedules are functions of, and whether this step's features are measured.

        Gradients are measured in the first batch of a step.
        """
        self.progress, self.watched, self.fresh = progress, watched, True
        for objective in self.objectives.values():
            objective.progress = progress

    def chances(self, batch: int) -> dict[str, float]:
        """Each objective's loss of a model that knows nothing, for so many images over all ranks."""
        compared = max(1, batch // world_size()) if self.negatives == "local" else batch
        return {name: objective.chance(compared) for name, objective in self.objectives.items()}

    def prepare(self, images: Callable[[], Iterator[Tensor]]) -> None:
        """What objectives fit to the training images before the first step; see `Objective.prepare`."""
        for objective in self.objectives.values():
            objective.prepare(images())

    def before_update(self) -> None:
        """What objectives do between the backward pass and the optimiser's step."""
        for objective in self.objectives.values():
            objective.before_update()

    @torch.no_grad()
    def after_update(self) -> None:
        """Move the teachers, once an optimiser's step is done."""
        moved = set()
        for objective in self.objectives.values():
            objective.after_update()
            objective.update_teacher_heads()
            key = _teacher_key(objective)
            if key is not None and key not in moved:
                update_teacher(self.teachers[key], self.encoder, objective.teacher_momentum())
                moved.add(key)

    def exported(self, which: str) -> Encoder:
        """The encoder that a run leaves: the first objective's momentum encoder that there is, or the student."""
        if which == "student" or not self.teachers:
            return self.encoder
        return next(iter(self.teachers.values()))


def _distinct(requests: Iterable[Sequence[Request]]) -> list[Request]:
    return list(dict.fromkeys(request for some in requests for request in some))


def _check_view(name: str, request: Request, encoder: Encoder) -> None:
    """Positions are resampled for whole views of another size than the encoder's; masks are of its own patches."""
    size, whole = request.view.spec.size, encoder.image_size
    if size is not None and any(size % side for side in encoder.patch_size):
        raise ValueError(f"{name}: got views of {size} pixels; allowed: multiples of the patch, {encoder.patch_size}")
    if request.view.spec.shift >= (size or min(whole)):
        raise ValueError(
            f"{name}: got views shifted by up to {request.view.spec.shift} pixels; allowed: less than a side"
        )
    if request.mask is not None and size is not None and (size, size) != whole:
        raise ValueError(f"{name}: got masked views of {size} pixels; allowed: unset, for those of the images, {whole}")
    if isinstance(request.mask, Drop) and encoder.num_patches < 2:
        raise ValueError(f"{name}: got images of 1 patch; allowed: at least 2, of which some are removed")


def _teacher_key(objective: Objective) -> str | None:
    """Name of the momentum encoder that an objective needs, free of the dots that module names cannot have."""
    if objective.momentum is None:
        return None
    return f"{float(objective.momentum)!r}{'' if objective.momentum_rises else '_constant'}".replace(".", "_")


def build_hybrid(config: Config, encoder: Encoder) -> Hybrid:
    """The module that `config.objectives` describes."""
    objectives: dict[str, Objective] = {}
    for name in sorted(config.objectives, key=lambda name: (name == "mae", config.objectives.index(name))):
        objectives[name] = OBJECTIVES[name](encoder, config, objectives)
    objectives = {name: objectives[name] for name in config.objectives}
    weighting = Weighting(objectives, config.weighting)
    run = config.run
    return Hybrid(encoder, objectives, weighting, run.seed, chunks=run.contrastive_chunks, negatives=run.negatives)
