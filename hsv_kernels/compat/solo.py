"""solo-learn's losses (solo.losses).

from hsv_kernels.compat.solo import DINOLoss, byol_loss_func, mocov2plus_loss_func, mocov3_loss_func
from hsv_kernels.compat.solo import simclr_loss_func, simsiam_loss_func
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsv_kernels.compat.contrast import gathered, inverse, queue_losses
from hsv_kernels.compat.cosine import mean_negative_cosine
from hsv_kernels.compat.distillation import distilled, moved
from hsv_kernels.compat.pairs import class_numbers, logsumexp_by_anchor, matching_pairs, pair_logits
from hsv_kernels.compat.shapes import expanded, one_dtype, require_matrix, require_shape
from hsv_kernels.distributed import mean_over_ranks, world_size
from hsv_kernels.functional import similarity_logsumexp
from hsv_kernels.rows import unit_rows

__all__ = [
    "DINOLoss",
    "byol_loss_func",
    "mocov2plus_loss_func",
    "mocov3_loss_func",
    "simclr_loss_func",
    "simsiam_loss_func",
]


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR with any number of views, or supervised: the positives' exponentials are summed inside the logarithm.

        loss_i = −log(Σ_{j: id_j = id_i, j ≠ i} exp S_ij / Σ_{j ≠ i} exp S_ij),   S = z zᵀ / temperature

    Args:
        z: [N, D] embeddings of all views, normalised inside.
        indexes: [N] of any dtype, equal for views of one image (or for images of one class).
        temperature: number of any sign.

    Returns:
        The mean over anchors, with candidates of all ranks and over the anchors of all ranks under torch.distributed;
        inf where an anchor has no positive.

    Raises:
        RuntimeError: embeddings that are no matrix, other than N indexes.
    """
    require_matrix("z", z)
    require_shape("indexes", indexes, z.shape[:1])
    z = unit_rows(z)
    (keys, start), (ids, _) = gathered(z), gathered(indexes)
    indexes, ids = class_numbers(indexes, ids)
    negatives = similarity_logsumexp(z, keys, scale=inverse(temperature), q_labels=indexes, k_labels=ids)
    i, j = matching_pairs(indexes, ids, start)
    positives = logsumexp_by_anchor(pair_logits(z, keys, i, j, inverse(temperature)), i, len(z))
    losses = F.softplus(negatives - positives, threshold=40)
    return mean_over_ranks(losses.sum(), len(losses))


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of queries [N, D] against their keys [N, D] and a queue [D, K], all of unit length; the mean.

    A key's N and D and the queue's D may be 1, for the same in every row or column.

    Raises:
        RuntimeError: other shapes.
    """
    N, D = len(query), query.shape[-1]
    require_shape("query", query, (N, D))
    key, queue = expanded("key", key, (N, D)), expanded("queue", queue, (D, queue.shape[-1]))
    return queue_losses(query, key, queue.T, temperature).mean()


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE of queries [N, D] against the keys [N, D] of all ranks, times 2 · temperature; normalised inside.

    One direction; the caller adds the other. Keys of other ranks carry no gradient.

    Raises:
        RuntimeError: keys of another width, or of another dtype outside autocast.
    """
    require_matrix("query", query)
    require_shape("key", key, (len(key), query.shape[1]))
    query, key = one_dtype("query", query, "key", key)
    q, k = unit_rows(query), unit_rows(key)
    every, start = gathered(k.detach() if world_size() > 1 else k)
    positive = torch.arange(start, start + len(q), device=q.device)
    d, _ = similarity_logsumexp(q, every, scale=inverse(temperature), positive=positive)
    losses = F.softplus(d, threshold=40)
    return mean_over_ranks(losses.sum(), len(losses)) * (2 * temperature)


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """2 − 2 · mean cos(p, z) along the last dimension; z gets no gradient. `simplified` changes the least norm."""
    return 2 + 2 * simsiam_loss_func(p, z, simplified)


def simsiam_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """−mean cos(p, z) along the last dimension; z gets no gradient. `simplified` changes the least norm."""
    z = z.detach()
    if not simplified and p.shape[-1] != z.shape[-1]:  # a width of 1, which broadcasts after it is normalised
        return -(F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()
    return mean_negative_cosine(p, z, -1, 1e-8 if simplified else 1e-12)


class DINOLoss(nn.Module):
    """DINO's cross-entropy of both of the teacher's views with each other view of the student.

    The caller sets `epoch`, which chooses the teacher's temperature. The centre, a buffer `center` [1, K], moves after
    the loss by the mean over all ranks' teacher logits. Across ranks the value is the mean over all samples.

    Args:
        num_prototypes: K.
        warmup_teacher_temp: temperature of epoch 0.
        teacher_temp: temperature from epoch warmup_teacher_temp_epochs on.
        warmup_teacher_temp_epochs: epochs of a linear way from one to the other.
        num_epochs: length of the schedule.
        student_temp: temperature of the student.
        num_large_crops: views of the student.
        center_momentum: weight of the centre's old value.
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.num_large_crops = num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = np.append(warmup, np.full(num_epochs - warmup_teacher_temp_epochs, teacher_temp))

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """The loss of logits [views · N, K] of the student and [2 · N, K] of the teacher, which gets no gradient.

        Raises:
            RuntimeError: rows that the views do not divide or that differ between the two, or logits of another width
                than the centre.
            IndexError: an epoch beyond num_epochs.
        """
        for name, output in (("student_output", student_output), ("teacher_output", teacher_output)):
            require_shape(name, output, (len(output), self.center.shape[1]))
        rows = len(teacher_output) // 2
        loss, mean = distilled(
            [student_output.unflatten(0, (self.num_large_crops, rows))],
            [teacher_output.unflatten(0, (2, rows))],
            self.student_temp,
            self.teacher_temp_schedule[self.epoch],
            self.center,
        )
        self.center = moved(self.center, mean, self.center_momentum, rows)
        return loss
