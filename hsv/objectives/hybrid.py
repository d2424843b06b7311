"""Any set of objectives over one encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, Encoding
from hsv.monitor import feature_spread
from hsv.objectives.mae import MAE
from hsv.objectives.request import Masked, Request, View
from hsv.objectives.simclr import SimCLR
from hsv.objectives.weighting import Weighting
from hsv_kernels import random_masking
from hsv_kernels.distributed import rank, world_size

__all__ = ["Hybrid", "build_hybrid"]


class Hybrid(nn.Module):
    """Encoder, objectives and the weighting of their losses as one module with one forward.

    Each distinct (view, mask) is encoded once, whole views together in one batch.
    """

    def __init__(self, encoder: Encoder, objectives: dict[str, nn.Module], weighting: Weighting, seed: int) -> None:
        super().__init__()
        self.encoder, self.objectives, self.weighting = encoder, nn.ModuleDict(objectives), weighting
        self.seed = seed
        self.requests = list(dict.fromkeys(r for objective in objectives.values() for r in objective.requests))
        self.views = list(dict.fromkeys(request.view for request in self.requests))

    def forward(self, images: list[Tensor], draw: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and logs of a batch.

        Args:
            images: one normalised [B, C, H, W] for each of `views`.
            draw: number of the micro-batch since the start of the run; masks are a function of it.
        """
        by_view = dict(zip(self.views, images, strict=True))
        encodings = self.encode(by_view, draw)
        batch, logs, relative = len(images[0]) * world_size(), {}, []
        for name, objective in self.objectives.items():
            loss = objective(encodings, by_view)
            relative.append(loss / (objective.chance(batch) or 1.0))
            logs[f"loss/{name}"] = loss.detach()
        total = self.weighting(torch.stack(relative))
        logs["loss/total"] = total.detach()
        logs |= dict(zip((f"weight/{name}" for name in self.objectives), self.weighting.weights(), strict=True))
        logs["feature_spread"] = feature_spread(encodings[self.requests[0]].pool(self.encoder.pool))
        return total, logs

    def encode(self, images: dict[View, Tensor], draw: int) -> dict[Request, Encoding]:
        """The encoding of every distinct request."""
        whole = [request for request in self.requests if request.mask is None]
        encodings = self._encode_whole([images[request.view] for request in whole])
        result: dict[Request, Encoding] = dict(zip(whole, encodings, strict=True))
        for number, request in enumerate(r for r in self.requests if r.mask is not None):
            result[request] = self._encode_masked(images[request.view], request, draw, number)
        return result

    def _encode_whole(self, views: list[Tensor]) -> list[Encoding]:
        if not views:
            return []
        joint = self.encoder.encode(torch.cat(views))
        sizes = [len(view) for view in views]
        return [Encoding(*parts) for parts in zip(joint.cls.split(sizes), joint.patches.split(sizes), strict=True)]

    def _encode_masked(self, images: Tensor, request: Request, draw: int, number: int) -> Masked:
        ids_keep, ids_restore, mask = random_masking(
            len(images),
            self.encoder.num_patches,
            mask_ratio=request.mask.ratio,
            seed=self.seed + number,
            offset=draw,
            first_index=rank() * len(images),
            device=images.device,
        )
        visible = self.encoder.encode(images, ids_keep)
        return Masked(visible.cls, visible.patches, ids_restore, mask)


def build_hybrid(config: Config, encoder: Encoder) -> Hybrid:
    """The module that `config.objectives` describes."""
    objectives: dict[str, nn.Module] = {}
    if "simclr" in config.objectives:
        objectives["simclr"] = SimCLR(encoder, config.simclr)
    if "mae" in config.objectives:
        shared = objectives["simclr"].requests[0].view if "simclr" in objectives else None
        objectives["mae"] = MAE(encoder, config.mae, shared)
    return Hybrid(encoder, objectives, Weighting(list(objectives), config.weighting), config.run.seed)
