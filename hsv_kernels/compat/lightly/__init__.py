"""lightly's losses (lightly.loss) and token helpers (lightly.models.utils).

from hsv_kernels.compat.lightly import DINOLoss, IBOTPatchLoss, NegativeCosineSimilarity, NTXentLoss
from hsv_kernels.compat import lightly as utils  # utils.random_token_mask, utils.get_at_index, ...
"""

from hsv_kernels.compat.lightly.losses import DINOLoss, IBOTPatchLoss, NegativeCosineSimilarity, NTXentLoss
from hsv_kernels.compat.lightly.tokens import (
    expand_index_like,
    get_at_index,
    mask_at_index,
    mask_bool,
    patchify,
    prepend_class_token,
    random_token_mask,
    repeat_token,
    set_at_index,
    unpatchify,
)

__all__ = [
    "DINOLoss",
    "IBOTPatchLoss",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "expand_index_like",
    "get_at_index",
    "mask_at_index",
    "mask_bool",
    "patchify",
    "prepend_class_token",
    "random_token_mask",
    "repeat_token",
    "set_at_index",
    "unpatchify",
]
