"""Checkpoints: written whole or not at all, the newest few kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import nn

from hsv.config import Config

__all__ = ["check_resumed", "find_checkpoint", "read_checkpoint", "restore", "save_checkpoint"]

FORMAT = 3
_NAME = re.compile(r"step-(\d+)\.pt")


def save_checkpoint(
    run_dir: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, config: Config, *, keep: int
) -> Path:
    """Write checkpoints/step-N.pt under `run_dir` and drop all but the newest `keep`.

    A run draws its randomness from (seed, step), so step, weights and optimiser are its whole state.
    """
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save({"format": FORMAT, "step": step, "config": config.to_dict(), **state}, partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    for old in _checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def find_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint that `path` is, or the newest of the run folder that it is; None if there is none."""
    path = Path(path)
    if path.is_file():
        return path
    found = _checkpoints(path / "checkpoints")
    return found[-1] if found else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Contents of a checkpoint, or of the newest of a run folder, on the CPU: step, config, model, optimiser.

    Raises ValueError if there is none, it is damaged or it is of another format.
    """
    found = find_checkpoint(path)
    if found is None:
        raise ValueError(
            f"checkpoint: got {str(path)!r}; allowed: a checkpoint file or the folder of a run that has one"
        )
    try:
        state = torch.load(found, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage has an error of its own
        raise ValueError(f"checkpoint: got {str(found)!r}, which cannot be read; allowed: {_instead(found)}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"checkpoint: got {str(found)!r}; allowed: a file written by hsv pretrain (format {FORMAT})")
    return state


def _instead(broken: Path) -> str:
    """What can be given in place of a checkpoint that cannot be read."""
    allowed = "a file written by hsv pretrain"
    older = [path for path in _checkpoints(broken.parent) if path < broken]
    return (
        f"{allowed}, such as {older[-1]}: the run goes on from it once {broken.name} is deleted" if older else allowed
    )


def restore(state: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load weights and moments, strictly, and return the step to go on with.

    Learning rate, decay and betas stay those of `optimiser`, so that a run can go on under other settings. Moments are
    those of the parameter of the same name, whatever its group; parameters that were frozen begin without.

    Raises ValueError for settings that describe another model.
    """
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        allowed = "objectives, widths, teachers' momenta and kind of weighting as the run began with"
        raise ValueError(
            f"resume: got settings of another model; allowed: {allowed} ({shorten(str(error), 240)})"
        ) from error
    saved, groups = state["optimiser"], optimiser.state_dict()["param_groups"]
    moments = {name: saved["state"].get(i) for i, name in _named_indices(saved["param_groups"])}
    found = {i: moments[name] for i, name in _named_indices(groups) if moments.get(name) is not None}
    optimiser.load_state_dict({"state": found, "param_groups": groups})
    return state["step"]


def check_resumed(config: Config, state: dict[str, Any]) -> None:
    """Take unset mean and deviation from the run; raise ValueError for images that its weights do not know."""
    began = state["config"]
    if config.input.mean is None:
        config.input.mean, config.input.std = began["input"]["mean"], began["input"]["std"]
    given = config.to_dict()
    for section, names in (("input", ("image_size", "channels", "mean", "std")), ("encoder", ("name", "patch_size"))):
        for name in names:
            now, then = given[section][name], began[section][name]
            if now != then:
                raise ValueError(f"{section}.{name}: got {now}; allowed: {then}, as when the run began")


def _named_indices(groups: list[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """(index, name) of the parameters in the groups of an optimiser's state."""
    return (pair for group in groups for pair in zip(group["params"], group["param_names"], strict=True))


def _checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []
