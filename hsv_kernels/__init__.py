"""Fused operations for self-supervised vision: exact losses, small in memory, on CPU and GPU."""

import torch  # noqa: F401  first, so that its OpenMP runtime is the one that the compiled kernels find

from hsv_kernels.backends import Backend, BackendError, backends, use_backend
from hsv_kernels.functional import (
    denormalise_patches,
    distillation_loss,
    gather_patches,
    gather_tokens,
    info_nce,
    masked_mse,
    negative_cosine,
    nt_xent,
    random_masking,
    restore_tokens,
    similarity_logsumexp,
    sinkhorn_centre,
)
from hsv_kernels.losses import MaskedMSELoss, NTXentLoss
from hsv_kernels.queue import KeyQueue
from hsv_kernels.teacher import update_teacher

__all__ = [
    "Backend",
    "BackendError",
    "KeyQueue",
    "MaskedMSELoss",
    "NTXentLoss",
    "backends",
    "denormalise_patches",
    "distillation_loss",
    "gather_patches",
    "gather_tokens",
    "info_nce",
    "masked_mse",
    "negative_cosine",
    "nt_xent",
    "random_masking",
    "restore_tokens",
    "similarity_logsumexp",
    "sinkhorn_centre",
    "update_teacher",
    "use_backend",
]
