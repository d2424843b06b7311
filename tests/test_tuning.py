"""Tuning with a clock that is told what each candidate takes: what is timed, chosen, kept and read again."""

import json
import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from hsv_kernels.backends import interpreting, triton_problem

if triton_problem() or interpreting():
    pytest.skip(triton_problem() or "the interpreter's functions have no source to hash", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from hsv_kernels.ops import tuning


class Tile(NamedTuple):
    rows: int
    warps: int


TABLE, WIDE, HIGH = CANDIDATES = (Tile(64, 4), Tile(128, 8), Tile(256, 8))
KEY = ("NVIDIA H200", torch.bfloat16, 128, 8192)


@triton.jit
def copy_kernel(p_x, p_y):
    tl.store(p_y, tl.load(p_x))


@triton.jit
def square_kernel(p_x, p_y):
    b_x = tl.load(p_x)
    tl.store(p_y, b_x * b_x)


class Machine:
    """A device of which every launch with a candidate takes a known time."""

    def __init__(self, times: dict[Tile, float | Exception]) -> None:
        self.times = times
        self.launched: list[Tile] = []
        self.now = 0.0

    def run(self, tile: Tile) -> None:
        if isinstance(self.times[tile], Exception):
            raise self.times[tile]
        self.launched.append(tile)
        self.now += self.times[tile]

    def clock(self, call: Callable[[], object]) -> float:
        begin = self.now
        call()
        return self.now - begin

    def choose(
        self, kernel: triton.JITFunction = copy_kernel, key: tuple = KEY, candidates: tuple[Tile, ...] = CANDIDATES
    ) -> Tile:
        return tuning.choose(kernel, key, candidates, self.run, clock=self.clock)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HSV_TUNE", "1")
    monkeypatch.setenv("HSV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # raises without a driver
    forget()
    return tmp_path / "cache"


def forget() -> None:
    """As a new process begins."""
    tuning._chosen.clear()
    tuning._warn_once.cache_clear()


def test_the_fastest_is_timed_once_and_found_again_on_disk(folder: Path) -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    assert machine.choose() == WIDE
    assert machine.launched == [TABLE, WIDE, HIGH]
    assert machine.choose() == WIDE
    forget()
    assert machine.choose() == WIDE
    assert machine.launched == [TABLE, WIDE, HIGH]
    (entry,) = json.loads((folder / "tuning.json").read_text()).items()
    assert entry[1] == list(WIDE)
    assert all(part in entry[0] for part in ("copy_kernel", triton.__version__, "NVIDIA H200", "bfloat16", "128 8192"))


@pytest.mark.parametrize("value", [None, "0", ""])
def test_without_the_variable_the_table_is_used_and_nothing_read(
    value: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    (folder / "tuning.json").write_text("not read, or there would be a warning")
    monkeypatch.setenv("HSV_TUNE", value) if value is not None else monkeypatch.delenv("HSV_TUNE")
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    assert machine.choose() == TABLE
    assert machine.launched == []


def test_a_key_a_kernel_and_a_version_have_choices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    assert machine.choose() == WIDE
    machine.times = {TABLE: 1.0, WIDE: 3.0, HIGH: 3.0}
    assert machine.choose(key=(*KEY[:3], 16384)) == TABLE
    assert machine.choose(kernel=square_kernel) == TABLE
    monkeypatch.setattr(triton, "__version__", "0.0")
    assert machine.choose() == TABLE


def test_another_source_of_the_same_name_is_timed_anew() -> None:
    @triton.jit
    def copy_kernel_again(p_x, p_y):
        tl.store(p_y, tl.load(p_x) + 0)

    copy_kernel_again.__name__ = copy_kernel.__name__
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    machine.choose()
    forget()
    machine.times = {TABLE: 1.0, WIDE: 3.0, HIGH: 3.0}
    assert machine.choose(kernel=copy_kernel_again) == TABLE


def test_a_difference_within_the_measurement_leaves_the_table() -> None:
    assert Machine({TABLE: 1.0, WIDE: 0.99, HIGH: 2.0}).choose() == TABLE


def test_a_candidate_too_large_for_the_device_is_passed_over() -> None:
    too_large = OutOfResources(300_000, 232_448, "shared memory")
    assert Machine({TABLE: too_large, WIDE: 2.0, HIGH: 3.0}).choose() == WIDE
    assert Machine({TABLE: 3.0, WIDE: torch.OutOfMemoryError(), HIGH: 2.0}).choose(key=("other",)) == HIGH


def test_where_none_fits_the_first_says_so_itself(folder: Path) -> None:
    too_large = OutOfResources(300_000, 232_448, "shared memory")
    assert Machine(dict.fromkeys(CANDIDATES, too_large)).choose() == TABLE


def test_any_other_failure_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        Machine({TABLE: 3.0, WIDE: ZeroDivisionError(), HIGH: 2.0}).choose()


def test_nothing_is_timed_while_a_stream_is_captured(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert machine.choose() == TABLE
    assert machine.launched == []
    assert not folder.exists()
    capturing = False
    assert machine.choose() == WIDE
    capturing = True
    assert machine.choose() == WIDE, "what was timed before holds in a graph too"


def test_nothing_is_timed_under_torch_compile() -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})

    @torch.compile(backend="eager", fullgraph=True)
    def rows(x: torch.Tensor) -> torch.Tensor:
        return x * tuning.choose(copy_kernel, KEY, CANDIDATES, machine.run, clock=machine.clock).rows

    assert rows(torch.ones(())) == TABLE.rows
    assert machine.launched == []


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_corrupt_file_is_ignored_with_one_warning_and_replaced(text: str, folder: Path) -> None:
    folder.mkdir()
    (folder / "tuning.json").write_bytes(text.encode(errors="surrogateescape"))
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    with pytest.warns(UserWarning, match=r"tuning\.json is ignored") as warned:
        assert machine.choose() == WIDE
    assert len(warned) == 1
    assert list(json.loads((folder / "tuning.json").read_text()).values()) == [list(WIDE)]


@pytest.mark.parametrize("kept", [[1, 2], 7, None, {}])
def test_what_is_kept_and_no_candidate_is_timed_anew(kept: object, folder: Path) -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    machine.choose()
    (entry,) = json.loads((folder / "tuning.json").read_text())
    (folder / "tuning.json").write_text(json.dumps({entry: kept}))
    forget()
    assert machine.choose() == WIDE
    assert len(machine.launched) == 2 * len(CANDIDATES)


def test_a_folder_that_cannot_be_written_costs_a_warning(folder: Path) -> None:
    folder.write_text("a file where the folder would be")
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    with pytest.warns(UserWarning, match="not kept"):
        assert machine.choose() == WIDE
    assert machine.choose() == WIDE
    assert len(machine.launched) == len(CANDIDATES)


def test_the_folder_follows_the_desktop_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HSV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuning.cache_file() == Path("/somewhere/hsv/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_file() == Path("~/.cache/hsv/tuning.json").expanduser()


def keep_some(process: int) -> None:
    for i in range(20):
        tuning.keep(f"{process} {i}", WIDE)


def test_processes_that_write_at_once_lose_nothing(folder: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        pool.map(keep_some, range(4))
    assert len(json.loads((folder / "tuning.json").read_text())) == 80
    assert {path.name for path in folder.iterdir()} == {"tuning.json", "tuning.lock"}


def test_threads_that_ask_at_once_time_once() -> None:
    machine = Machine({TABLE: 3.0, WIDE: 1.0, HIGH: 2.0})
    threads = [threading.Thread(target=machine.choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine.launched == list(CANDIDATES)


def test_sizes_of_one_class() -> None:
    assert [tuning.size_class(m) for m in (1, 2, 3, 4096, 4097, 8192)] == [1, 2, 4, 4096, 8192, 8192]
