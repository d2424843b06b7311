"""Interleaved timing: every round calls each provider once, so that a slow minute falls on all of them alike."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle

import torch
from torch import Tensor

from bench.cases import MODES, QUICK, Case, Provider
from bench.clock import between, mark
from bench.limits import Probe
from hsv_kernels import BackendError

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the providers' values, relative to eager's


@dataclass
class Measured:
    """What the rounds of one case gave.

    Args:
        seconds: mode → provider → a value for each round, None where the provider sat out.
        rates: of the machine, for each round.
        failures: provider → status and reason, for those without seconds.
    """

    seconds: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    rates: list[dict[str, float]] = field(default_factory=list)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)


class Call:
    """A provider on its inputs, ready to be timed; each call takes the next set of them."""

    def __init__(self, case: Case, provider: Provider) -> None:
        self.results, self.around = provider.make(), provider.around
        self.sets = [case.inputs(provider.dtype) for _ in range(case.sets)]
        self.upstream: Tensor | None = None
        self._turn = cycle(self.sets)

    def function(self, *inputs: Tensor) -> Tensor:
        """The value: what the provider returns, or the first of it."""
        found = self.results(*inputs)
        return found[0] if isinstance(found, tuple) else found

    def __call__(self, kind: str) -> tuple[dict[str, float], Tensor]:
        """Seconds by mode, and the value."""
        with self.around():
            return self._timed(kind, next(self._turn))

    def _timed(self, kind: str, inputs: tuple[Tensor, ...]) -> tuple[dict[str, float], Tensor]:
        if kind == "step":
            begin = mark()
            value = self.function(*inputs)
            return {"step": between(begin, mark())}, value
        if kind == "forward":
            with torch.no_grad():
                begin = mark()
                value = self.function(*inputs)
                return {"forward": between(begin, mark())}, value
        begin = mark()
        value = self.function(*inputs)
        upstream = self.gradient_of(value)
        middle = mark()
        gradients = self.gradients(value, inputs, upstream)
        end = mark()
        del gradients
        return {"backward": between(middle, end), "both": between(begin, end)}, value

    def gradient_of(self, value: Tensor) -> Tensor:
        """What backward begins with: 1 for a loss, random numbers for anything else; the same in each call."""
        if self.upstream is None:
            self.upstream = torch.randn_like(value) if value.dim() else torch.ones_like(value)
        return self.upstream

    @staticmethod
    def gradients(value: Tensor, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        return torch.autograd.grad(value, leaves, upstream)


def measure(case: Case, kind: str, names: list[str]) -> Measured:
    """Times the named providers; the first call of each (compilation, allocation) is not counted.

    Every provider takes part in the first rounds; later one that has used its share of the case's budget sits out. One
    that raises, or whose value differs from eager's, is left out with its reason.
    """
    torch.compiler.reset()  # or the recompilation limit would stop compiling after a few shapes
    failures: dict[str, tuple[str, str]] = {}
    calls = _warm(case, kind, names, failures)
    probe = Probe(case.work[MODES[kind][-1]]) if MODES[kind][-1] in case.work else None
    return time_rounds(case, kind, calls, probe, failures)


def time_rounds(
    case: Case,
    kind: str,
    calls: dict[str, Callable[[str], tuple[dict[str, float], Tensor]]],
    probe: Callable[[], dict[str, float]] | None,
    failures: dict[str, tuple[str, str]],
) -> Measured:
    """The interleaved rounds of warm calls; those that raise go from `calls` to `failures`."""
    least, most = (2, 2) if QUICK else case.rounds
    share = case.seconds / max(1, len(calls))
    used = dict.fromkeys(calls, 0.0)

    measured = Measured(failures=failures)
    measured.seconds = {mode: {name: [] for name in calls} for mode in MODES[kind]}
    gc.collect()
    gc.disable()
    try:
        for turn in range(most):
            active = [name for name in calls if turn < least or used[name] < share]
            if not active:
                break
            measured.rates.append(probe() if probe else {})
            for name in _rotated(active, turn):
                begin = time.perf_counter()
                try:
                    seconds = calls[name](kind)[0]
                except Exception as error:
                    failures[name] = failure(error)
                    del calls[name]
                    continue
                used[name] += time.perf_counter() - begin
                for mode, value in seconds.items():
                    measured.seconds[mode][name] += [None] * (turn - len(measured.seconds[mode][name])) + [value]
    finally:
        gc.enable()
    for by_provider in measured.seconds.values():
        for name in failures:
            by_provider.pop(name, None)
        for values in by_provider.values():
            values += [None] * (len(measured.rates) - len(values))
    return measured


def _rotated(names: list[str], turn: int) -> list[str]:
    """Every round begins with another provider."""
    first = turn % max(1, len(names))
    return names[first:] + names[:first]


def _warm(case: Case, kind: str, names: list[str], failures: dict[str, tuple[str, str]]) -> dict[str, Call]:
    calls, values = {}, {}
    for name in names:
        try:
            call = Call(case, case.providers[name])
            values[name] = call(kind)[1].detach().float()
            calls[name] = call
        except Exception as error:
            failures[name] = failure(error)
    if "eager" in values:
        for name, value in values.items():
            if not case.providers[name].compared:
                continue
            difference = ((value - values["eager"]).abs().max() / values["eager"].abs().max()).item()
            if not difference <= TOLERANCE[case.products]:
                failures[name] = ("failed", f"another value than eager's: relative difference {difference:.1e}")
                del calls[name]
    return calls


def failure(error: Exception) -> tuple[str, str]:
    """Status and reason of a row."""
    if isinstance(error, ImportError):
        return "not installed", sentence(error)
    if isinstance(error, BackendError):
        return "not served", sentence(error)
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else "failed", sentence(error)


def sentence(error: Exception) -> str:
    """Type and first line of a message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
