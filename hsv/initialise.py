"""Weights to start from."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import torch
from timm.models import load_state_dict
from torch import Tensor

from hsv.export import load_encoder
from hsv.models import Encoder, resample_positions

__all__ = ["initialise"]

PREFIX = "encoder.vit."  # of timm's names in a checkpoint of a run


def initialise(encoder: Encoder, path: str | Path) -> None:
    """Load into `encoder` the weights of a run folder, a checkpoint of a run, or a file that timm can read.

    Of a method with a momentum teacher a folder and a checkpoint alike give what the run exports.

    Positions and the patch embedding are resampled to the encoder's size as timm does, positions of a file that does
    not say its images' shape as those of square images; a classifier is left out.

    Raises:
        ValueError: nothing at `path`, or weights of another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"init: got {str(path)!r}; allowed: 'timm', a file of weights, a checkpoint or the folder of a run"
        )
    weights = _weights(path, encoder)
    from timm.models.vision_transformer import checkpoint_filter_fn

    weights = checkpoint_filter_fn(weights, encoder.vit, interpolation="bicubic", antialias=True)
    weights = {key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm."))}
    try:
        encoder.vit.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"init: got {str(path)!r}; allowed: weights of {encoder.name} ({shorten(str(error), 240)})"
        ) from error


def _weights(path: Path, encoder: Encoder) -> dict[str, Tensor]:
    """timm's names to tensors; of a run the encoder that it exports, with positions for the grid of `encoder`."""
    exported = path.suffix == ".safetensors" and path.with_name("encoder.json").is_file()
    if path.is_dir() or exported:
        return _fitted(load_encoder(path), encoder.grid)
    try:
        weights = load_state_dict(str(path))
    except Exception as error:  # each format has errors of its own
        raise ValueError(
            f"init: got {str(path)!r}; allowed: a file of weights that timm reads ({shorten(repr(error), 240)})"
        ) from error
    ours = any(key.startswith(PREFIX) for key in weights)
    return _fitted(load_encoder(path), encoder.grid) if ours else weights


def _fitted(source: Encoder, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The weights of `source`, its positions resampled to `grid`."""
    weights = dict(source.vit.state_dict())
    prefix, patches = weights["pos_embed"].tensor_split([-source.num_patches], dim=1)
    weights["pos_embed"] = torch.cat([prefix, resample_positions(patches, source.grid, grid)], 1)
    return weights
