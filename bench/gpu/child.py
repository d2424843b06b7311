"""Processes with a deadline: what is not over by then is ended, with everything that it started."""

import os
import signal
import subprocess
import time
from dataclasses import dataclass, field

from bench.paths import ROOT

PART_SECONDS = 525.0  # of one part, what it starts and ends included: under nine minutes
DEVICE_LOST = 76  # exit code of a process whose device answers no more
RESERVE = 35.0  # before the end: nothing new is begun, what has begun may finish


@dataclass
class Deadline:
    """When a part must be over, counted from now."""

    seconds: float = PART_SECONDS
    begin: float = field(default_factory=time.time)

    @property
    def end(self) -> float:
        return self.begin + self.seconds

    @property
    def last_begin(self) -> float:
        """The last moment at which something may begin; seconds since 1970."""
        return self.end - min(RESERVE, self.seconds / 4)

    def left(self) -> float:
        return max(0.0, self.end - time.time())


def run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> int | None:
    """Exit code of a command in the repository's root, negative for a signal; None if it was ended for its time."""
    child = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
