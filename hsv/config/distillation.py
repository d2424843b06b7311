"""Settings of the methods that learn from another view of the same image: BYOL, SimSiam, DINO, iBOT, SwAV."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hsv.config.checks import not_negative, positive, require, share
from hsv.data.views import SIMCLR_224, ViewSpec

__all__ = ["BYOLConfig", "DINOConfig", "IBOTConfig", "SelfDistillationConfig", "SimSiamConfig", "SwAVConfig"]

FIRST_GLOBAL = ViewSpec(
    crop_scale=(0.4, 1.0),
    jitter_prob=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    blur=1.0,
)
SECOND_GLOBAL = replace(FIRST_GLOBAL, blur=0.1, solarize=0.2)
LOCAL = replace(FIRST_GLOBAL, crop_scale=(0.05, 0.4), blur=0.5)
IBOT_FIRST = replace(FIRST_GLOBAL, crop_scale=(0.25, 1.0))
IBOT_SECOND = replace(SECOND_GLOBAL, crop_scale=(0.25, 1.0))
IBOT_LOCAL = replace(LOCAL, crop_scale=(0.05, 0.25))
BYOL_FIRST = replace(FIRST_GLOBAL, crop_scale=(0.08, 1.0))
BYOL_SECOND = replace(SECOND_GLOBAL, crop_scale=(0.08, 1.0))
SIMSIAM = replace(SIMCLR_224, crop_scale=(0.2, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
SWAV = replace(SIMCLR_224, crop_scale=(0.14, 1.0))
SWAV_LOCAL = replace(SIMCLR_224, crop_scale=(0.05, 0.14))


@dataclass
class BYOLConfig:
    """A predictor of the projections of a momentum encoder (Grill et al. 2020)."""

    view: ViewSpec = BYOL_FIRST
    """Augmentation of the first view."""
    second_view: ViewSpec = BYOL_SECOND
    """Augmentation of the second view."""
    momentum: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 along a cosine."""
    hidden_dim: int = 4096
    """Hidden width of projector and predictor."""
    out_dim: int = 256
    """Width of the embeddings that are compared."""
    predictor_lr_scale: float = 1.0
    """Learning rate of the predictor, in multiples of that of everything else, > 0. AdamW's decay scales with it."""
    pool: Literal["mean", "cls"] = "mean"
    """What the heads read: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        share(f"{name}.momentum", self.momentum, whole=True)
        positive(f"{name}.hidden_dim", self.hidden_dim)
        positive(f"{name}.out_dim", self.out_dim)
        positive(f"{name}.predictor_lr_scale", self.predictor_lr_scale)


@dataclass
class SimSiamConfig:
    """A predictor of the other view's projection, without negatives and without a teacher (Chen and He 2021)."""

    view: ViewSpec = SIMSIAM
    """Augmentation of both views."""
    out_dim: int = 2048
    """Width of the projector, hidden and out."""
    projector_layers: int = 3
    """Layers of the projector (published for CIFAR-10: 2)."""
    predictor_dim: int = 512
    """Hidden width of the predictor."""
    predictor_lr_scale: float = 1.0
    """Learning rate of the predictor, in multiples of that of everything else, > 0. AdamW's decay scales with it."""
    pool: Literal["mean", "cls"] = "mean"
    """What the heads read: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("out_dim", "projector_layers", "predictor_dim", "predictor_lr_scale"):
            positive(f"{name}.{setting}", getattr(self, setting))


@dataclass
class SelfDistillationConfig:
    """Head, teacher and centre, which DINO and iBOT share."""

    hidden_dim: int = 2048
    """Hidden width of the head."""
    bottleneck_dim: int = 256
    """Width of the head before the prototypes."""
    head_layers: int = 3
    """Layers of the head before the prototypes."""
    batch_norm: bool = False
    """Normalise the layers of the head over the batch, its bottleneck too: rows that vary little stay apart."""
    out_dim: int = 65536
    """Prototypes K."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax in the first step."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_epochs: float = 30.0
    """Epochs over which the teacher's temperature rises, at most 10 % of the run."""
    centring: Literal["mean", "sinkhorn"] = "mean"
    """What keeps the teacher from one prototype: a running mean of its logits, or Sinkhorn–Knopp on the batch."""
    centre_momentum: float = 0.9
    """Momentum of the running mean of the teacher's logits; iBOT has one of crops and one of patches."""
    momentum: float = 0.996
    """Momentum of the teacher at the start; it rises to 1 along a cosine."""
    freeze_last_epochs: float = 1.0
    """Epochs in which the prototypes do not learn, at most 10 % of the run."""
    pool: Literal["mean", "cls"] = "cls"
    """What the head reads of a crop, and by default the exported features: mean of the patch tokens, or class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("hidden_dim", "bottleneck_dim", "head_layers", "out_dim"):
            positive(f"{name}.{setting}", getattr(self, setting))
        for setting in ("student_temperature", "teacher_temperature_start", "teacher_temperature"):
            positive(f"{name}.{setting}", getattr(self, setting))
        for setting in ("teacher_temperature_epochs", "freeze_last_epochs"):
            not_negative(f"{name}.{setting}", getattr(self, setting))
        share(f"{name}.momentum", self.momentum, whole=True)
        share(f"{name}.centre_momentum", self.centre_momentum, whole=True)


@dataclass
class DINOConfig(SelfDistillationConfig):
    """Self-distillation over crops of two sizes (Caron et al. 2021)."""

    global_view: ViewSpec = FIRST_GLOBAL
    """Augmentation of the first large crop."""
    second_global_view: ViewSpec = SECOND_GLOBAL
    """Augmentation of the second large crop."""
    local_view: ViewSpec = LOCAL
    """Augmentation of the small crops; without a `size` they are 3/7 as large as the others (96 of 224 pixels)."""
    num_locals: int = 8
    """Small crops of an image."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        super().check(name)
        not_negative(f"{name}.num_locals", self.num_locals)


@dataclass
class IBOTConfig(SelfDistillationConfig):
    """Self-distillation over crops of two sizes, and of masked patches (Zhou et al. 2022)."""

    out_dim: int = 8192
    """Prototypes K, of crops and patches."""
    global_view: ViewSpec = IBOT_FIRST
    """Augmentation of the first large crop."""
    second_global_view: ViewSpec = IBOT_SECOND
    """Augmentation of the second large crop."""
    local_view: ViewSpec = IBOT_LOCAL
    """Augmentation of the small crops; without a `size` they are 3/7 as large as the others (96 of 224 pixels)."""
    num_locals: int = 10
    """Small crops of an image."""
    mask_probability: float = 0.5
    """Share of the large crops that is masked."""
    mask_ratio: float = 0.3
    """Mean share of the patches of a masked crop that the mask token replaces."""
    mask_ratio_spread: float = 0.2
    """Each masked crop draws its share uniformly up to this far from the mean."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        super().check(name)
        not_negative(f"{name}.num_locals", self.num_locals)
        share(f"{name}.mask_probability", self.mask_probability, whole=True)
        ratios = self.mask_ratio - self.mask_ratio_spread, self.mask_ratio + self.mask_ratio_spread
        within = 0 <= ratios[0] <= ratios[1] <= 1
        require(within, f"{name}.mask_ratio ± {name}.mask_ratio_spread", ratios, "shares between 0 and 1")


@dataclass
class SwAVConfig:
    """Each crop predicts the cluster that Sinkhorn–Knopp assigns to another crop (Caron et al. 2020)."""

    view: ViewSpec = SWAV
    """Augmentation of the two large crops."""
    local_view: ViewSpec = SWAV_LOCAL
    """Augmentation of the small crops; without a `size` they are 3/7 as large as the others (96 of 224 pixels)."""
    num_locals: int = 6
    """Small crops of an image."""
    hidden_dim: int = 2048
    """Hidden width of the projection head."""
    out_dim: int = 128
    """Width of the projections, on the unit sphere."""
    prototypes: int = 3000
    """Clusters K."""
    temperature: float = 0.1
    """Temperature of the predictions."""
    epsilon: float = 0.05
    """Temperature of the assignments, the entropy's weight in Sinkhorn–Knopp."""
    iterations: int = 3
    """Iterations of Sinkhorn–Knopp."""
    freeze_prototypes_epochs: float = 1.0
    """Epochs in which the prototypes do not learn, at most 10 % of the run."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patch tokens, or the class token."""

    def check(self, name: str) -> None:
        """Raise ValueError for the first setting that cannot work."""
        for setting in ("hidden_dim", "out_dim", "prototypes", "temperature", "epsilon", "iterations"):
            positive(f"{name}.{setting}", getattr(self, setting))
        require(self.prototypes >= 2, f"{name}.prototypes", self.prototypes, "at least 2")
        not_negative(f"{name}.num_locals", self.num_locals)
        not_negative(f"{name}.freeze_prototypes_epochs", self.freeze_prototypes_epochs)
