"""The configuration of a run: one tree of dataclasses that the command line, the YAML file and the checkpoint share."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from hsv.data.views import MAE, SIMCLR_224, ViewSpec

__all__ = [
    "Config",
    "EncoderConfig",
    "InputConfig",
    "MAEConfig",
    "OptimiserConfig",
    "RunConfig",
    "SimCLRConfig",
    "WeightingConfig",
    "load_config",
    "preset_named_in",
    "preset_names",
    "preset_path",
]


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


@dataclass
class SimCLRConfig:
    """Two augmented views, a projection head, NT-Xent (Chen et al. 2020)."""

    view: ViewSpec = SIMCLR_224
    """Augmentation of both views."""
    temperature: float = 0.1
    """Temperature of NT-Xent, > 0."""
    hidden_dim: int = 2048
    """Hidden width of the projection head."""
    out_dim: int = 128
    """Width of the projections that are compared."""
    pool: Literal["mean", "cls"] = "mean"
    """What the head reads: the mean of the patch tokens, or the class token."""


@dataclass
class MAEConfig:
    """Masked reconstruction from the visible patches (He et al. 2021)."""

    view: Literal["shared", "own"] = "shared"
    """`shared`: reconstruct the first contrastive view; `own`: a view of its own, after `own_view`.
    Without a contrastive objective the view is always its own."""
    own_view: ViewSpec = MAE
    """Augmentation of the view of its own."""
    mask_ratio: float = 0.75
    """Share of the patches that is removed, in [0, 1)."""
    norm_pix: bool = True
    """Normalise each target patch by its own mean and deviation."""
    decoder_dim: int = 256
    """Width of the decoder."""
    decoder_depth: int = 4
    """Number of blocks of the decoder."""
    decoder_heads: int | None = None
    """Attention heads of the decoder; unset = one for every 32 channels."""

    @property
    def heads(self) -> int:
        """Attention heads of the decoder."""
        return max(1, self.decoder_dim // 32) if self.decoder_heads is None else self.decoder_heads


@dataclass
class WeightingConfig:
    """How the losses of several objectives become one. Each is first divided by its value at chance."""

    kind: Literal["uncertainty", "fixed"] = "uncertainty"
    """`uncertainty`: learned weights within [1/4, 4] (after Kendall et al. 2018); `fixed`: those of `fixed`."""
    fixed: dict[str, float] = field(default_factory=dict)
    """Fixed weight by objective; 1 for those that are not named."""
    lr: float = 1e-2
    """Learning rate of the learned weights, under the same schedule as the others."""


@dataclass
class OptimiserConfig:
    """AdamW, a linear warm-up and a cosine to zero, per step."""

    base_lr: float = 5e-4
    """Learning rate for 256 images a step; it grows in proportion to `run.batch_size`."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the matrices; norms, biases, tokens and positions have none."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, at most 10 % of the run."""
    clip: float | None = 3.0
    """Largest norm of the gradient; `null` switches clipping off."""


@dataclass
class RunConfig:
    """Length, size, precision and bookkeeping of the run."""

    batch_size: int = 256
    """Images of an optimiser step, over all ranks and micro-batches."""
    accumulate: int = 1
    """Micro-batches of a step. Each contrasts only its own images."""
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
    """Show a progress bar."""


@dataclass
class Config:
    """Pre-training of a vision transformer on images without labels."""

    data: str | None = None
    """What to train on, always needed: `digits` (embedded), a folder of images, or a folder or glob of tar shards."""
    output: str | None = None
    """Folder of the run; unset = runs/DATA-TIME."""
    init: str | None = None
    """Weights to start from: `timm` (pretrained weights of `encoder.name`), a file, or the folder of an earlier run."""
    minutes: float | None = None
    """Length of the training in minutes: measured once, when the run begins, and from then on a number of steps."""
    objectives: list[str] = field(default_factory=lambda: ["simclr", "mae"])
    """What is trained together, of `simclr` and `mae`."""
    input: InputConfig = field(default_factory=InputConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    simclr: SimCLRConfig = field(default_factory=SimCLRConfig)
    mae: MAEConfig = field(default_factory=MAEConfig)
    weighting: WeightingConfig = field(default_factory=WeightingConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, Any]:
        """The tree as plain dictionaries, lists and numbers."""
        return _plain(self)

    def save(self, path: Path) -> None:
        """Write the tree as YAML."""
        path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; keys that are missing take their defaults, unknown ones raise."""
        return _build(cls, values, "config")

    def check(self) -> None:
        """Raise ValueError for the first setting that cannot work."""
        known = ("simclr", "mae")
        _require(
            bool(self.objectives)
            and set(self.objectives) <= set(known)
            and len(set(self.objectives)) == len(self.objectives),
            "objectives",
            self.objectives,
            f"one or more of {', '.join(known)}, each once",
        )
        _positive("run.batch_size", self.run.batch_size)
        _positive("run.accumulate", self.run.accumulate)
        _positive("run.log_every", self.run.log_every)
        _positive("run.checkpoint_every", self.run.checkpoint_every)
        _positive("run.keep", self.run.keep)
        _positive("run.epochs", self.run.epochs)
        _positive("run.steps", self.run.steps, optional=True)
        _positive("minutes", self.minutes, optional=True)
        _require(self.run.seed >= 0, "run.seed", self.run.seed, "a whole number >= 0")
        _positive("optimiser.base_lr", self.optimiser.base_lr)
        _not_negative("optimiser.weight_decay", self.optimiser.weight_decay)
        _not_negative("optimiser.warmup_epochs", self.optimiser.warmup_epochs)
        _positive("weighting.lr", self.weighting.lr)
        _positive("optimiser.clip", self.optimiser.clip, optional=True)
        _require(0 <= self.encoder.drop_path < 1, "encoder.drop_path", self.encoder.drop_path, "a number in [0, 1)")
        _positive("simclr.temperature", self.simclr.temperature)
        _positive("simclr.hidden_dim", self.simclr.hidden_dim)
        _positive("simclr.out_dim", self.simclr.out_dim)
        _require(0 <= self.mae.mask_ratio < 1, "mae.mask_ratio", self.mae.mask_ratio, "a number in [0, 1)")
        _positive("mae.decoder_dim", self.mae.decoder_dim)
        _positive("mae.decoder_depth", self.mae.decoder_depth)
        _require(
            self.mae.heads > 0 and self.mae.decoder_dim % self.mae.heads == 0,
            "mae.decoder_heads",
            self.mae.heads,
            f"a divisor of mae.decoder_dim = {self.mae.decoder_dim}",
        )
        _require(
            self.run.batch_size % self.run.accumulate == 0,
            "run.accumulate",
            self.run.accumulate,
            f"a divisor of run.batch_size = {self.run.batch_size}",
        )
        unknown = set(self.weighting.fixed) - set(known)
        _require(not unknown, "weighting.fixed", sorted(unknown), f"names among {', '.join(known)}")
        _require(
            self.weighting.kind == "fixed" or not self.weighting.fixed,
            "weighting.fixed",
            self.weighting.fixed,
            "weights with weighting.kind = 'fixed', none with 'uncertainty', which learns them",
        )
        _require(
            self.minutes is None or self.run.steps is None,
            "minutes and run.steps",
            (self.minutes, self.run.steps),
            "one of them",
        )
        _require(
            (self.input.mean is None) == (self.input.std is None),
            "input.mean and input.std",
            (self.input.mean, self.input.std),
            "both, or neither",
        )
        _require(bool(self.data), "data", self.data, "digits, a folder of images, or tar shards")


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("hsv.presets")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_path(name: str) -> Path:
    """Path of a preset's YAML file. Raises ValueError for an unknown name."""
    _require(name in preset_names(), "preset", name, f"one of {', '.join(preset_names())}")
    return Path(str(resources.files("hsv.presets") / f"{name}.yaml"))


def load_config(path: str | Path | None = None, *, preset: str | None = None) -> Config:
    """A configuration from a YAML file, a preset, or the file over the preset.

    The file may name its preset itself, under the key `preset`; the argument comes before it.
    """
    own = _read_yaml(path) if path is not None else {}
    named = own.pop("preset", None)
    values = _read_yaml(preset_path(preset or named)) if preset or named else {}
    _merge(values, own)
    return Config.from_dict(values)


def preset_named_in(path: str | Path) -> str | None:
    """The preset that a YAML file starts from, if it names one."""
    return _read_yaml(path).get("preset")


def _read_yaml(path: str | Path) -> dict[str, Any]:
    return yaml.safe_load(Path(path).read_text()) or {}


def _merge(into: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _build(cls: type, values: dict[str, Any], where: str, default: Any = None) -> Any:
    """An instance of the dataclass `cls` from a dictionary; what it leaves out is as in `default`."""
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    _require(not unknown, where, sorted(unknown), "keys " + ", ".join(hints))
    arguments = {
        key: _convert(value, hints[key], f"{where}.{key}", getattr(default, key)) for key, value in values.items()
    }
    return dataclasses.replace(default, **arguments)


def _convert(value: Any, hint: Any, where: str, default: Any = None) -> Any:
    """`value` as the type that `hint` asks for. Lists become tuples, and text such as 2e-3 a number."""
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        for part in parts:
            with contextlib.suppress(ValueError):
                return _convert(value, part, where)
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _build(hint, value, where, default)
    elif kind is typing.Literal and value in parts:
        return value
    elif kind is list and isinstance(value, list | tuple):
        return [_convert(item, parts[0], where) for item in value]
    elif kind is tuple and isinstance(value, list | tuple) and len(value) == len(parts):
        return tuple(_convert(item, part, where) for item, part in zip(value, parts, strict=True))
    elif kind is dict and isinstance(value, dict):
        return {_convert(key, parts[0], where): _convert(item, parts[1], where) for key, item in value.items()}
    elif hint is float and isinstance(value, str | int | float) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    elif kind is None and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    name = hint.__name__ if isinstance(hint, type) and kind is None else str(hint).replace("typing.", "")
    raise ValueError(f"{where}: got {value!r}; allowed: {name}")


def _positive(name: str, value: float | None, *, optional: bool = False) -> None:
    allowed = value is None if optional else False
    _require(allowed or (value is not None and value > 0 and math.isfinite(value)), name, value, "a number > 0")


def _not_negative(name: str, value: float) -> None:
    _require(0 <= value < math.inf, name, value, "a number >= 0")


def _require(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {given!r}; allowed: {allowed}")
