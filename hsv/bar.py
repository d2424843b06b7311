"""Progress bars: in a terminal one that moves, elsewhere a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

__all__ = ["progress_bar"]

LINE_SECONDS = 30.0  # between two lines, and before the first


def progress_bar(**options: Any) -> tqdm:
    """tqdm's bar of these options on stderr, or lines where that is no terminal: none in the first half minute."""
    if sys.stderr.isatty():
        return tqdm(**options)
    # tqdm looks itself every `maxinterval` seconds, and prints where nothing has moved.
    every = {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS, "delay": LINE_SECONDS}
    return _Lines(**options | every | {"leave": False})


class _Lines(tqdm):
    """A line for each state; none is taken back."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:
            print(self, file=self.fp, flush=True)
        return False
