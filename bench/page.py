"""docs/speed.md: the newest results of each device as plots and tables.

    python -m bench.page

Losing and failed rows stay. What a person has to say about a device is in bench/results/<device>/notes.md.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.figures import figures
from bench.gpu.page import INTRODUCTION as GPU_INTRODUCTION
from bench.gpu.page import TARGET_DEVICE, section
from bench.limits import EXPONENTIAL
from bench.paths import RESULTS, ROOT
from bench.results import Row, newest, read
from bench.tables import describe, find, fraction, tables
from bench.targets import EXTRA_MIB, FRACTION, TARGETS, Target

PAGE = ROOT / "docs" / "speed.md"

INTRODUCTION = """\
# Speed

`make bench` measures the CPU of the machine where it runs, writes `bench/results/<device>/<date>-<commit>.json` and
makes this page of the newest results of each device; `make bench-check` says what got slower between two of them.

- Providers run in turn in each round and begin with another one each time, so that a slow minute falls on all alike.
  Times are medians with quartiles; “× hsv” is the median over the rounds of a provider's time over hsv's. The first
  call of each, compilation included, is not counted.
- eager is the formula as it is usually written, torch.compile the same with `dynamic=False`. bfloat16 means bf16
  products: bf16 inputs for hsv (or float32 ones with `dot_dtype=torch.bfloat16`), bf16 autocast for the others.
- Extra memory is how far a call's peak rises above what was there before it, gradients included, in a process of its
  own; “≈” is predicted from its growth over smaller sizes.
- The limit is measured between the rounds: the rate of multiply-adds in registers (of bf16 dot products where the CPU
  has them), or the rate of copying memory. NT-Xent's work is 4M²D flops (forward M²D), M = 2N, and an exponential
  counts as {exponential} flops; “products alone” leaves the exponentials out. Masking and reconstruction count the
  bytes that must be read and written, and copies larger than the caches. A share can exceed 100 %: up to 8 MiB of
  exponentials are kept for the backward (N ≤ 1,024), and what fits into the caches is read faster.
- “Huge pages for all”: THP_MEM_ALLOC_ENABLE=1, with which torch asks for huge pages for every provider's tensors.
"""


def main() -> None:
    devices = sorted(path for path in RESULTS.glob("*") if path.is_dir() and newest(path))
    if not devices:
        sys.exit(f"no results under {RESULTS}: run make bench first")
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render([(path.name, read(newest(path)[0]), _notes(path)) for path in devices], PAGE.parent))
    print(PAGE.relative_to(ROOT))


def _notes(folder: Path) -> str:
    path = folder / "notes.md"
    return path.read_text().strip() if path.exists() else ""


def render(devices: Sequence[tuple[str, list[Row], str]], folder: Path) -> str:
    """The page of (slug, rows, notes); its plots are written to folder/speed."""
    parts = [INTRODUCTION.replace("{exponential}", str(EXPONENTIAL))]
    gpus = {str(rows[0]["device"]): (slug, rows, notes) for slug, rows, notes in devices if _on_gpu(rows)}
    for slug, rows, notes in (one for one in devices if not _on_gpu(one[1])):
        parts += [f"## {rows[0]['device']}, {rows[0]['threads']} threads", describe(rows[0]) + ".", *_limits(rows)]
        parts += ["### Targets", "\n".join(_targets(rows))]
        parts += ["### Notes", notes] if notes else []
        parts += figures(slug, rows, folder)
        parts += ["### All rows", *tables(rows)]
    parts.append(GPU_INTRODUCTION)
    for device in sorted({TARGET_DEVICE, *gpus}):
        slug, rows, notes = gpus.get(device, ("", [], ""))
        parts += section(device, slug, rows, notes, folder)
    return "\n\n".join(parts) + "\n"


def _on_gpu(rows: list[Row]) -> bool:
    return rows[0]["device"] != rows[0]["cpu"]


def _limits(rows: list[Row]) -> Iterator[str]:
    """What was measured of the machine between the rounds."""
    names = {
        "rate_fma": ("multiply-adds", 1e9, "GFLOP/s"),
        "rate_dot": ("bf16 dot products", 1e9, "GFLOP/s"),
        "rate_exponentials": ("exponentials", 1e9, "10⁹/s"),
        "rate_copy": ("copying, read plus written", 1e9, "GB/s"),
    }
    found = []
    for key, (name, unit, label) in names.items():
        values = [row[key] for row in rows if row.get(key)]
        if values:
            found.append(f"{name} {median(values) / unit:.1f} {label} ({_span(values, unit)})")
    if found:
        yield "Measured limits, medians of all cases (least and most of them): " + "; ".join(found) + "."


def _span(values: Sequence[float], unit: float) -> str:
    return f"{min(values) / unit:.1f}–{max(values) / unit:.1f}"


def _targets(rows: list[Row]) -> Iterator[str]:
    yield "| work | mode | against | target | measured | huge pages for all: target | measured |"
    yield "|---|---|---|---|---|---|---|"
    for target in TARGETS:
        sizes = ", ".join(f"{name} = {value:,}" for name, value in target.shape.items())
        default, huge = (_speed_up(rows, target, pages) for pages in (False, True))
        cells = (
            f"{target.operation}, {sizes}, {target.products}",
            target.mode,
            target.against,
            f"≥ {target.times:g} ×",
            _verdict(default, target.times),
            f"≥ {target.times_huge:g} ×" if target.times_huge else "",
            _verdict(huge, target.times_huge),
        )
        yield f"| {' | '.join(cells)} |"
    for products in ("float32", "bfloat16"):
        row = find(rows, False, operation="nt_xent", shape={"N": 4096}, products=products, mode="both", provider="hsv")
        row = row or {}
        yield f"| nt_xent, N = 4,096, {products} | both | extra memory | ≤ {EXTRA_MIB} MiB | {_at_most(row)} | | |"
        yield (
            f"| nt_xent, N = 4,096, {products} | both | the machine's limit | ≥ {FRACTION:.0%} "
            f"| {fraction(row, bold_below=FRACTION)} | | |"
        )


def _speed_up(rows: list[Row], target: Target, huge: bool) -> float | None:
    row = find(
        rows,
        huge,
        operation=target.operation,
        shape=target.shape,
        products=target.products,
        mode=target.mode,
        provider=target.against,
    )
    return row and row.get("times_hsv")


def _verdict(value: float | None, target: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} ×" if target is None or value >= target else f"**{value:.1f} ×, missed**"


def _at_most(row: Row) -> str:
    if row.get("extra_bytes") is None:
        return "–"
    size = row["extra_bytes"] / 2**20
    return f"{size:.1f} MiB" if size <= EXTRA_MIB else f"**{size:.1f} MiB, missed**"


if __name__ == "__main__":
    main()
