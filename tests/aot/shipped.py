"""Every Triton kernel that ships, for each architecture it ships for, and what all of them use."""

import functools
import importlib
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager

from hsv_kernels.backends import OPERATIONS
from hsv_kernels.ops.triton_utils import Architecture, Configuration
from tests.aot.compile import Resources, compile_for

__all__ = ["Name", "compiling", "sample", "shipped"]

#: (operation, kernel, dtypes and sizes, architecture)
Name = tuple[str, str, str, str]
Shipped = dict[Name, tuple[Architecture, Configuration]]


@functools.cache
def shipped() -> Shipped:
    """What every operation's configurations() lists, one entry for each architecture."""
    found: Shipped = {}
    for operation, served in OPERATIONS.items():
        if "triton" not in served:
            continue
        module = importlib.import_module(f"hsv_kernels.ops.{operation}.triton_kernels")
        for configuration in module.configurations():
            for architecture in configuration.architectures:
                found[name_of(operation, configuration, architecture)] = architecture, configuration
    return found


@functools.cache
def sample() -> frozenset[Name]:
    """Every configuration once, for one of its architectures, which take turns."""
    by_configuration: dict[tuple[str, ...], list[Name]] = {}
    for name in shipped():
        by_configuration.setdefault(name[:3], []).append(name)
    return frozenset(names[turn % len(names)] for turn, names in enumerate(by_configuration.values()))


def name_of(operation: str, configuration: Configuration, architecture: Architecture) -> Name:
    kinds = [kind.removeprefix("*") for kind in configuration.signature.values() if kind.startswith("*")]
    sizes = [f"{name}={value}" for name, value in configuration.constexprs.items() if name.isupper()]
    sizes += [f"{configuration.num_warps} warps", f"{configuration.num_stages} stages"]
    sizes += [f"{configuration.registers} registers"] if configuration.registers else []
    target = architecture if isinstance(architecture, str) else f"sm_{architecture}"
    return operation, configuration.kernel.__name__, ", ".join(["/".join(dict.fromkeys(kinds)), *sizes]), target


@contextmanager
def compiling(names: Iterable[Name]) -> Iterator[dict[Name, Future[Resources]]]:
    """Compiles in as many processes as there are cores; what a kernel uses is there as soon as it is compiled."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        futures = {name: processes.submit(compile_one, name) for name in names}
        try:
            yield futures
        finally:
            processes.shutdown(cancel_futures=True)


def compile_one(name: Name) -> Resources:
    return compile_for(*shipped()[name])
