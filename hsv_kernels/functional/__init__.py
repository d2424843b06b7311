"""The public functions: each checks its input, chooses a backend and calls the operation."""

from hsv_kernels.functional.contrast import info_nce, nt_xent, similarity_logsumexp
from hsv_kernels.functional.cosine import negative_cosine
from hsv_kernels.functional.distillation import distillation_loss, sinkhorn_centre
from hsv_kernels.functional.masking import gather_patches, gather_tokens, random_masking, restore_tokens
from hsv_kernels.functional.reconstruction import denormalise_patches, masked_mse

__all__ = [
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
]
