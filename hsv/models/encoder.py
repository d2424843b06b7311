"""The encoder that all objectives share: a plain vision transformer of timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hsv.models.attention import choose_attention
from hsv.models.positions import resample_positions
from hsv_kernels import gather_patches

__all__ = ["Encoder", "Encoding"]

#: What timm calls each pooling. `fc_norm` would move the final norm behind the mean, under another name.
_POOLING = {"mean": {"global_pool": "avg", "fc_norm": False}, "cls": {"global_pool": "token"}}


@dataclass
class Encoding:
    """Normalised tokens of a batch: `cls` [B, D] and `patches` [B, K, D]."""

    cls: Tensor
    patches: Tensor

    def pool(self, kind: str) -> Tensor:
        """[B, D]: the mean of the patch tokens (`mean`) or the class token (`cls`)."""
        return self.cls if kind == "cls" else self.patches.mean(1)


class Encoder(nn.Module):
    """A timm vision transformer with class token and final norm, which can encode visible patches alone.

    Its weights start as those of MAE and MoCo v3: Xavier's uniform ones, and sines and cosines of the patches' places,
    fixed there and learning here. Short runs learn more from this start than from timm's (docs/methods.md).

    Args:
        name: a plain vision transformer of timm.
        arguments: the other arguments of `timm.create_model`, among them `img_size` and `in_chans`; those of the
            pooling follow from `pool`.
        mean, std: of each channel, in [0, 1]; inputs are expected normalised by them.
        pool: what `features` returns unless told otherwise, `mean` or `cls`.
        drop_path: rate of stochastic depth, of training alone and so no part of `arguments`.
        pretrained: load timm's pretrained weights.

    Raises:
        ValueError: if the model is not a plain vision transformer, or its patches do not divide the image.
    """

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pool: str = "mean",
        drop_path: float = 0.0,
        pretrained: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.pool, self.mean, self.std = name, pool, tuple(mean), tuple(std)
        self.arguments = {**arguments, "num_classes": 0, **_POOLING[pool]}
        self.vit = _create(name, self.arguments, drop_path_rate=drop_path, pretrained=pretrained)
        if not pretrained:
            _initialise(self.vit)
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                f"input.image_size: got {self.image_size}; allowed: multiples of the patch, {self.patch_size}"
            )

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.vit.patch_embed.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return self.vit.patch_embed.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        return self.vit.patch_embed.grid_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.vit.patch_embed.num_patches

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.vit.in_chans

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.vit.embed_dim

    def encode(self, images: Tensor, ids_keep: Tensor | None = None) -> Encoding:
        """Normalised images [B, C, H, W] to tokens, of the patches `ids_keep` [B, K] alone if given.

        Patches that are not kept are never read, let alone embedded. Whole images give the bits that timm gives.
        """
        if ids_keep is not None:
            return self.transform(self.with_prefix(*self.embed(images, ids_keep)))
        choose_attention(
            self.vit.blocks, self.vit.num_prefix_tokens + self.num_patches, images.device, training=self.training
        )
        return self._encoding(self.vit.forward_features(images))

    def embed(self, images: Tensor, ids_keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embedded patches [B, K, D] of images of any size that patches divide, and their positions, alike.

        `ids_keep` [B, K] chooses patches; without it K is all of them. Positions of images of another size than the
        encoder's are resampled, as timm does.
        """
        vit, embedding = self.vit, self.vit.patch_embed
        if ids_keep is None:
            patches = embedding.norm(embedding.proj(images).flatten(2).transpose(1, 2))
        else:
            pixels = gather_patches(images, ids_keep, self.patch_size)  # [B, K, p·q·C]
            weight = embedding.proj.weight.permute(0, 2, 3, 1).flatten(1)  # the convolution's (c, p, q) as (p, q, c)
            patches = embedding.norm(nn.functional.linear(pixels, weight, embedding.proj.bias))
        rows, columns = (side // patch for side, patch in zip(images.shape[2:], self.patch_size, strict=True))
        positions = vit.pos_embed[:, -self.num_patches :]  # after those of class and registers, if they have any
        positions = resample_positions(positions, self.grid, (rows, columns))[0]  # [L, D]
        return patches, positions.expand(len(images), -1, -1) if ids_keep is None else positions[ids_keep]

    def with_prefix(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Class and register tokens and the patches, with their positions: [B, prefix + K, D], the blocks' input."""
        vit = self.vit
        prefix = torch.cat([token for token in (vit.cls_token, vit.reg_token) if token is not None], 1)
        if not vit.no_embed_class:
            prefix = prefix + vit.pos_embed[:, : vit.num_prefix_tokens]
        patches = patches + positions
        return vit.pos_drop(torch.cat([prefix.to(patches.dtype).expand(len(patches), -1, -1), patches], 1))

    def transform(self, tokens: Tensor, attention_mask: Tensor | None = None, *, chunks: int = 1) -> Encoding:
        """Blocks and final norm over embedded tokens [B, T, D].

        Args:
            tokens: of `with_prefix`.
            attention_mask: [T, T], added to the scores: 0 where a row looks at a column, −inf elsewhere.
            chunks: parts of the batch that are encoded one after the other and, for their gradient, once more, so that
                the activations of one part alone are in memory. Drop-path repeats itself.
        """
        if chunks == 1 or not torch.is_grad_enabled():
            return self._encoding(self._blocks(tokens, attention_mask))
        parts = [
            checkpoint(self._blocks, part, attention_mask, use_reentrant=False) for part in tokens.tensor_split(chunks)
        ]
        return self._encoding(torch.cat(parts))

    def _blocks(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        # Here, for a chunk that is encoded again finds what sequences of another length have chosen meanwhile.
        choose_attention(self.vit.blocks, tokens.shape[1], tokens.device, training=self.training)
        x = self.vit.norm_pre(tokens)
        for block in self.vit.blocks:
            x = block(x) if attention_mask is None else block(x, attn_mask=attention_mask)
        return self.vit.norm(x)

    def _encoding(self, tokens: Tensor) -> Encoding:
        return Encoding(tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :])

    def features(self, images: Tensor, pool: str | None = None) -> Tensor:
        """One vector per image, [B, D], of normalised images [B, C, H, W]."""
        return self.encode(images).pool(pool or self.pool)

    def forward(self, images: Tensor) -> Tensor:
        """The same as `features` with the encoder's own pooling."""
        return self.features(images)


def _create(name: str, arguments: dict[str, Any], **others: Any) -> VisionTransformer:
    allowed = f"a plain vision transformer of timm with class token and positions, here with {arguments}"
    try:
        model = timm.create_model(name, **arguments, **others)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"encoder: got {name!r}: {error}; allowed: {allowed}") from error
    plain = type(model) is VisionTransformer and all(hasattr(block, "attn") for block in model.blocks)
    if not plain or not model.has_class_token or model.pos_embed is None:
        raise ValueError(f"encoder: got {name!r}; allowed: {allowed}")
    return model


@torch.no_grad()
def _initialise(vit: VisionTransformer) -> None:
    vit.init_weights("moco", needs_reset=False)
    projection = vit.patch_embed.proj
    nn.init.xavier_uniform_(projection.weight.flatten(1))  # a linear layer of patches, a convolution by name alone
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)
    if vit.embed_dim % 4 == 0:  # a sine and a cosine of each of two coordinates
        vit.pos_embed.zero_()
        prefix = vit.pos_embed.shape[1] - vit.patch_embed.num_patches
        vit.pos_embed[0, prefix:] = build_sincos2d_pos_embed(vit.patch_embed.grid_size, vit.embed_dim)
