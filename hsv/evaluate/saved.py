"""The file of an evaluation: where it lies, and what it is replaced with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["differences", "evaluation_file", "read_evaluation", "save_evaluation"]

SETTINGS = "checkpoint", "data", "pool", "seed", "k", "per_class", "draws", "train_images", "test_images"


def evaluation_file(checkpoint: str | Path, output: str | Path | None = None) -> Path | None:
    """Where the result goes: `output`, or evaluation.json in the folder of the run, if there is one."""
    if output is not None:
        return Path(output)
    folder = _run_folder(checkpoint)
    return folder / "evaluation.json" if folder else None


def save_evaluation(path: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON, in a folder that is made when absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_evaluation(path: Path | None) -> dict[str, Any] | None:
    """The result in a file, None if it holds none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


def differences(earlier: dict[str, Any], result: dict[str, Any]) -> str:
    """Data and settings of an earlier result that another does not share, such as `data digits, k 20`."""
    others = {key: earlier.get(key) for key in SETTINGS if earlier.get(key) != result[key]}
    return ", ".join(f"{key} {value}" for key, value in others.items())


def _run_folder(checkpoint: str | Path) -> Path | None:
    """The run folder that `checkpoint` is or lies in, or None."""
    path = Path(checkpoint).absolute()
    return next((folder for folder in (path, *path.parents[:2]) if (folder / "config.yaml").is_file()), None)
