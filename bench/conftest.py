"""Runs each case once, all providers in turn, and gives every provider a test of its own that records its row."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench import memory, results
from bench.cases import MODES, QUICK, THREADS, Case
from bench.tables import describe, table
from bench.timing import Measured, measure

KIND = {mode: kind for kind, modes in MODES.items() for mode in modes}


class Replay:
    """A clock that only recorded times move: pytest-benchmark reads from it the seconds of the interleaved rounds."""

    now = 0.0

    @classmethod
    def read(cls) -> float:
        return cls.now

    @classmethod
    def pass_by(cls, seconds: list[float]) -> None:
        cls.now += seconds.pop(0)


class Session:
    """What the run has measured so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.rows: list[results.Row] = []
        self.origin = results.origin()
        self._reporter = config.pluginmanager.get_plugin("terminalreporter")
        self._capture = config.pluginmanager.get_plugin("capturemanager")
        self._rows_file, self._memory_file = config.getoption("rows"), config.getoption("memory")
        self._peaks = (
            json.loads(self._memory_file.read_text()) if self._memory_file and self._memory_file.exists() else {}
        )
        self._timed: dict[tuple[str, str], Measured] = {}

    def row(self, module: ModuleType, case: Case, mode: str, provider: str) -> tuple[results.Row, list[float]]:
        """The row and, where the provider could be timed, its seconds."""
        measured = self._measured(module, case, KIND[mode])
        peak = self._peak(module, case, KIND[mode], provider)
        extra = {"extra_bytes": peak.get("bytes"), "extra_predicted": peak.get("predicted", False)}
        row = results.timing_row(case, mode, provider, measured) | extra | self.origin
        self.rows.append(row)
        if self._rows_file:
            results.append(self._rows_file, row)
        return row, [s for s in measured.seconds.get(mode, {}).get(provider, []) if s is not None]

    def _say(self, line: str) -> None:
        """Shows progress while the test runs."""
        with self._capture.global_and_fixture_disabled():
            self._reporter.write_line(line)

    def _measured(self, module: ModuleType, case: Case, kind: str) -> Measured:
        key = (case.title, kind)
        if key not in self._timed:
            ready, left_out = self._choose(module, case, kind)
            self._say(f"\n{case.title}, {' and '.join(MODES[kind])}: {', '.join(ready)}")
            self._timed[key] = measured = measure(case, kind, ready)
            measured.failures |= left_out
        return self._timed[key]

    def _choose(self, module: ModuleType, case: Case, kind: str) -> tuple[list[str], dict[str, tuple[str, str]]]:
        """The providers to time; the others with status and reason."""
        ready, left_out = [], {}
        for name in case.providers:
            peak = self._peak(module, case, kind, name)
            if peak.get("status") == "out of memory":
                left_out[name] = ("out of memory", peak["reason"])
            elif case.timed is not None and name not in case.timed:
                left_out[name] = ("not timed", "one call takes too long at this size")
            else:
                ready.append(name)
        return ready, left_out

    def _peak(self, module: ModuleType, case: Case, kind: str, provider: str) -> dict:
        """What bench.memory says of a provider; the providers of a module are measured together, at first."""
        if module.__name__ not in self._peaks:
            self._say(f"\n{module.__name__}: extra memory, a process for each provider")
            self._peaks[module.__name__] = peaks = memory.measure_all(module.__name__, module.CASES)
            for name in (name for name, found in peaks.items() if not found):
                self._say(f"{name}: not installed, or the process that measures its memory failed")
            if self._memory_file:
                self._memory_file.write_text(json.dumps(self._peaks))
        found = self._peaks[module.__name__].get(" ".join((*case.family, provider)), {})
        return found.get(case.title, {}).get(kind, {})


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("hsv")
    group.addoption("--rows", type=Path, help="append each row to this file, as a line of JSON")
    group.addoption("--memory", type=Path, help="read extra memory from this file, or write it there")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cells = [
        pytest.param(case, mode, provider, id=f"{case.title}, {mode}: {provider}")
        for case in metafunc.module.CASES
        for kind in case.kinds
        for mode in MODES[kind]
        for provider in case.providers
    ]
    metafunc.parametrize(("case", "mode", "provider"), cells)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case, mode = item.callspec.params["case"], item.callspec.params["mode"]
        if isinstance(case, Case):  # a module without cases in this setting has an empty one
            item.add_marker(pytest.mark.benchmark(group=f"{case.title}, {mode}", timer=Replay.read))


@pytest.fixture
def record(request: pytest.FixtureRequest, benchmark: Callable) -> Callable[[Case, str, str], None]:
    """Records the row of a provider; skips one that could not be timed, unless it is hsv.

    hsv must not be slower than eager.
    """
    torch.set_num_threads(THREADS)
    session = request.config.stash.setdefault(SESSION, None) or Session(request.config)
    request.config.stash[SESSION] = session

    def run(case: Case, mode: str, provider: str) -> None:
        row, seconds = session.row(request.module, case, mode, provider)
        if row["status"] != "ok":
            (pytest.fail if provider == "hsv" else pytest.skip)(f"{row['status']}: {row['reason']}")
        benchmark.extra_info |= row
        benchmark.pedantic(Replay.pass_by, args=(list(seconds),), rounds=len(seconds))
        if provider == "hsv" and not QUICK and row["times_eager"]:
            assert row["times_eager"] <= 1, f"slower than eager: {row['times_eager']:.2f} ×"

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if session := config.stash.get(SESSION, None):
        terminalreporter.section("benchmarks")
        terminalreporter.write_line(describe(session.rows[0]))
        for line in table(session.rows):
            terminalreporter.write_line(line)
