"""Dataclasses to plain values and back, with the types that their hints ask for."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from typing import Any

from hsv.config.checks import require

__all__ = ["build", "plain"]


def plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def build(cls: type, values: dict[str, Any], where: str, default: Any = None) -> Any:
    """An instance of the dataclass `cls` from a dictionary; what it leaves out is as in `default`."""
    default = cls() if default is None else default
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    require(not unknown, where, sorted(unknown), "keys " + ", ".join(hints))
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
        return build(hint, value, where, default)
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
