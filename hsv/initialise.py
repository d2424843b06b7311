"""Weights to start from."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

from timm.models import load_state_dict
from torch import Tensor

from hsv.export import load_encoder
from hsv.models import Encoder

__all__ = ["initialise"]

PREFIX = "encoder.vit."  # of timm's names in a checkpoint of a run


def initialise(encoder: Encoder, path: str | Path) -> None:
    """Load into `encoder` the weights of a run folder, a checkpoint of a run, or a file that timm can read.

    Of a method with a momentum teacher a folder and a checkpoint alike give what the run exports.

    Positions and the patch embedding are resampled to the encoder's size as timm does; a classifier is left out.

    Raises:
        ValueError: nothing at `path`, or weights of another architecture.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(
            f"init: got {str(path)!r}; allowed: 'timm', a file of weights, a checkpoint or the folder of a run"
        )
    weights = _weights(path)
    from timm.models.vision_transformer import checkpoint_filter_fn

    weights = checkpoint_filter_fn(weights, encoder.vit, interpolation="bicubic", antialias=True)
    weights = {key: value for key, value in weights.items() if not key.startswith(("head.", "fc_norm."))}
    try:
        encoder.vit.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"init: got {str(path)!r}; allowed: weights of {encoder.name} ({shorten(str(error), 240)})"
        ) from error


def _weights(path: Path) -> dict[str, Tensor]:
    """timm's names to tensors; of a run the encoder that it exports."""
    if path.is_dir():
        return dict(load_encoder(path).vit.state_dict())
    try:
        weights = load_state_dict(str(path))
    except Exception as error:  # each format has errors of its own
        raise ValueError(
            f"init: got {str(path)!r}; allowed: a file of weights that timm reads ({shorten(repr(error), 240)})"
        ) from error
    ours = any(key.startswith(PREFIX) for key in weights)
    return dict(load_encoder(path).vit.state_dict() if ours else weights)
