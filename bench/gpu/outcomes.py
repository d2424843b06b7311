"""A plugin of pytest that writes each test's outcome as it comes, and leaves out what has passed before.

HSV_OUTCOMES names the file of lines, HSV_PASSED one with the names of tests that need not run again.
"""

import json
import os
from pathlib import Path

import pytest


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
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "reason": reason}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _expect(self, number: int) -> None:
        if number:
            self.path.with_suffix(".expected").write_text(str(number))


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # xdist's workers report to the process that started them
        config.pluginmanager.register(Outcomes(Path(os.environ["HSV_OUTCOMES"])))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    passed = set(Path(os.environ["HSV_PASSED"]).read_text().splitlines())
    left_out = [item for item in items if item.nodeid in passed]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in passed]
