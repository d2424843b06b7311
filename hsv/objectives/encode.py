"""Serving requests: each is prepared by itself, and sequences of one length go through the blocks as one batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hsv.models import Encoder
from hsv.objectives.noise import gaussian_noise
from hsv.objectives.request import Causal, Drop, Encoded, Replace, Request, View
from hsv_kernels import random_masking

if TYPE_CHECKING:
    from hsv.objectives.objective import Objective

__all__ = ["Draw", "encode"]


class Draw(NamedTuple):
    """What the random numbers of a batch are a function of."""

    seed: int
    number: int
    """Of the micro-batch since the start of the run."""
    first_index: int = 0
    """Number of this rank's first image in the batch of all ranks."""


def encode(
    encoder: Encoder,
    requests: Sequence[Request],
    images: dict[View, Tensor],
    draw: Draw,
    owners: dict[str, Objective],
    *,
    chunks: int = 1,
) -> dict[Request, Encoded]:
    """The encoding of each request.

    Args:
        encoder: student or momentum encoder.
        requests: without duplicates. Their order decides their random numbers.
        images: [B, C, H, W] of each view, normalised. B may be 0 on a rank, which joins the others' backward with
            gradients of 0.
        draw: number of the batch.
        owners: the objectives by name, who choose the patches that are replaced.
        chunks: see `Encoder.transform`.
    """
    if not all(map(len, images.values())):
        blank = {view: pixels.new_zeros(1, *pixels.shape[1:]) for view, pixels in images.items()}
        encodings = encode(encoder, requests, blank, draw, owners)
        return {request: encoding.no_images() for request, encoding in encodings.items()}
    tokens: dict[Request, Tensor] = {}
    results: dict[Request, Encoded] = {}
    for number, request in enumerate(requests):
        tokens[request], results[request] = prepare(encoder, request, images[request.view], draw, number, owners)
    groups: dict[tuple[int, bool], list[Request]] = defaultdict(list)
    for request in requests:
        groups[tokens[request].shape[1], isinstance(request.mask, Causal)].append(request)
    for (_, causal), members in groups.items():
        mask = causal_mask(encoder, images[members[0].view]) if causal else None
        joint = encoder.transform(torch.cat([tokens.pop(member) for member in members]), mask, chunks=chunks)
        sizes = [len(images[member.view]) for member in members]
        for member, cls, patches in zip(members, joint.cls.split(sizes), joint.patches.split(sizes), strict=True):
            results[member].cls, results[member].patches = cls, patches
    return results


def prepare(
    encoder: Encoder, request: Request, images: Tensor, draw: Draw, number: int, owners: dict[str, Objective]
) -> tuple[Tensor, Encoded]:
    """The blocks' input for a request, and its result but for the tokens."""
    result = Encoded(None, None)
    if request.noise:
        key, sigma = (draw.seed, draw.number, number), request.noise
        result.noise, result.noise_level = gaussian_noise(images, sigma, request.noise_drawn, key, draw.first_index)
        images = images + result.noise
    ids_keep = None
    if isinstance(request.mask, Drop):
        ids_keep, result.ids_restore, result.mask = random_masking(
            len(images),
            encoder.num_patches,
            mask_ratio=request.mask.ratio,
            seed=draw.seed + number,
            offset=draw.number,
            first_index=draw.first_index,
            device=images.device,
        )
    patches, positions = encoder.embed(images, ids_keep)
    if isinstance(request.mask, Replace):
        chosen, token = owners[request.mask.owner].replaced(request, len(images), draw.first_index, draw.number)
        result.mask = chosen.to(patches.dtype)
        patches = torch.where(chosen[..., None], token.to(patches.dtype), patches)
    if isinstance(request.mask, Causal):
        result.embedded = patches
    return encoder.with_prefix(patches, positions), result


def causal_mask(encoder: Encoder, images: Tensor) -> Tensor:
    """[T, T], 0 where a row looks at a column and −inf elsewhere: patches look at prefix tokens and at rows up to their
    own, prefix tokens at themselves. Attention adds it, which all of timm's versions do rightly with floats alone.
    """
    rows, columns = (side // patch for side, patch in zip(images.shape[2:], encoder.patch_size, strict=True))
    prefix = torch.full((encoder.vit.num_prefix_tokens,), -1)
    order = torch.cat([prefix, torch.arange(rows).repeat_interleave(columns)]).to(images.device)
    return torch.where(order[:, None] >= order, 0.0, -torch.inf)
