"""Which implementation of attention a transformer runs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from timm.layers import use_fused_attn
from torch import nn

__all__ = ["choose_attention"]

FEW_TOKENS = 128


def choose_attention(blocks: Iterable[nn.Module], tokens: int, device: torch.device, *, training: bool) -> None:
    """Make timm's blocks train with plain matrix products where these are faster than fused attention.

    That is in bfloat16 on a CPU, where the fused backward is several times as slow (measured at 5 to 197 tokens).
    Plain attention stores tokens² values for each head, hence its limit. Outside training timm's choice stands,
    so that features have the bits that timm alone computes.
    """
    plain = training and device.type == "cpu" and torch.is_autocast_enabled("cpu") and tokens <= FEW_TOKENS
    for block in blocks:
        block.attn.fused_attn = bool(use_fused_attn()) and not plain
