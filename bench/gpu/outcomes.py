"""A plugin of pytest that writes each test's outcome as it comes, and leaves out what need not run again.

HSV_OUTCOMES names the file of lines, HSV_LEFT_OUT one with the names of tests that need not run. A test after which the
device answers no more has failed, whatever it said itself, and ends its process: nothing else runs in that one.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from bench.gpu.child import DEVICE_LOST


class Outcomes:
    """Lines {"test", "outcome", "seconds", "reason"}, and beside them the number of tests that were to run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._expect(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: object, ids: list[str]) -> None:
        self._expect(len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")[-2000:]
        write(self.path, report.nodeid, report.outcome, report.duration, reason)

    def _expect(self, number: int) -> None:
        if number:
            self.path.with_suffix(".expected").write_text(str(number))


def write(path: Path, test: str, outcome: str, seconds: float, reason: str) -> None:
    line = {"test": test, "outcome": outcome, "seconds": seconds, "reason": reason}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
        config.pluginmanager.register(Outcomes(Path(os.environ["HSV_OUTCOMES"])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = set(Path(os.environ["HSV_LEFT_OUT"]).read_text().splitlines())
    left_out = [item for item in items if item.nodeid in names]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in names]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Before fixtures use the device again. Ends a worker of xdist too, which then starts another."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        reason = f"the device answered no more: {error}"[:2000]
        write(Path(os.environ["HSV_OUTCOMES"]), item.nodeid, "failed", 0.0, reason)
        os._exit(DEVICE_LOST)
