"""What is timed: an operation at one shape, its inputs, its providers and the least work that it needs."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

DEVICE = os.environ.get("HSV_BENCH_DEVICE", "cpu")  # bench.gpu sets it
QUICK = os.environ.get("HSV_BENCH_QUICK", "0") != "0"  # small shapes, two rounds: does it run at all
HUGE_PAGES = os.environ.get("THP_MEM_ALLOC_ENABLE", "0") == "1"  # torch's own setting: huge pages for all providers
THREADS = int(os.environ.get("HSV_BENCH_THREADS", "0")) or torch.get_num_threads()

Returned = Tensor | tuple[Tensor, ...]  # by a provider: its value, or that and what else the operation gives

MODES = {  # kind of call → what it times
    "forward": ("forward",),
    "training": ("backward", "both"),
    "step": ("step",),
    "graph": ("forward, graph", "both, graph"),  # replays of CUDA graphs: without what a launch costs
}


@dataclass(frozen=True)
class Provider:
    """One implementation.

    Args:
        make: imports and compiles what it needs and gives the function of the inputs; an ImportError means that the
            library is not installed.
        dtype: of the inputs.
        note: where it computes something slightly different.
        compared: whether its value is checked against eager's.
        around: a context in which it is called, gradients included.
    """

    make: Callable[[], Callable[..., Returned]]
    dtype: torch.dtype = torch.float32
    note: str = ""
    compared: bool = True
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Work:
    """The least work of one call: flops of matrix products, exponentials, bytes read and written."""

    flops: float = 0
    exponentials: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Case:
    """An operation at one shape. Cases of one operation and one type of products ascend in size.

    Args:
        operation: name of the public function, or of the step.
        shape: sizes by name.
        products: type of the dot products, "float32", "tf32" or "bfloat16".
        inputs: dtype → arguments on DEVICE; those that require grad are differentiated.
        providers: by name, "hsv" and "eager" among them.
        kinds: of MODES.
        work: mode → least work; a mode without an entry has no fraction of a limit.
        timed: the providers to time, None for all of them.
        seconds: budget of the rounds of one kind.
        rounds: least and most.
        sets: of inputs, which calls take in turn: enough of them do not fit into a cache.
        truth: (inputs, gradient of the value) → value and gradients in float64, for the inputs as they are.
    """

    operation: str
    shape: dict[str, int]
    products: str
    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    providers: dict[str, Provider]
    kinds: tuple[str, ...] = ("forward", "training")
    work: dict[str, Work] = field(default_factory=dict)
    timed: tuple[str, ...] | None = None
    seconds: float = 4
    rounds: tuple[int, int] = (5, 51)
    sets: int = 1
    truth: Callable[[tuple[Tensor, ...], Tensor], list[Tensor]] | None = None

    @property
    def title(self) -> str:
        sizes = ", ".join(f"{name} = {size:,}" for name, size in self.shape.items())
        return f"{self.operation}, {sizes}, {self.products}"

    @property
    def family(self) -> tuple[str, str]:
        """The cases that differ in size alone."""
        return self.operation, self.products
