"""BEiT: the discrete tokens of masked patches (Bao et al. 2021, arXiv:2106.08254)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hsv.config import Config
from hsv.data.hashing import Stream
from hsv.models import Encoder
from hsv.objectives.blocks import block_masks
from hsv.objectives.codebook import Codebook, load_tokenizer
from hsv.objectives.objective import Batch, Objective
from hsv.objectives.request import Replace, Request, View
from hsv_kernels.distributed import rank_mean

__all__ = ["BEiT"]


class BEiT(Objective):
    """A linear classifier over the masked patches' tokens, whose classes a frozen tokenizer gives,

        loss = mean over masked patches l of −log p(token_l | image with mask tokens)

    The published tokenizer is DALL-E's autoencoder, of 8,192 tokens, trained on 250 million pictures. The default here
    needs nothing but the training images: k-means over their whitened patches, fitted once before training. Any other
    is a function `package.module:name` from normalised images [B, C, H, W] to int64 tokens [B, L], or a module,
    which is frozen.
    """

    def __init__(self, encoder: Encoder, config: Config, others: dict[str, Objective]) -> None:
        super().__init__()
        self.config, self.seed = config.beit, config.run.seed
        self.grid = encoder.grid
        self.num_masked = max(1, int(self.config.mask_ratio * encoder.num_patches))
        self.requests = [Request(View(self.config.view, 0), Replace("beit"))]
        self.mask_token = nn.Parameter(torch.randn(encoder.dim) * 0.02)
        self.classifier = nn.Linear(encoder.dim, self.config.vocabulary)
        if self.config.tokenizer is None:
            self.tokenizer = Codebook(self.config.vocabulary, encoder.patch_size, encoder.channels)
        else:
            self.tokenizer = load_tokenizer(self.config.tokenizer)
        if isinstance(self.tokenizer, nn.Module):
            self.tokenizer.eval().requires_grad_(False)

    def prepare(self, images: Iterator[Tensor]) -> None:
        if isinstance(self.tokenizer, Codebook):
            self.tokenizer.fit(images, self.seed)

    def train(self, mode: bool = True) -> BEiT:
        """The tokenizer, where it is a module, stays as it is evaluated."""
        super().train(mode)
        if isinstance(self.tokenizer, nn.Module):
            self.tokenizer.eval()
        return self

    def replaced(self, request: Request, count: int, first_index: int, draw: int) -> tuple[Tensor, Tensor]:
        indices = np.arange(first_index, first_index + count)
        counts = np.full(count, self.num_masked)
        masks = block_masks((Stream.BEIT_BLOCKS, self.seed, draw, request.view.slot), indices, self.grid, counts)
        return torch.from_numpy(masks).to(self.mask_token.device), self.mask_token

    def forward(self, batch: Batch) -> Tensor:
        (request,) = self.requests
        encoded, targets = batch.student[request], self.tokens(batch.images[request.view])
        chosen = encoded.mask.argsort(dim=1, descending=True, stable=True)[:, : self.num_masked]  # [B, masked]
        logits = self.classifier(encoded.patches.take_along_dim(chosen[..., None], 1)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.gather(1, chosen).flatten())
        return rank_mean(loss, len(batch))

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """The tokenizer's classes, int64 [B, L]."""
        ids = self.tokenizer(images)
        expected = (len(images), math.prod(self.grid))
        if ids.shape != expected or ids.dtype != torch.int64:
            raise ValueError(f"beit.tokenizer: got {ids.dtype} {list(ids.shape)}; allowed: int64 {list(expected)}")
        return ids

    def chance(self, batch: int) -> float:
        """ln of the vocabulary: every token as likely."""
        return math.log(self.config.vocabulary)
