"""The logic of `make gpu` without a GPU: rows that outlast processes, deadlines, checks, limits and the page."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bench_distillation as distillation
from bench import limits, page, results
from bench.cases import Case, Provider
from bench.gpu import build, cases, measure, parts, truth
from bench.gpu import page as gpu_page
from bench.gpu.child import DEVICE_LOST, Deadline, run
from bench.gpu.store import Store, key, whole_lines
from bench.gpu.suite import run_tests
from bench.gpu.targets import TARGETS, Target, slower_than_compiled, verdict
from bench.paths import ROOT
from bench.providers import TEMPERATURE, eager_nt_xent, eager_queue
from bench.timing import Call
from hsv_kernels import distillation_loss, masked_mse, random_masking, restore_tokens, sinkhorn_centre

H200 = {"bfloat16": 790e12, "tf32": 400e12, "float32": 50e12, "exponentials": 3.7e12, "copy": 4.3e12}
ORIGIN = {
    "device": "NVIDIA H200",
    "cpu": "A CPU",
    "isa": "avx2",
    "threads": 2,
    "versions": {"torch": "2.11", "triton": "3.6"},
    "system": "Linux",
    "commit": "abc1234",
    "code": "0123456789ab",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "memory_bytes": 139 << 30,
    "transparent_huge_pages": "madvise",
    "huge_pages_for_all": False,
}


def row(provider: str, seconds: float, *, m: int = 32768, mode: str = "both", **fields: object) -> results.Row:
    """A row of NT-Xent at D = 128, hsv taking 1 ms."""
    return {
        "operation": "nt_xent",
        "shape": {"M": m, "D": 128},
        "products": "bfloat16",
        "mode": mode,
        "provider": provider,
        "note": "",
        "status": "ok",
        "reason": "",
        "median_s": seconds,
        "times_hsv": seconds / 1e-3,
        "limit": "arithmetic",
        "fraction": 0.7e-3 / seconds,
        "fraction_products": 0.7e-3 / seconds,
        "extra_bytes": 16 << 20,
        "extra_predicted": False,
        **ORIGIN,
        **fields,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "rows.jsonl", ORIGIN)


def test_rows_are_whole_lines_on_the_disk(store: Store) -> None:
    store.append(row("hsv", 1e-3))
    with store.path.open("a") as file:
        file.write('{"operation": "cut o')
    assert [r["provider"] for r in whole_lines(store.path)] == ["hsv"]
    Store(store.path, ORIGIN).append(row("eager", 8e-3))
    assert [json.loads(line)["provider"] for line in store.path.read_text().splitlines()] == ["hsv", "eager"]


@pytest.mark.parametrize(
    "other", [{"code": "x"}, {"device": "Another"}, {"versions": {"torch": "2.12", "triton": "3.6"}}]
)
def test_rows_of_other_code_devices_or_versions_are_measured_again(store: Store, other: dict) -> None:
    store.append(row("hsv", 1e-3))
    assert Store(store.path, ORIGIN).rows.keys() == {key(row("hsv", 2e-3))}
    assert not Store(store.path, ORIGIN | other).rows


def test_rows_count_as_measured_in_committed_results_too(tmp_path: Path) -> None:
    path = results.write([row("hsv", 1e-3)], tmp_path)
    assert path == tmp_path / "nvidia-h200" / "2026-01-02-abc1234.json"
    assert Store(tmp_path / "elsewhere.jsonl", ORIGIN, [path.parent]).rows


def test_a_process_ends_by_its_deadline_with_all_that_it_started(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    begin = time.monotonic()
    assert run(["sh", "-c", f"(while sleep 0.1; do echo . >> {beat}; done) & sleep 60"], 1.0) is None
    assert time.monotonic() - begin < 20
    size = beat.stat().st_size
    time.sleep(0.5)
    assert beat.stat().st_size == size > 0
    assert run(["sh", "-c", "exit 7"], 20) == 7
    assert run(["sh", "-c", "kill -9 $$"], 20) == -9


def test_what_ends_the_command_ends_what_it_started(tmp_path: Path) -> None:
    beat = tmp_path / "beat"
    script = (
        "import sys\n"
        "from bench.gpu import child, command\n"
        "command.torch.cuda.is_available = lambda: False\n"
        f"loop = ['sh', '-c', 'while sleep 0.1; do echo . >> {beat}; done']\n"
        "command.rehearse = lambda parts, seconds: child.run(loop, 100)\n"
        "sys.exit(command.main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as command:
        while command.poll() is None and not beat.exists():
            time.sleep(0.1)
        command.terminate()
    assert command.returncode == 128 + signal.SIGTERM
    size = beat.stat().st_size
    time.sleep(0.5)
    assert beat.stat().st_size == size > 0


def test_nothing_begins_shortly_before_the_end() -> None:
    deadline = Deadline(500, begin=1000)
    assert deadline.end == 1500 and 1400 < deadline.last_begin < 1500
    assert Deadline(500, begin=0).left() == 0
    assert parts.__doc__ and Deadline().seconds < 9 * 60


def exact(inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    return [inputs[0].double().square().sum().detach(), 2 * inputs[0].detach().double()]


class Made:
    """Counts how often providers are made."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Callable[[Tensor], Tensor]:
        self.times += 1
        return lambda x: x.square().sum()


def nan_gradient(x: Tensor) -> Tensor:
    return x.square().sum() + 0 * (x - x.detach()).sqrt().sum()


@pytest.fixture
def case() -> Case:
    return Case(
        operation="square",
        shape={"M": 3},
        products="float32",
        inputs=lambda dtype: (torch.arange(1.0, 4.0, dtype=dtype).requires_grad_(),),
        providers={
            "hsv": Provider(Made()),
            "eager": Provider(Made()),
            "wrong gradient": Provider(lambda: lambda x: 2 * x.square().sum() - x.detach().square().sum()),
            "NaN": Provider(lambda: nan_gradient),
        },
        rounds=(2, 2),
        truth=exact,
    )


def test_what_is_wrong_is_never_timed_and_what_is_measured_not_measured_again(case: Case, store: Store) -> None:
    for _ in range(2):
        measure.measure_case(case, store, {}, list(case.kinds), list(case.providers))
    assert [case.providers[name].make.times for name in ("hsv", "eager")] == [1, 1]
    assert len(whole_lines(store.path)) == 4 * 3
    found = {r["provider"]: r for r in store.rows.values() if r["mode"] == "both"}
    assert found["hsv"]["status"] == found["eager"]["status"] == "ok"
    assert found["hsv"]["value_error"] < 1e-6 and found["hsv"]["gradient_error"] < 1e-6
    for name in ("wrong gradient", "NaN"):
        assert found[name]["status"] == "failed" and "relative errors" in found[name]["reason"]


def test_a_provider_that_breaks_the_device_is_left_out_of_the_next_process(
    case: Case, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(provider: str, reason: str) -> None:
        raise measure.DeviceLost(provider, reason)

    monkeypatch.setattr(measure, "recover", lost)
    names = ["wrong gradient", "hsv"]
    with pytest.raises(measure.DeviceLost):
        measure.measure_case(case, store, {}, list(case.kinds), names)
    assert {r["provider"] for r in store.rows.values()} == {"wrong gradient"}
    assert all("relative errors" in r["reason"] and "answered no more" in r["reason"] for r in store.rows.values())
    measure.measure_case(case, store, {}, list(case.kinds), names)
    assert {r["status"] for r in store.rows.values() if r["provider"] == "hsv"} == {"ok"}


def test_out_of_memory_is_a_row(case: Case, store: Store) -> None:
    def exhausted() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\nmore")

    case.providers["eager"] = Provider(exhausted)
    measure.measure_case(case, store, {}, ["forward"], ["hsv", "eager"])
    statuses = {r["provider"]: r["status"] for r in store.rows.values()}
    assert statuses == {"hsv": "ok", "eager": "out of memory"}


def test_what_a_failed_provider_held_is_free_before_the_next(
    case: Case, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With CUDA's part stood in for."""
    held: list[weakref.ref] = []
    alive: list[bool] = []

    def exhausted(x: Tensor) -> Tensor:
        matrix = torch.zeros(64, 64)
        held.append(weakref.ref(matrix))
        raise torch.OutOfMemoryError("CUDA out of memory")

    case.providers["eager"] = Provider(lambda: exhausted)
    monkeypatch.setattr(measure, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(held[-1]() is not None))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    measure.measure_case(case, store, {}, ["forward"], ["eager", "hsv"])
    assert alive == [False]
    found = {r["provider"]: (r["status"], r["extra_bytes"]) for r in store.rows.values()}
    assert found == {"eager": ("out of memory", None), "hsv": ("ok", 250)}


def test_a_crash_is_blamed_on_its_case_and_the_part_goes_on(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = [-11, DEVICE_LOST, measure.OUT_OF_TIME]
    begun = tmp_path / "begun.json"

    def crash_at_first(command: list[str], seconds: float, environment: dict) -> int:
        if codes[0] == -11:
            begun.write_text(json.dumps({"title": case.title, "time": time.time()}))
        return codes.pop(0)

    later = Case("later", {"M": 1}, "float32", case.inputs, case.providers)
    monkeypatch.setattr(parts, "run", crash_at_first)
    monkeypatch.setattr(parts, "PARTS", {"contrast": lambda full: [case, later]})
    found = parts.measure_part("contrast", tmp_path, ORIGIN, Deadline(500), False)
    assert not codes and not begun.exists()
    assert {r["reason"] for r in found.rows.values()} == {"the process ended with -11 after 0 s"}
    assert list(parts.unmeasured("contrast", found, False)) == ["later, M = 1, float32: forward, training"]
    assert len(list(parts.without_times("contrast", found, False))) == 3


@pytest.mark.parametrize(("seconds", "rows"), [(10, 0), (400, 12)])
def test_only_a_long_case_is_blamed_for_the_deadline(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: int, rows: int
) -> None:
    def ended(command: list[str], left: float, environment: dict) -> None:
        (tmp_path / "begun.json").write_text(json.dumps({"title": case.title, "time": time.time() - seconds}))

    monkeypatch.setattr(parts, "run", ended)
    monkeypatch.setattr(parts, "PARTS", {"contrast": lambda full: [case]})
    assert len(parts.measure_part("contrast", tmp_path, ORIGIN, Deadline(500), False).rows) == rows


def test_graphs_hold_every_set_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CUDA's part stood in for: what is captured, and how one call's time comes out of a replay."""

    class Stand:
        def wait_stream(self, other: object) -> None: ...

        def replay(self) -> None:
            time.sleep(0.08)

    @contextmanager
    def entered(*_: object, **__: object) -> Iterator[None]:
        yield

    for name, value in {"Stream": Stand, "CUDAGraph": Stand, "stream": entered, "graph": entered}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stand)
    seen: list[int] = []

    def function(x: Tensor) -> Tensor:
        seen.append(id(x))
        return x.square().sum()

    one = Case(
        "square", {"M": 3}, "float32", lambda dtype: (torch.ones(3, requires_grad=True),), {}, sets=3, rounds=(1, 1)
    )
    call = Call(one, Provider(lambda: function))
    replays = measure.Replays(call)
    assert replays.calls == 9 and [seen.count(id(inputs[0])) for inputs in call.sets] == [8, 8, 8]
    seconds, _ = replays("graph")
    assert seconds.keys() == {"forward, graph", "both, graph"}
    assert all(0.008 < value < 0.03 for value in seconds.values())


def test_the_limits_are_those_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds on an H200."""
    monkeypatch.setattr(limits, "DEVICE", "cuda")
    for found, mode, milliseconds in (
        (cases.nt_xent_case("bfloat16", 128, 8192), "both", 0.054),
        (cases.nt_xent_case("bfloat16", 128, 131072), "both", 13.9),
        (cases.nt_xent_case("bfloat16", 256, 32768), "both", 1.74),
        (cases.nt_xent_case("bfloat16", 64, 65536), "forward", 0.58),  # by its exponentials
        (cases.queue_case(4096, 65536), "both", 0.174),
        (cases.masking_case(4096), "forward", 0.143),
        (cases.reconstruction_case(4096), "backward", 0.93),
    ):
        least = limits.least_seconds(found.work[mode], found.products, H200)
        assert 1e3 * least == pytest.approx(milliseconds, rel=0.02), found.title


def test_both_ways_of_the_gradient_are_timed_and_the_choice_comes_back() -> None:
    matmul = pytest.importorskip("hsv_kernels.ops.contrast.triton_square_matmul")
    seen, usual = {}, matmul.LARGEST_TILED_DIM
    found = cases.crossing_case(512, 64)
    for name, provider in found.providers.items():
        with provider.around():
            seen[name] = matmul.LARGEST_TILED_DIM >= 512
    assert seen == {"hsv": usual >= 512, "hsv, tiles": True, "hsv, matrix product": False}
    assert usual == matmul.LARGEST_TILED_DIM


def test_memory_bound_inputs_exceed_the_cache() -> None:
    for batch in (256, 4096):
        for found in (cases.masking_case(batch), cases.restore_case(batch), cases.reconstruction_case(batch)):
            assert found.sets * found.work["forward"].bytes >= 4 * cases.L2_BYTES or found.sets == 8, found.title


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-9, atol=1e-12)


def differentiated(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor) -> list[Tensor]:
    given = [x.detach().double() if x.is_floating_point() else x for x in inputs]
    given = [x.requires_grad_(y.requires_grad) for x, y in zip(given, inputs, strict=True)]
    value = function(*given)
    leaves = [x for x in given if x.requires_grad]
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream.double())]


def test_truth_in_chunks_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(truth, "CHUNK", 100)
    monkeypatch.setattr(truth, "SAMPLES", 2)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).requires_grad_(grad)

    two = torch.tensor(2.0)
    views = normal(17, 5), normal(17, 5)
    close(truth.nt_xent(views, two), differentiated(eager_nt_xent, views, two))
    rows = F.normalize(normal(9, 5, grad=False)).requires_grad_(), normal(9, 5, grad=False), normal(33, 5, grad=False)
    close(truth.queue(rows, two), differentiated(eager_queue, rows, two))
    assert TEMPERATURE == 0.1

    pred, images = normal(3, 196, 768), torch.randn(3, 3, 224, 224, generator=generator)
    _, restore, mask = random_masking(3, 196, num_keep=49, seed=5)
    formula = lambda *x: masked_mse(*x, 16, backend="reference")  # noqa: E731
    close(truth.masked_mse((pred, images, mask), two), differentiated(formula, (pred, images, mask), two))
    tokens = normal(3, 49, 8), restore, normal(8)
    upstream = torch.randn(3, 196, 8, generator=generator).bfloat16()
    formula = lambda *x: restore_tokens(*x, backend="reference")  # noqa: E731
    close(truth.restore_tokens(tokens, upstream), differentiated(formula, tokens, upstream))
    crops = distillation.inputs(3, 11, torch.bfloat16)
    formula = lambda *x: distillation_loss(x[2], x[1], centre=x[0], backend="reference")[0]  # noqa: E731
    close(truth.distillation_loss(crops, two), differentiated(formula, crops, two))


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5)], ids=["samples", "views of samples"])
def test_eager_sinkhorn_is_the_centre(shape: tuple[int, ...]) -> None:
    (logits,) = distillation.sinkhorn_inputs(*shape, dtype=torch.float32)
    centre = sinkhorn_centre(logits, distillation.EPSILON, backend="reference")
    torch.testing.assert_close(distillation.eager_sinkhorn(logits), centre)


def test_patches_are_compared_with_the_first_draw() -> None:
    found = cases.masking_case(2)
    call = Call(found, Provider(lambda: cases.on("reference", found_hsv()), torch.bfloat16))
    assert measure.compare(found, call) == {"value_error": 0, "gradient_error": 0}


def found_hsv() -> Callable[[Tensor], Tensor]:
    return cases.masking.hsv(cases.masking.hsv_patches)()


def test_targets_are_met_missed_or_not_measured() -> None:
    rows = [
        row("hsv", 1e-3),
        row("eager", 7e-3),
        row("torch.compile", 4e-3),
        row("eager", 1, m=131072, status="out of memory"),
        row("hsv", 0.2e-3, m=8192, mode="both, graph"),
        row("hsv", 2, m=1 << 20, extra_bytes=2 << 30),
    ]
    said = {(t.shape.get("M"), t.mode, t.measure, t.against): verdict(t, rows) for t in TARGETS}
    assert said[32768, "both", "fraction", "hsv"] == "70%, met"
    assert said[32768, "both", "times", "eager"] == "**7.0 ×, missed**"
    assert said[32768, "both", "times", "torch.compile"] == "4.0 ×, met"
    assert said[131072, "both", "times", "eager"] == "eager: out of memory"
    assert said[131072, "both", "fraction", "hsv"] == "not measured"
    assert said[8192, "both, graph", "seconds", "hsv"] == "**0.2 ms, missed**"
    assert said[1 << 20, "both", "gib", "hsv"] == "2.00 GiB, met"
    assert Target("nt_xent", {"M": 8}, "both", "gib", 3).wanted == "≤ 3 GiB more memory"
    assert [r["mode"] for r in slower_than_compiled([row("torch.compile", 0.9e-3), rows[2]])] == ["both"]


def test_page_shows_a_gpu_and_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_page, "RESULTS", tmp_path)
    (tmp_path / "nvidia-h200").mkdir()
    for test, outcome, code in (
        ("a", "failed", "old"),
        ("a", "failed", "new"),
        ("b", "failed", "new"),
        ("a", "passed", "new"),
    ):
        line = {"test": test, "outcome": outcome, "code": code, "commit": "abc1234"}
        results.append(tmp_path / "nvidia-h200" / "tests.jsonl", line)
    rates = row("device", 1, operation=measure.RATES, shape={}, products="", mode="", rates=H200)
    timed = [row("hsv", 1e-3), row("eager", 9e-3), row("torch.compile", 0.5e-3), row("hsv", 2e-3, m=8192)]
    text = page.render([("nvidia-h200", [rates, *timed], "A note.")], tmp_path)
    assert "bf16 products 790 TFLOP/s" in text and "copying, read plus written 4.3 TB/s" in text
    line = next(s for s in text.splitlines() if s.startswith("| nt_xent, M = 32,768, D = 128, bfloat16 | both | 1 |"))
    assert "| 70% (70% products alone) | 16.0 |  | 9.00 | 0.50 |" in line
    assert "not slower than torch.compile | **missed: nt_xent M = 32,768, D = 128, both**" in text
    assert "| masked_mse, B = 4,096, px = 224, bfloat16 | forward | not measured | not measured |" in text
    assert "Tests on the device, commit abc1234: 1 passed, 1 failed, 0 skipped: b." in text
    assert "A note." in text and (tmp_path / "speed" / "nvidia-h200-nt_xent-bfloat16-128-time.svg").exists()


def test_page_without_a_gpu_says_that_nothing_was_measured(tmp_path: Path) -> None:
    text = page.render([], tmp_path)
    assert "### NVIDIA H200\n\nNot measured yet" in text and "Tests on the device: not run." in text
    assert text.count("| not measured |\n") >= len(TARGETS)


@pytest.mark.parametrize("side_by_side", [False, True])
def test_outcomes_are_kept_and_only_what_has_not_passed_runs_again(tmp_path: Path, side_by_side: bool) -> None:
    """Under pytest-xdist too, where it is installed."""
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import pathlib, pytest\n"
        "def test_passes(): pass\n"
        f"def test_fails(): assert pathlib.Path({str(tmp_path)!r}, 'mended').exists()\n"
        "@pytest.mark.skip(reason='not here')\n"
        "def test_is_skipped(): pass\n"
    )
    groups = {str(tests): side_by_side}
    first = run_tests(tmp_path / "results", Deadline(100), groups)
    assert [first.count(outcome) for outcome in ("passed", "failed", "skipped")] == [1, 1, 1]
    assert not first.not_reached and not first.notes
    (tmp_path / "mended").touch()
    second = run_tests(tmp_path / "results", Deadline(100), groups)
    assert [second.count(outcome) for outcome in ("passed", "failed", "skipped")] == [2, 0, 1]
    written = [r["operation"].split("::")[-1] for r in whole_lines(tmp_path / "results" / "tests.jsonl")]
    assert sorted(written[3:]) == ["test_fails", "test_is_skipped"]


def test_tests_that_the_deadline_left_out_are_counted(tmp_path: Path) -> None:
    tests = tmp_path / "test_slow.py"
    tests.write_text("import time\ndef test_first(): pass\ndef test_second(): time.sleep(90)\ndef test_third(): pass\n")
    found = run_tests(tmp_path / "results", Deadline(12), {str(tests): False})
    assert found.count("passed") == 1 and found.not_reached == 2
    assert found.notes == [f"{tests}: ended by the deadline, 2 tests not reached"]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_test_that_breaks_the_device_has_failed_and_the_others_run_elsewhere(
    tmp_path: Path, side_by_side: bool
) -> None:
    """The fault shows after the test has passed, as that of a kernel does which nothing waited for."""
    tests = tmp_path / "test_fault.py"
    tests.write_text(
        "import torch\n"
        "def lost(): raise RuntimeError('an illegal memory access was encountered')\n"
        "def test_first(): pass\n"
        "def test_breaks(): torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost\n"
        "def test_last(): assert torch.cuda.synchronize is not lost\n"
    )
    found = run_tests(tmp_path / "results", Deadline(100), {str(tests): side_by_side})
    outcomes = {name.split("::")[-1]: one["outcome"] for name, one in found.outcomes.items()}
    assert outcomes == {"test_first": "passed", "test_breaks": "failed", "test_last": "passed"}
    assert not found.not_reached and not found.notes


def test_build_says_what_is_missing_and_what_that_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "missing", lambda: ["pybind11", "ninja"])
    monkeypatch.setattr(build, "up_to_date", lambda: False)
    without_nvcc, without_tools = build.build(60)
    assert "nvcc was not found" in without_nvcc
    assert "not built: pybind11, ninja missing" in without_tools
    monkeypatch.setattr(build, "up_to_date", lambda: True)
    assert build.build(60) == [without_nvcc]


def test_a_module_that_an_earlier_part_built_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["hsv_kernels._C is not there", SimpleNamespace(has_cuda=True)]
    monkeypatch.setattr(build, "compiled_module", cache(lambda: answers.pop(0)))
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "CMakeLists.txt").touch()
    (tmp_path / "hsv_kernels").mkdir()
    assert not build.up_to_date()
    module = tmp_path / "hsv_kernels" / f"_C{EXTENSION_SUFFIXES[0]}"
    module.touch()
    later = time.time() + 10
    os.utime(module, (later, later))
    assert build.up_to_date()


def test_python_of_the_machine_is_named_by_make() -> None:
    command = ["make", "-n", "gpu", f"GPU_PYTHON={sys.executable}", "PART=contrast", "FULL=1", "RESULTS=/elsewhere"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{sys.executable} -m bench.gpu --part contrast --full" in said and "--results /elsewhere" in said
    assert "pip" not in said
