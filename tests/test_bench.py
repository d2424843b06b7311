"""The benchmarks' statistics, results, comparison and page, on made-up numbers: nothing is timed here."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import bench_masking, check, limits, page, results
from bench.cases import Case, Provider, Work
from bench.limits import EXPONENTIAL, Probe, least_seconds
from bench.plots import Series, line_plot
from bench.stats import growth, quartiles, quotient
from bench.tables import describe
from bench.timing import Measured, measure
from hsv_kernels.backends import compiled_module
from hsv_kernels.ops.masking.reference import patchify

ORIGIN = {
    "device": "A CPU",
    "cpu": "A CPU",
    "isa": "avx2",
    "threads": 2,
    "versions": {"torch": "2.15", "lightly": None},
    "system": "Linux",
    "commit": "abc1234",
    "dirty": False,
    "date": "2026-01-02T03:04:05+00:00",
    "memory_bytes": 22 << 30,
    "transparent_huge_pages": "madvise",
}


def row(provider: str, times_hsv: float | None, *, n: int = 4096, huge: bool = False, **fields: object) -> results.Row:
    """A row of NT-Xent, both ways; eager at times_hsv = 8 takes 80 ms."""
    seconds = 0.01 * (times_hsv or 1)
    return {
        "operation": "nt_xent",
        "shape": {"N": n},
        "products": "float32",
        "mode": "both",
        "provider": provider,
        "note": "",
        "status": "ok",
        "reason": "",
        "rounds": 5,
        "q1_s": 0.9 * seconds,
        "median_s": seconds,
        "q3_s": 1.1 * seconds,
        "least_s": 0.8 * seconds,
        "times_hsv": times_hsv,
        "times_eager": None,
        "limit": "arithmetic",
        "fraction": 0.9 / (times_hsv or 1),
        "fraction_products": 0.8 / (times_hsv or 1),
        "rate_fma": 1e11,
        "extra_bytes": n << 12,
        "extra_predicted": False,
        "huge_pages_for_all": huge,
        **ORIGIN,
        **fields,
    }


def out_of_memory(provider: str, n: int) -> results.Row:
    missing = ("rounds", "q1_s", "median_s", "q3_s", "least_s", "times_hsv", "times_eager", "limit", "fraction")
    whole = row(provider, None, n=n, status="out of memory", reason="needs 48 GiB; 22 GiB are there")
    return {key: value for key, value in whole.items() if key not in missing}


def test_quartiles_and_quotient() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)
    # the slow third round slows both alike, and a round that one of them sat out does not count
    assert quotient([2.0, 4.0, 20.0, None], [1.0, 2.0, 10.0, 5.0]) == 2.0


def test_growth_follows_the_last_two_points() -> None:
    assert growth([1, 2, 4], [7.0, 10.0, 41.0], 8) == pytest.approx(164.0)
    assert growth([1, 2], [1.0, 8.2], 4) == pytest.approx(32.8)  # not faster than a matrix
    assert growth([1], [1.0], 4) is None


def test_least_time_counts_what_the_work_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICE", "cpu")
    rates = {"fma": 1e9, "dot": 2e9, "exponentials": 1.0}
    work = Work(flops=2e9, exponentials=1e8)
    assert least_seconds(work, "float32", rates) == pytest.approx(2 + 0.1 * EXPONENTIAL)
    assert least_seconds(work, "bfloat16", rates, exponentials=False) == pytest.approx(1)
    assert least_seconds(work, "bfloat16", rates | {"dot": 0.0}, exponentials=False) == pytest.approx(2)
    assert least_seconds(Work(bytes=4e9), "float32", {"copy": 2e9}) == 2
    assert least_seconds(work, "float32", {}) is None


def test_on_a_gpu_the_slower_of_products_and_exponentials_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DEVICE", "cuda")
    rates = {"bfloat16": 8e9, "tf32": 4e9, "float32": 5e8, "exponentials": 1e8, "copy": 2e9}
    work = Work(flops=2e9, exponentials=5e7)
    assert least_seconds(work, "bfloat16", rates) == pytest.approx(0.5)
    assert least_seconds(work, "bfloat16", rates, exponentials=False) == pytest.approx(0.25)
    assert least_seconds(work, "tf32", rates) == pytest.approx(0.5)
    assert least_seconds(work, "float32", rates) == pytest.approx(1.5)  # three tf32 products each
    assert least_seconds(work, "float32", rates | {"float32": 4e9}) == pytest.approx(0.5)
    assert least_seconds(Work(bytes=4e9), "bfloat16", rates) == 2
    assert least_seconds(work, "bfloat16", {}) is None


@pytest.mark.skipif(isinstance(compiled_module(), str), reason="built without compiled code")
@pytest.mark.parametrize("work", [Work(flops=1), Work(bytes=1)], ids=["arithmetic", "memory"])
def test_the_machine_has_rates(work: Work) -> None:
    rates = Probe(work)()
    assert all(rate > 0 for name, rate in rates.items() if name != "dot")
    assert rates.keys() == ({"copy"} if work.bytes else {"fma", "dot", "exponentials"})


def absent() -> None:
    raise ImportError("No module named 'elsewhere'")


def breaks_later() -> Callable[[Tensor], Tensor]:
    calls = 2

    def run(x: Tensor) -> Tensor:
        nonlocal calls
        calls -= 1
        if calls < 0:
            raise RuntimeError("gave up\nand more")
        return x.square().sum()

    return run


@pytest.fixture
def case() -> Case:
    square = Provider(lambda: lambda x: x.square().sum())
    return Case(
        operation="square",
        shape={"N": 3},
        products="float32",
        inputs=lambda dtype: (torch.arange(3.0, dtype=dtype).requires_grad_(),),
        providers={
            "hsv": square,
            "eager": square,
            "absent": Provider(absent),
            "breaking": Provider(breaks_later),
            "wrong": Provider(lambda: lambda x: x.sum()),
        },
        seconds=0,
        rounds=(3, 9),
    )


def test_providers_that_fail_say_why_and_the_others_go_on(case: Case) -> None:
    measured = measure(case, "training", list(case.providers))
    assert measured.seconds.keys() == {"backward", "both"}
    assert {name: len(times) for name, times in measured.seconds["both"].items()} == {"hsv": 3, "eager": 3}
    assert measured.failures["absent"] == ("not installed", "ImportError: No module named 'elsewhere'")
    assert measured.failures["breaking"] == ("failed", "RuntimeError: gave up")
    assert "another value than eager's" in measured.failures["wrong"][1]
    assert results.timing_row(case, "both", "absent", measured)["status"] == "not installed"
    assert results.timing_row(case, "both", "hsv", measured)["rounds"] == 3


def test_the_value_is_the_first_of_what_a_provider_returns(case: Case) -> None:
    case.providers["hsv"] = Provider(lambda: lambda x: (x.square().sum(), x.detach()))
    for kind in case.kinds:
        assert not measure(case, kind, ["hsv", "eager"]).failures


@pytest.mark.parametrize("case", bench_masking.CASES, ids=lambda case: case.operation)
@pytest.mark.parametrize("provider", ["hsv", "eager"])
def test_rivals_of_masking_return_the_same(case: Case, provider: str) -> None:
    (x,) = case.inputs(torch.float32)
    tokens = x if x.dim() == 3 else patchify(x, bench_masking.PATCH, bench_masking.PATCH)
    kept, ids_restore, mask = case.providers[provider].make()(x)
    order = ids_restore.argsort(1)[:, : bench_masking.K]
    torch.testing.assert_close(kept, tokens.gather(1, order[..., None].expand(-1, -1, bench_masking.VALUES)))
    torch.testing.assert_close(mask, (ids_restore >= bench_masking.K).float())


def test_a_row_compares_rounds_and_tells_the_share_of_the_limit(case: Case) -> None:
    case.work["forward"] = Work(flops=10, exponentials=10 / EXPONENTIAL)
    seconds = {"hsv": [1.0, 3.0, 2.0], "eager": [4.0, 12.0, None]}
    rates = [{"fma": rate, "exponentials": 1.0} for rate in (40.0, 40.0 / 3, 20.0)]
    measured = Measured({"forward": seconds}, rates)
    fast, slow = (results.timing_row(case, "forward", name, measured) for name in seconds)
    assert (fast["median_s"], fast["times_eager"], fast["fraction"], fast["fraction_products"]) == (2, 0.25, 0.5, 0.25)
    assert (slow["rounds"], slow["times_hsv"], slow["fraction"]) == (2, 4, 0.125)


def test_results_are_kept_by_device_date_and_commit(tmp_path: Path) -> None:
    old = results.write([row("hsv", 1)], tmp_path)
    new = results.write([row("hsv", 1, date="2026-02-01T00:00:00+00:00", dirty=True)], tmp_path)
    assert old == tmp_path / "a-cpu-2-threads" / "2026-01-02-abc1234.json"
    assert new.name == "2026-02-01-abc1234-dirty.json"
    assert results.newest(old.parent) == [new, old]
    assert results.read(old) == [row("hsv", 1)]


@pytest.mark.parametrize(
    ("system", "shown"),
    [("Linux 6.1.7-build-3", "Linux 6.1.7"), ("Linux 6.1.7", "Linux 6.1.7"), ("Linux", "Linux"), ("", "")],
)
def test_a_system_is_told_without_its_build(system: str, shown: str) -> None:
    assert results.without_build(system) == shown
    assert f"2 threads, {shown};" in describe(row("hsv", 1, system=system))


def test_rows_written_before_a_crash_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert results.read_lines(path) == []
    results.append(path, row("hsv", 1))
    results.append(path, row("eager", 8))
    assert [r["provider"] for r in results.read_lines(path)] == ["hsv", "eager"]


def test_check_compares_by_eager_of_the_same_run() -> None:
    base = [row("hsv", 1), row("eager", 8), row("hsv", 1, huge=True), row("eager", 5, huge=True)]
    new = [row("hsv", 1), row("eager", 6), row("hsv", 1, huge=True), row("eager", 5.2, huge=True)]
    first, second = check.compare(base, new)
    assert first.slower(0.15) and not first.slower(0.3)
    assert not second.slower(0.15) and not second.faster(0.15)
    assert str(first) == "nt_xent, N = 4,096, float32, both: 8.00 → 6.00 × eager (-25%)"
    lines = list(check.report([first, second], 0.15))
    assert lines[0] == "1 of 2 cases slower by more than 15%:"
    assert lines[2] == "0 of 2 cases faster by more than 15%"


def test_check_falls_back_on_the_limit_and_notices_what_is_gone() -> None:
    base = [row("hsv", 1, n=32768), row("hsv", 1), row("eager", 8), row("hsv", 1, n=256)]
    new = [row("hsv", 1, n=32768, fraction=0.5), out_of_memory("hsv", 4096), row("hsv", 1, n=512)]
    limit, *gone = check.compare(base, new)
    assert (limit.measure, limit.base, limit.new) == ("of the limit", 0.9, 0.5)
    assert [change.case for change in gone] == [f"nt_xent, N = {n}, float32, both" for n in ("4,096", "256")]
    assert all(change.slower(0.15) and "no longer measured" in str(change) for change in gone)


@pytest.mark.parametrize(("times", "status"), [(8, 0), (4, 1)])
def test_check_exits_with_1_when_something_is_slower(
    times: float, status: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = results.write([row("hsv", 1), row("eager", 8)], tmp_path)
    new = results.write([row("hsv", 1, date="2026-02-01"), row("eager", times)], tmp_path)
    assert check.main(["--base", str(base), "--new", str(new)]) == status
    assert f"{status} of 1 cases slower" in capsys.readouterr().out


def test_check_says_when_torch_differs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = results.write([row("hsv", 1)], tmp_path)
    new = results.write([row("hsv", 1, date="2026-02-01", versions={"torch": "2.16"})], tmp_path)
    assert check.main(["--base", str(base), "--new", str(base)]) == 0
    assert "PyTorch's version" not in capsys.readouterr().out
    assert check.main(["--base", str(base), "--new", str(new)]) == 0
    assert "differ in PyTorch's version" in capsys.readouterr().out


def test_check_refuses_two_devices(tmp_path: Path) -> None:
    base = results.write([row("hsv", 1)], tmp_path)
    new = results.write([row("hsv", 1, device="Another")], tmp_path)
    with pytest.raises(SystemExit, match="differ in device: A CPU and Another"):
        check.main(["--base", str(base), "--new", str(new)])


def test_page_without_results_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "RESULTS", tmp_path / "absent")
    with pytest.raises(SystemExit, match=r"no results under .*absent: run make bench first"):
        page.main()


def test_page_shows_losses_failures_targets_and_notes(tmp_path: Path) -> None:
    rows = [
        *(row("hsv", 1, n=n) for n in (4096, 8192, 16384)),
        row("eager", 6.9),
        row("lightly", 14, note="mean"),
        row("eager", 7, n=8192),
        out_of_memory("eager", 16384),
        row("hsv", 1, huge=True),
        row("eager", 5.5, huge=True),
        row("torch.compile", 0.5, n=256),
    ]
    text = page.render([("a-cpu", json.loads(json.dumps(rows)), "A note of a person.")], tmp_path)
    assert "A CPU, avx2, 2 threads" in text and "lightly not installed" in text and "commit abc1234" in text
    assert "| eager | ≥ 7.5 × | **6.9 ×, missed** | ≥ 5 × | 5.5 × |" in text
    assert "| lightly | ≥ 13 × | 14.0 × |" in text
    assert "| torch.compile | ≥ 2.4 × | **0.5 ×, missed** |" in text
    assert "| ≥ 88% | 90% (80% products alone) |" in text
    assert "out of memory: needs 48 GiB; 22 GiB are there" in text
    assert "| N = 4,096 | lightly (mean) | 140 | 126–154 | 14.00 |" in text
    assert "A note of a person." in text
    for figure in ("time", "memory", "limit"):
        file = f"speed/a-cpu-nt_xent-float32-{figure}.svg"
        assert f"]({file})" in text and (tmp_path / file).exists()


def test_plot_is_svg_with_every_point() -> None:
    missing = Series("eager & co", [(256, 1.0), (512, 4.0)], predicted=[(1024, 16.0)], missing=[2048])
    svg = ElementTree.fromstring(line_plot("title", "N", "ms", [missing]))
    name = "{http://www.w3.org/2000/svg}"
    circles = svg.findall(f"{name}circle")
    assert [circle.get("fill") for circle in circles] == ["#c0392b", "#c0392b", "white"]
    x = [float(circle.get("cx")) for circle in circles]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.11)  # a logarithmic axis
    texts = [text.text for text in svg.findall(f"{name}text")]
    assert "eager & co" in texts and "× out of memory" in texts and "2,048" in texts
