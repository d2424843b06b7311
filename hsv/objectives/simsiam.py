"""SimSiam: predict the other view's projection, which gets no gradient (Chen and He 2021, arXiv:2011.10566)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hsv.config import Config
from hsv.models import Encoder, mlp
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Request, View
from hsv_kernels.distributed import negative_cosine

__all__ = ["SimSiam"]


class SimSiam(Objective):
    """With z the projection of a view, p the predictor's output for it, and sg the stop-gradient,

        loss = −½ mean_i cos(p0_i, sg(z1_i)) − ½ mean_i cos(p1_i, sg(z0_i))

    Batch statistics of the heads are per view. The predictor follows the schedule of everything else (published for
    SGD: a constant rate). The preset for 32 pixels has it learn thirty times as fast: what keeps features from
    collapsing is that it is near its best for the present encoder (Grill et al. 2020; Tian et al. 2021,
    arXiv:2102.06810).
    """

    error = False

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config = config.simsiam
        self.requests = [Request(View(self.config.view, slot)) for slot in (0, 1)]
        out = self.config.out_dim
        self.projector = mlp([encoder.dim, *[out] * self.config.projector_layers], last_norm=True)
        self.predictor = mlp([out, self.config.predictor_dim, out])

    def forward(self, batch: Batch) -> Tensor:
        z0, z1 = (self.projector(batch.student[request].pool(self.config.pool)) for request in self.requests)
        p0, p1 = (self.predictor(z).to(z.dtype) for z in (z0, z1))  # normalised projections are float32
        return (negative_cosine(p0, z1.detach()) + negative_cosine(p1, z0.detach())) / 2

    def chance(self, batch: int) -> float:
        """0: directions that tell nothing of each other."""
        return 0.0

    def lr_scales(self) -> Iterator[tuple[nn.Module, float]]:
        yield self.predictor, self.config.predictor_lr_scale
