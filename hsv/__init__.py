"""Train, evaluate and export self-supervised vision encoders."""

import os
from importlib import import_module
from typing import Any

__all__ = ["Config", "Encoder", "load_config", "load_encoder", "pretrain"]

__version__ = "0.1.0"

_HOMES = {
    "Config": "hsv.config",
    "Encoder": "hsv.models",
    "load_config": "hsv.config",
    "load_encoder": "hsv.export",
    "pretrain": "hsv.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import hsv` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hsv' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(missing_dependency(error), name=error.name) from error


def share_processors() -> None:
    """Let threads that wait for work sleep soon, unless the environment says how long; before torch is imported.

    Where other processes want the processors, spinning threads keep each other from running (docs/kernels/threads.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def missing_dependency(error: ModuleNotFoundError) -> str:
    """The sentence that names a package that is absent and says how to install it."""
    return f"the trainer needs {error.name}, which is not installed; pip install '.[train]' in hsv's sources brings it"
