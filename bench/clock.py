"""Points of time on the CPU or on the GPU's stream."""

import time

import torch

from bench.cases import DEVICE

Mark = float | torch.cuda.Event


def mark() -> Mark:
    """Now: the host's clock, or an event of the device's stream."""
    if DEVICE == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(begin: Mark, end: Mark) -> float:
    """Seconds; waits for the device."""
    if DEVICE == "cpu":
        return end - begin
    end.synchronize()
    return 1e-3 * begin.elapsed_time(end)
