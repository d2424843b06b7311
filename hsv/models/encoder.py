"""The encoder that all objectives share: a plain vision transformer of timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hsv.models.attention import choose_attention
from hsv_kernels import gather_patches

__all__ = ["Encoder", "Encoding"]


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

    Args:
        name: a plain vision transformer of timm.
        arguments: the other arguments of `timm.create_model`, among them `img_size` and `in_chans`.
        mean, std: of each channel, in [0, 1]; inputs are expected normalised by them.
        pool: what `features` returns unless told otherwise, `mean` or `cls`.
        drop_path: rate of stochastic depth, of training alone and so no part of `arguments`.
        pretrained: load timm's pretrained weights.

    Raises:
        ValueError: if the model is not a plain vision transformer.
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
        self.arguments = {**arguments, "num_classes": 0, "global_pool": "token"}
        self.vit = _create(name, self.arguments, drop_path_rate=drop_path, pretrained=pretrained)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        return self.vit.patch_embed.img_size

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return self.vit.patch_embed.patch_size

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

        Patches that are not kept are never read, let alone embedded.
        """
        count = self.vit.num_prefix_tokens + (self.num_patches if ids_keep is None else ids_keep.shape[1])
        choose_attention(self.vit.blocks, count, images.device, training=self.training)
        if ids_keep is None:
            tokens = self.vit.forward_features(images)
        else:
            tokens = self.vit.norm(self.vit.blocks(self.vit.norm_pre(self._visible(images, ids_keep))))
        return Encoding(tokens[:, 0], tokens[:, self.vit.num_prefix_tokens :])

    def _visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Prefix tokens and embedded visible patches with their positions, [B, prefix + K, D]."""
        vit, embedding = self.vit, self.vit.patch_embed
        pixels = gather_patches(images, ids_keep, self.patch_size)  # [B, K, p·q·C]
        weight = embedding.proj.weight.permute(0, 2, 3, 1).flatten(1)  # the convolution's (c, p, q) as (p, q, c)
        patches = embedding.norm(nn.functional.linear(pixels, weight, embedding.proj.bias))

        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        prefix = torch.cat(prefix, 1)  # [1, prefix, D]
        positions = vit.pos_embed[0]
        if not vit.no_embed_class:
            prefix = prefix + positions[: vit.num_prefix_tokens]
            positions = positions[vit.num_prefix_tokens :]
        patches = patches + positions[ids_keep]
        return vit.pos_drop(torch.cat([prefix.to(patches.dtype).expand(len(patches), -1, -1), patches], 1))

    def features(self, images: Tensor, pool: str | None = None) -> Tensor:
        """One vector per image, [B, D], of normalised images [B, C, H, W]."""
        return self.encode(images).pool(pool or self.pool)

    def forward(self, images: Tensor) -> Tensor:
        """The same as `features` with the encoder's own pooling."""
        return self.features(images)


def _create(name: str, arguments: dict[str, Any], **others: Any) -> VisionTransformer:
    allowed = "a plain vision transformer of timm with class token and positions, and a shape that it can have"
    try:
        model = timm.create_model(name, **arguments, **others)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"encoder: got {name!r} with {arguments}; allowed: {allowed} ({error})") from error
    if type(model) is not VisionTransformer or not model.has_class_token or model.pos_embed is None:
        raise ValueError(f"encoder: got {name!r} with {arguments}; allowed: {allowed}")
    return model
