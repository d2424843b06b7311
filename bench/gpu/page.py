"""The part of docs/speed.md that is about GPUs: targets and rows, those that were not measured among them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bench.cases import MODES, Case
from bench.figures import series_of
from bench.gpu.cases import PARTS
from bench.gpu.measure import RATES
from bench.gpu.store import about, key, whole_lines
from bench.gpu.targets import NOT_MEASURED, TARGET_DEVICE, TARGETS, slower_than_compiled, verdict
from bench.paths import RESULTS
from bench.plots import line_plot
from bench.results import Row
from bench.tables import describe, fraction, milliseconds, shape

__all__ = ["INTRODUCTION", "TARGET_DEVICE", "section"]

UNITS = {
    "bfloat16": ("bf16 products", 1e12, "TFLOP/s"),
    "tf32": ("tf32 products", 1e12, "TFLOP/s"),
    "float32": ("float32 products", 1e12, "TFLOP/s"),
    "exponentials": ("exponentials", 1e12, "10¹²/s"),
    "copy": ("copying, read plus written", 1e12, "TB/s"),
}

INTRODUCTION = """\
## GPUs

`make gpu` proves and measures the kernels on the GPU where it runs, in parts of at most nine minutes: `PART=test`,
`contrast`, `memory-bound` or `end-to-end`. Each row is on the disk as soon as it is measured, and the next call goes on
with what is left. Every provider's value and gradient are compared with float64 before it is timed.

- Times are medians of interleaved rounds between events on the device's stream, launches included; “graph” is one call
  within the replay of a CUDA graph, without what a launch costs. Memory-bound calls take sets of inputs in turn that do
  not fit into the cache together. “×” is a provider's time over hsv's in the same rounds.
- The limit comes from the device's own rates, measured first: matrix products of 8,192³, exponentials in registers, and
  a copy of its memory. M = 2N rows. NT-Xent's work is M²D flops and M²/2 exponentials forward, 4M²D and M² backward; a
  queue's 2nmD and nm forward, twice the flops for both directions. The slower of products and exponentials counts; a
  float32 product takes the better of float32 and a third of the tf32 rate. Masking and reconstruction count the bytes
  that must be read and written.
- bfloat16 means bf16 inputs, the others under autocast; tf32 is float32 at matmul precision “high”."""


def section(device: str, slug: str, rows: list[Row], notes: str, folder: Path) -> Iterator[str]:
    """One device; without rows a table of what there is to measure. Plots are written to folder/speed."""
    yield f"### {device}"
    if rows:
        yield describe(rows[0]) + "."
        yield from _rates(rows)
    else:
        yield "Not measured yet. Nothing here is known to be fast."
    yield _tests(RESULTS / slug / "tests.jsonl" if slug else None)
    if device == TARGET_DEVICE:
        yield "\n".join(_targets(rows))
    if notes:
        yield notes
    yield from _figures(slug, rows, folder)
    for part, cases in PARTS.items():
        yield f"<details><summary>{part}</summary>\n\n{_table(cases(False), cases(True), rows)}\n\n</details>"


def _tests(path: Path | None) -> str:
    """How the newest tests of the device ended."""
    lines = whole_lines(path) if path else []
    if not lines:
        return "Tests on the device: not run."
    newest = {line["test"]: line for line in lines if line["code"] == lines[-1]["code"]}
    counts = Counter(line["outcome"] for line in newest.values())
    failed = [name for name, line in newest.items() if line["outcome"] == "failed"]
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return f"Tests on the device, commit {lines[-1]['commit']}: {said}{': ' if failed else ''}{'; '.join(failed)}."


def _rates(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        if row["operation"] == RATES:
            found = (f"{name} {row['rates'][rate] / unit:.3g} {label}" for rate, (name, unit, label) in UNITS.items())
            yield f"Rates of the device: {'; '.join(found)}."


def _targets(rows: list[Row]) -> Iterator[str]:
    yield "| work | mode | target | measured |"
    yield "|---|---|---|---|"
    for target in TARGETS:
        yield f"| {target.work} | {target.mode} | {target.wanted} | {verdict(target, rows)} |"
    compared = [row for row in rows if row["provider"] == "torch.compile" and row["products"] == "bfloat16"]
    slower = [f"{row['operation']} {shape(row)}, {row['mode']}" for row in slower_than_compiled(compared)]
    found = f"**missed: {'; '.join(slower)}**" if slower else "met" if compared else NOT_MEASURED
    yield f"| every row in bfloat16 | all | not slower than torch.compile | {found} |"


def _table(standard: list[Case], full: list[Case], rows: list[Row]) -> str:
    """A line for each case and mode: all standard ones, and of the full ones those with rows."""
    known = {key(row): row for row in rows}
    titles = {case.title for case in standard}
    lines = [
        "| work | mode | hsv ms | of the limit | extra MiB | hsv, CUDA C++ ms | eager × | torch.compile × | others × |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in full:
        for mode in (mode for kind in case.kinds for mode in MODES[kind]):
            found = {name: known.get(key(about(case, mode, name))) for name in case.providers}
            if case.title in titles or any(found.values()):
                lines.append(f"| {case.title} | {mode} | {' | '.join(_cells(found))} |")
    return "\n".join(lines)


def _cells(found: dict[str, Row | None]) -> Iterator[str]:
    own = found.get("hsv")
    yield _milliseconds(own)
    yield fraction(own) if own else NOT_MEASURED
    extra = own and own.get("extra_bytes")
    yield "–" if extra is None else f"{extra / 2**20:,.1f}"
    yield _milliseconds(found["hsv, CUDA C++"]) if "hsv, CUDA C++" in found else ""
    for name in ("eager", "torch.compile"):
        yield _times(found[name]) if name in found else ""
    others = [name for name in found if name not in ("hsv", "hsv, CUDA C++", "eager", "torch.compile")]
    yield "; ".join(f"{name} {_times(found[name])}" for name in others)


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    return milliseconds(row["median_s"]) if row["status"] == "ok" else _problem(row)


def _times(row: Row | None) -> str:
    """The provider's time over hsv's; its own time where hsv has none."""
    if row is None:
        return NOT_MEASURED
    if row["status"] != "ok":
        return _problem(row)
    return f"{milliseconds(row['median_s'])} ms" if row.get("times_hsv") is None else f"{row['times_hsv']:.2f}"


def _problem(row: Row) -> str:
    reason = "" if row["status"] in ("out of memory", "not installed") else f": {row['reason']}".replace("|", "\\|")
    return f"{row['status']}{reason}"


def _figures(slug: str, rows: list[Row], folder: Path) -> Iterator[str]:
    """NT-Xent in bfloat16, both directions, against M: time and share of the limit."""
    nt_xent = [row for row in rows if (row["operation"], row["products"]) == ("nt_xent", "bfloat16")]
    for dim in sorted({row["shape"]["D"] for row in nt_xent}):
        both = [row for row in nt_xent if row["shape"]["D"] == dim and row["mode"] == "both"]
        both.sort(key=lambda row: row["shape"]["M"])
        for name, title, unit, field, factor in (
            ("time", "time, forward and backward", "ms", "median_s", 1e3),
            ("limit", "share of the device's limit", "", "fraction", 1),
        ):
            series = [one for one in series_of(both, field, factor, "M") if one.points]
            if series:
                file = f"{slug}-nt_xent-bfloat16-{dim}-{name}.svg"
                heading = f"NT-Xent, bfloat16, D = {dim}: {title}"
                svg = line_plot(heading, "M (rows)", unit, series, share=name == "limit")
                (folder / "speed").mkdir(parents=True, exist_ok=True)
                (folder / "speed" / file).write_text(svg)
                yield f"![{heading}, against M](speed/{file})"
