"""Settings of the run itself: images, encoder, optimiser, length, weights of several losses."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from hsv.config.checks import not_negative, positive, require, share

__all__ = ["EncoderConfig", "InputConfig", "OptimiserConfig", "RunConfig", "WeightingConfig"]


@dataclass
class InputConfig:
    """How images become tensors."""

    image_size: int | tuple[int, int] = 224
    """Side of square views in pixels, or height and width."""
    channels: Literal[1, 3] = 3
    """3 (grey replicated, alpha over white) or 1."""
    limit: int | None = None
    """Use at most so many training images: the first ones of shards and digits, evenly spread ones of a folder."""
    workers: int | None = None
    """Processes that decode and crop; 0 = in the training process; unset = chosen from the number of cores."""
    mean: list[float] | None = None
    """Mean of each channel, in [0, 1]; unset = measured on at most 2,000 training images."""
    std: list[float] | None = None
    """Standard deviation of each channel; unset = measured together with the mean."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        require(
            (self.mean is None) == (self.std is None),
            f"{name}.mean and {name}.std",
            (self.mean, self.std),
            "both, or neither",
        )
        for setting in ("mean", "std"):
            values = getattr(self, setting)
            if values is None:
                continue
            good = len(values) == self.channels and all(map(math.isfinite, values))
            good = good and (setting == "mean" or min(values) > 0)
            allowed = f"{self.channels} numbers{' > 0' if setting == 'std' else ''}, one for each channel"
            require(good, f"{name}.{setting}", values, allowed)


@dataclass
class EncoderConfig:
    """A timm vision transformer with class token and final norm. What is unset stays as timm has it."""

    name: str = "vit_small_patch16_224"
    """Name of a plain vision transformer in timm."""
    patch_size: int | None = None
    """Side of a patch, in pixels."""
    embed_dim: int | None = None
    """Width of a token."""
    depth: int | None = None
    """Number of blocks."""
    num_heads: int | None = None
    """Attention heads of each block."""
    drop_path: float = 0.0
    """Rate of stochastic depth at the last block, rising linearly from 0."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        share(f"{name}.drop_path", self.drop_path)


@dataclass
class WeightingConfig:
    """How the losses of several objectives become one. Each is first divided by its value at chance."""

    kind: Literal["auto", "uncertainty", "gradient_norm", "fixed"] = "auto"
    """`uncertainty`: learned weights within [1/4, 4] (after Kendall et al. 2018), for losses that measure an error;
    `gradient_norm`: weights within [1/4, 4] that bring the gradients on the encoder to one length (after Chen et al.
    2018); `fixed`: those of `fixed`; `auto`: `uncertainty` where every loss allows it, else `gradient_norm`."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Fixed weight by objective; 1 for those that are not named."""
    lr: float = 1e-2
    """Learning rate of the learned weights, under the same schedule as the others."""
    measure_every: int = 100
    """Steps between two measurements of each objective's gradient on the encoder, with several objectives."""

    def check(self, name: str, methods: Collection[str]) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.lr", self.lr)
        positive(f"{name}.measure_every", self.measure_every)
        unknown = set(self.fixed) - set(methods)
        require(not unknown, f"{name}.fixed", sorted(unknown), f"objectives of the run, {', '.join(methods)}")
        for method, weight in self.fixed.items():
            not_negative(f"{name}.fixed.{method}", weight)
        require(
            self.kind == "fixed" or not self.fixed,
            f"{name}.fixed",
            self.fixed,
            f"weights with {name}.kind = 'fixed', none with another, which finds them itself",
        )


@dataclass
class OptimiserConfig:
    """AdamW, a linear warm-up and a cosine to zero, per step."""

    base_lr: float = 5e-4
    """Learning rate for 256 images a step; it grows in proportion to `run.batch_size`."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the matrices; norms, biases, tokens and positions have none."""
    weight_decay_end: float | None = None
    """Decay at the last step, reached along a cosine; unset = constant."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, at most 10 % of the run."""
    clip: float | None = 3.0
    """Largest norm of the gradient, of losses that were divided by their value at chance; `null` switches clipping
    off."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        positive(f"{name}.base_lr", self.base_lr)
        not_negative(f"{name}.weight_decay", self.weight_decay)
        not_negative(f"{name}.weight_decay_end", self.weight_decay_end or 0.0)
        not_negative(f"{name}.warmup_epochs", self.warmup_epochs)
        positive(f"{name}.clip", self.clip, optional=True)


@dataclass
class RunConfig:
    """Length, size, precision and bookkeeping of the run."""

    batch_size: int = 256
    """Images of an optimiser step, over all ranks and micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step. Each contrasts only its own images; `contrastive_chunks` saves memory without that."""
    contrastive_chunks: int = 1
    """Parts in which a batch is encoded, and encoded again for the gradient, which is that of the whole batch: memory
    of one part for about a third more time."""
    negatives: Literal["gather", "ring", "local"] = "gather"
    """Negatives of contrastive losses on several ranks: gathered, passed round a ring with memory for one rank's
    alone, or each rank's own. Those of MoCo v2 are its queue, whatever this says."""
    export: Literal["teacher", "student"] = "teacher"
    """What is exported and evaluated: the momentum encoder of the first objective that has one, or the student."""
    epochs: float = 100.0
    """Length in passes over the data, unless `steps` or `minutes` is given."""
    steps: int | None = None
    """Length in optimiser steps."""
    seed: int = 0
    """Seed of everything drawn at random."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; `auto` prefers an accelerator."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bfloat16 autocast or float32; `auto` takes bfloat16 where the device multiplies it natively."""
    kernels: Literal["auto", "reference"] = "auto"
    """Fused operations, or their plain PyTorch definitions."""
    log_every: int = 10
    """Steps between two lines of metrics."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; the last step always leaves one."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    progress: bool = True
    """Say what the run does and show a progress bar."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        settings = "batch_size", "accumulate", "contrastive_chunks", "log_every", "checkpoint_every", "keep", "epochs"
        for setting in settings:
            positive(f"{name}.{setting}", getattr(self, setting))
        positive(f"{name}.steps", self.steps, optional=True)
        require(self.seed >= 0, f"{name}.seed", self.seed, "a whole number >= 0")
        require(
            self.batch_size % self.accumulate == 0,
            f"{name}.accumulate",
            self.accumulate,
            f"a divisor of {name}.batch_size = {self.batch_size}",
        )
