"""SIGINT and SIGTERM as a wish that the training loop grants at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
from accelerate import Accelerator

__all__ = ["StopSignals"]


class StopSignals:
    """Within this context the first signal is noted in `number`, and a second Ctrl-C interrupts at once.

    Signals reach the main thread alone; elsewhere the context does nothing.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number

    def agreed(self, accelerator: Accelerator, ask: bool) -> bool:
        """Whether to stop: at once in one process; with several ranks when all `ask`, if any has a signal."""
        if accelerator.num_processes == 1:
            return self.number is not None
        if not ask:
            return False
        mine = torch.tensor([float(self.number is not None)], device=accelerator.device)
        return bool(accelerator.reduce(mine, "sum").item() > 0)
