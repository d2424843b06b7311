"""What a setting may be, said in one way: name, value given, values allowed."""

from __future__ import annotations

import math

__all__ = ["decoder_width", "not_negative", "positive", "require", "share"]


def positive(name: str, value: float | None, *, optional: bool = False) -> None:
    """Raise ValueError unless `value` is a finite number > 0, or None where it is optional."""
    allowed = value is None if optional else False
    require(allowed or (value is not None and value > 0 and math.isfinite(value)), name, value, "a number > 0")


def not_negative(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number ≥ 0."""
    require(0 <= value < math.inf, name, value, "a number >= 0")


def share(name: str, value: float, *, whole: bool = False) -> None:
    """Raise ValueError unless `value` is in [0, 1), or in [0, 1] for `whole`."""
    require(0 <= value < 1 or (whole and value == 1), name, value, f"a number in [0, 1{']' if whole else ')'}")


def require(condition: bool, name: str, given: object, allowed: str) -> None:
    """Raise ValueError that names the setting, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name}: got {given!r}; allowed: {allowed}")


def decoder_width(name: str, value: int) -> None:
    """Raise ValueError unless `value` is a width for decoders with one attention head for every 32 channels."""
    require(value > 0 and value % 32 == 0, name, value, "a multiple of 32")
