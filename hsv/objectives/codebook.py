"""Discrete targets for patches: k-means on whitened pixels, or a function of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hsv.data.hashing import Stream, permutation, uniform

__all__ = ["Codebook", "load_tokenizer"]

PATCHES = 20_000  # that the codebook is fitted on
FROM_EACH = 16  # image, at most
ITERATIONS = 30
FLOOR = 0.01  # of the largest variance, added to all: whitening must not blow up what is noise
CHUNK = 4_096


def load_tokenizer(path: str) -> Callable[[Tensor], Tensor]:
    """The function that `package.module:function` names. Raises ValueError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (AttributeError, ImportError, ValueError) as error:
        raise ValueError(f"beit.tokenizer: got {path!r}; allowed: package.module:function ({error})") from error


class Codebook(nn.Module):
    """The nearest of K centres of each whitened patch, w = (x − mean) · whitening.

    Args:
        count: K.
        patch_size: height and width of a patch.
        channels: of the images.
    """

    def __init__(self, count: int, patch_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        size = patch_size[0] * patch_size[1] * channels
        # Frozen parameters and not buffers: DDP gives every rank those of the first before it begins.
        self.mean = nn.Parameter(torch.zeros(size), requires_grad=False)
        self.whitening = nn.Parameter(torch.zeros(size, size), requires_grad=False)
        self.centres = nn.Parameter(torch.zeros(count, size), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] to the numbers of their patches' centres, int64 [B, L]."""
        with torch.autocast(images.device.type, enabled=False):
            patches = self.patches(images.float())
            ids = nearest((patches.flatten(0, 1) - self.mean) @ self.whitening, self.centres)
        return ids.unflatten(0, patches.shape[:2])

    def patches(self, images: Tensor) -> Tensor:
        """[B, L, p·q·C]."""
        p, q = self.patch_size
        grid = images.unflatten(3, (-1, q)).unflatten(2, (-1, p))  # [B, C, rows, p, columns, q]
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    @torch.no_grad()
    def fit(self, images: Iterator[Tensor], seed: int) -> None:
        """Whitening and Lloyd's k-means on at most 20,000 patches of normalised images [C, H, W]."""
        x = self.sample(images, seed)
        self.mean.copy_(x.mean(0))
        x = x - self.mean
        variances, directions = torch.linalg.eigh((x.T @ x / len(x)).double())
        self.whitening.copy_(directions / (variances.clamp_min(0) + FLOOR * variances.amax()).sqrt())
        self.centres.copy_(k_means(x @ self.whitening, len(self.centres), seed))

    def sample(self, images: Iterator[Tensor], seed: int) -> Tensor:
        """Random patches [N, p·q·C], at most 16 of an image."""
        found, missing = [], PATCHES
        for number, image in enumerate(images):
            patches = self.patches(image[None])[0]
            chosen = permutation((Stream.CODEBOOK_SAMPLE, seed, number), len(patches))[: min(FROM_EACH, missing)]
            found.append(patches[torch.from_numpy(chosen)])
            missing -= len(chosen)
            if not missing:
                break
        return torch.cat(found)


def k_means(x: Tensor, count: int, seed: int) -> Tensor:
    """Centres [count, D] of rows x [N, D] by Lloyd's iterations from random rows; an empty cluster starts anew."""
    starts = torch.from_numpy(permutation((Stream.CODEBOOK_CENTRES, seed), max(len(x), count))[:count] % len(x))
    centres = x[starts].clone()
    for iteration in range(ITERATIONS):
        ids = nearest(x, centres)
        sizes = torch.bincount(ids, minlength=count)
        centres = torch.zeros_like(centres).index_add_(0, ids, x) / sizes.clamp_min(1)[:, None]
        empty = (sizes == 0).nonzero().squeeze(1)
        anew = uniform((Stream.CODEBOOK_CENTRES, seed, iteration), empty.numpy(), 1)[:, 0] * len(x)
        centres[empty] = x[torch.from_numpy(anew.astype("int64"))]
    return centres


def nearest(x: Tensor, centres: Tensor) -> Tensor:
    """int64 [N]: argmin_k ‖x_i − c_k‖² = argmax_k x_i · c_k − ‖c_k‖² / 2."""
    offsets = -centres.square().sum(1) / 2
    return torch.cat([torch.addmm(offsets, rows, centres.T).argmax(1) for rows in x.split(CHUNK)])
