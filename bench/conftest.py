"""Prints the tables of a benchmark run at its end: pytest bench."""

from collections.abc import Callable

import pytest

from bench.common import provenance, table

_ROWS = pytest.StashKey[list]()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[dict[str, object]], None]:
    """Adds a row to the table that is printed when the run ends."""
    return request.config.stash.setdefault(_ROWS, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := config.stash.get(_ROWS, None):
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(provenance())
        by_keys: dict[tuple[str, ...], list] = {}
        for row in rows:
            by_keys.setdefault(tuple(row), []).append(row)
        for group in by_keys.values():
            terminalreporter.write_line(table(group))
