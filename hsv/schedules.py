"""Schedules, each a function of the step and never of the clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Progress", "capped"]


def capped(epochs: float, steps: int, epoch: int) -> int:
    """Steps of `epochs` passes of `epoch` steps each, at most a tenth of the run's `steps`."""
    return min(round(epochs * epoch), steps // 10)


@dataclass(frozen=True)
class Progress:
    """Where a run is: `step` of `steps` (from 0), with `epoch` steps in a pass over the data."""

    step: int
    steps: int
    epoch: int

    def ramp(self, epochs: float) -> float:
        """0 at the first step, rising linearly to 1 after so many epochs, which are at most a tenth of the run."""
        length = capped(epochs, self.steps, self.epoch)
        return min(1.0, self.step / length) if length else 1.0

    def within(self, epochs: float) -> bool:
        """Whether the first `epochs`, at most a tenth of the run, are not over."""
        return self.step < capped(epochs, self.steps, self.epoch)

    def cosine(self, start: float, end: float) -> float:
        """From `start` at the first step to `end` after the last, along half a cosine."""
        return end - (end - start) * (1 + math.cos(math.pi * self.step / self.steps)) / 2
