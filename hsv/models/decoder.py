"""The shallow transformer that reconstructs pixels from visible tokens."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from hsv.models.attention import choose_attention
from hsv_kernels import restore_tokens

__all__ = ["Decoder"]


class Decoder(nn.Module):
    """From the encoder's visible tokens to the pixels of every patch.

    Args:
        in_dim: width of the encoder's tokens.
        num_patches: L, patches of an image.
        dim, depth, heads: of the decoder's blocks.
        out_dim: values of a patch, p·q·C.
    """

    def __init__(self, in_dim: int, num_patches: int, *, dim: int, depth: int, heads: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.pos_embed = nn.Parameter(torch.randn(1, num_patches, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, ids_restore: Tensor, condition: Tensor | None = None) -> Tensor:
        """Visible tokens [B, K, D] and their places `ids_restore` [B, L] to patches [B, L, p·q·C].

        `condition` [B, dim] is added to all tokens of an image. B may be 0 on a rank, which joins the others' backward
        with gradients of 0.
        """
        if not len(tokens):
            tokens = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
            if condition is not None:
                condition = torch.cat([condition, condition.new_zeros(1, condition.shape[1])])
            places = torch.arange(ids_restore.shape[1], device=ids_restore.device)
            return self(tokens, places[None], condition)[:0]
        x = restore_tokens(self.embed(tokens), ids_restore, self.mask_token)  # [B, L, dim]
        if condition is not None:
            x = x + condition[:, None]
        choose_attention(self.blocks, x.shape[1], x.device, training=self.training)
        return self.head(self.norm(self.blocks(x + self.pos_embed)))
