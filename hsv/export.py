"""The encoder by itself: made from a configuration, written for timm, read back."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hsv.checkpoint import find_checkpoint, read_checkpoint
from hsv.config import Config
from hsv.models import Encoder
from hsv.objectives import Hybrid, build_hybrid

__all__ = ["build_encoder", "export_encoder", "load_encoder", "load_model", "timm_call"]


def build_encoder(config: Config, *, pretrained: bool = False) -> Encoder:
    """A fresh encoder after `config`, whose `input.mean` and `input.std` are set."""
    chosen = config.encoder
    arguments: dict[str, Any] = {"img_size": config.input.image_size, "in_chans": config.input.channels}
    for key in ("patch_size", "embed_dim", "depth", "num_heads"):
        if getattr(chosen, key) is not None:
            arguments[key] = getattr(chosen, key)
    return Encoder(
        chosen.name,
        arguments,
        mean=tuple(config.input.mean),
        std=tuple(config.input.std),
        pool=getattr(config, config.objectives[0]).pool,
        drop_path=chosen.drop_path,
        pretrained=pretrained,
    )


def timm_call(encoder: Encoder, path: str | Path) -> str:
    """The Python call that builds this encoder with timm alone and loads `path`."""
    arguments = "".join(f", {key}={value!r}" for key, value in encoder.arguments.items())
    return f"timm.create_model({encoder.name!r}{arguments}, checkpoint_path={str(path)!r})"


def export_encoder(encoder: Encoder, folder: Path) -> str:
    """Write encoder.safetensors and encoder.json to `folder` and return the call that loads them with timm."""
    weights = folder / "encoder.safetensors"
    state = {key: value.detach().cpu().contiguous() for key, value in encoder.vit.state_dict().items()}
    partial = weights.with_suffix(".partial")
    partial.write_bytes(save(state, metadata={"format": "pt"}))  # save_file lets nobody else read the file
    partial.replace(weights)
    call = timm_call(encoder, weights)
    description = {
        "name": encoder.name,
        "arguments": encoder.arguments,
        "pool": encoder.pool,
        "mean": encoder.mean,
        "std": encoder.std,
        "channels": encoder.channels,
        "call": timm_call(encoder, weights.name),
    }
    (folder / "encoder.json").write_text(json.dumps(description, indent=2) + "\n")
    return call


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a run folder, a checkpoint or an encoder.safetensors beside its encoder.json, in evaluation mode.

    Of a method with a momentum teacher it is the teacher's, unless the run's `run.export` is `student`.

    Raises ValueError if there is no encoder at `path`.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _load_exported(path)
    if find_checkpoint(path) is None and (path / "encoder.safetensors").is_file():
        return _load_exported(path / "encoder.safetensors")
    config, hybrid = load_model(path)
    return hybrid.exported(config.run.export)


def load_model(path: str | Path) -> tuple[Config, Hybrid]:
    """Configuration and whole model, heads included, of a run folder or a checkpoint, in evaluation mode."""
    checkpoint = read_checkpoint(path)
    config = Config.from_dict(checkpoint["config"])
    hybrid = build_hybrid(config, build_encoder(config))
    hybrid.load_state_dict(checkpoint["model"])
    return config, hybrid.eval()


def _load_exported(path: Path) -> Encoder:
    described = path.with_name("encoder.json")
    if not path.is_file() or not described.is_file():
        raise ValueError(f"path: got {str(path)!r}; allowed: an encoder.safetensors with its encoder.json beside it")
    description = json.loads(described.read_text())
    encoder = Encoder(
        description["name"],
        {key: tuple(v) if isinstance(v, list) else v for key, v in description["arguments"].items()},
        mean=tuple(description["mean"]),
        std=tuple(description["std"]),
        pool=description["pool"],
    )
    try:
        encoder.vit.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        allowed = f"the weights that {described.name} beside it describes"
        raise ValueError(f"path: got {str(path)!r}; allowed: {allowed} ({shorten(str(error), 240)})") from error
    return encoder.eval()
