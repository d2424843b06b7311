"""docs/speed.md: the newest results of each device as plots and tables.

    python -m bench.page

Losing and failed rows stay. What a person has to say about a device is in bench/results/<device>/notes.md.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from bench.limits import EXPONENTIAL
from bench.plots import Series, line_plot
from bench.results import RESULTS, ROOT, Row, newest, read
from bench.targets import EXTRA_MIB, FRACTION, TARGETS, Target

PAGE = ROOT / "docs" / "speed.md"

INTRODUCTION = """\
# Speed

`make bench` measures on the machine where it runs, writes `bench/results/<device>/<date>-<commit>.json` and makes this
page of the newest results of each device; `make bench-check` says what got slower between two of them.

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


def describe(row: Row) -> str:
    """One line: device, instruction set, threads, versions, commit, settings."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in row["versions"].items())
    gpu = "" if row["device"] == row["cpu"] else f" with {row['cpu']}"
    return (
        f"{row['device']}{gpu}, {row['isa']}, {row['threads']} threads, {row['system']}; {versions}; "
        f"commit {row['commit']}{' with uncommitted changes' if row['dirty'] else ''}, {str(row['date'])[:10]}; "
        f"transparent huge pages: {row['transparent_huge_pages']}"
    )


def main() -> None:
    devices = sorted(path for path in RESULTS.iterdir() if path.is_dir() and newest(path))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render([(path.name, read(newest(path)[0]), _notes(path)) for path in devices], PAGE.parent))
    print(PAGE.relative_to(ROOT))


def _notes(folder: Path) -> str:
    path = folder / "notes.md"
    return path.read_text().strip() if path.exists() else ""


def render(devices: Sequence[tuple[str, list[Row], str]], folder: Path) -> str:
    """The page of (slug, rows, notes); its plots are written to folder/speed."""
    parts = [INTRODUCTION.replace("{exponential}", str(EXPONENTIAL))]
    for slug, rows, notes in devices:
        parts += [f"## {rows[0]['device']}, {rows[0]['threads']} threads", describe(rows[0]) + ".", *_limits(rows)]
        parts += ["### Targets", "\n".join(_targets(rows))]
        parts += ["### Notes", notes] if notes else []
        parts += _figures(slug, rows, folder)
        parts += ["### All rows", *_tables(rows)]
    return "\n\n".join(parts) + "\n"


def _limits(rows: list[Row]) -> Iterator[str]:
    """What was measured of the machine, for each setting of huge pages."""
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


def find(rows: list[Row], huge: bool, **wanted: object) -> Row | None:
    """The row of one setting whose fields are as wanted."""
    for row in rows:
        if row["huge_pages_for_all"] == huge and all(row[name] == value for name, value in wanted.items()):
            return row
    return None


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
            f"| {_fraction(row, bold_below=FRACTION)} | | |"
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


def _fraction(row: Row, bold_below: float = 0) -> str:
    if row.get("fraction") is None:
        return "–"
    text = f"{row['fraction']:.0%}"
    if row["limit"] == "arithmetic":
        text += f" ({row['fraction_products']:.0%} products alone)"
    return f"**{text}, missed**" if row["fraction"] < bold_below else text


def _figures(slug: str, rows: list[Row], folder: Path) -> Iterator[str]:
    """Writes the plots of NT-Xent against N and gives the lines that show them."""
    (folder / "speed").mkdir(parents=True, exist_ok=True)
    for products in ("float32", "bfloat16"):
        chosen = [r for r in rows if (r["operation"], r["products"]) == ("nt_xent", products)]
        both = [r for r in chosen if r["mode"] == "both" and not r["huge_pages_for_all"]]
        memory = _series(both, "extra_bytes", 2**-20)
        available = ("available memory", chosen[0]["memory_bytes"] / 2**20) if chosen else None
        for name, title, unit, series, ceiling in (
            ("time", "time, forward and backward", "ms", _series(both, "median_s", 1e3), None),
            ("memory", "extra memory, forward and backward", "MiB", memory, available),
            ("limit", "share of the machine's limit", "", _limit_series(chosen), None),
        ):
            series = [one for one in series if one.points]
            if not series:
                continue
            file = f"{slug}-nt_xent-{products}-{name}.svg"
            heading = f"NT-Xent, {products}, D = 128: {title}"
            svg = line_plot(heading, "N (pairs)", unit, series, share=name == "limit", ceiling=ceiling)
            (folder / "speed" / file).write_text(svg)
            yield f"![NT-Xent, {products}: {title}, against N](speed/{file})"


def _series(rows: list[Row], field: str, unit: float) -> list[Series]:
    """A line for each provider; predicted memory apart, and with the times where there is not enough memory."""
    series = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        known = [row for row in own if row.get(field)]
        predicted = [row for row in known if field == "extra_bytes" and row["extra_predicted"]]
        drawn = [row for row in predicted if row[field] < 4 * row["memory_bytes"]]  # beyond, the plot is all axis
        series.append(
            Series(
                provider,
                [(row["shape"]["N"], unit * row[field]) for row in known if row not in predicted],
                [(row["shape"]["N"], unit * row[field]) for row in drawn],
                [row["shape"]["N"] for row in own if row["status"] == "out of memory" and field == "median_s"],
            )
        )
    return series


def _limit_series(rows: list[Row]) -> list[Series]:
    """hsv with and without the exponentials, for both settings and modes, and eager for comparison."""
    series = []
    for mode in ("both", "forward"):
        for provider, field, name in (
            ("hsv", "fraction", "hsv"),
            ("hsv", "fraction_products", "hsv, products alone"),
            ("eager", "fraction", "eager"),
        ):
            points = [
                (row["shape"]["N"], row[field])
                for row in rows
                if (row["mode"], row["provider"], row["huge_pages_for_all"]) == (mode, provider, False)
                and row.get(field)
            ]
            series.append(Series(f"{name}, {mode}", points))
    return series


def _tables(rows: list[Row]) -> Iterator[str]:
    groups = dict.fromkeys((row["operation"], row["products"], row["mode"]) for row in rows)
    for operation, products, mode in groups:
        chosen = [r for r in rows if (r["operation"], r["products"], r["mode"]) == (operation, products, mode)]
        lines = "\n".join(_table(chosen))
        yield f"<details><summary>{operation}, {products}, {mode}</summary>\n\n{lines}\n\n</details>"


def _table(rows: list[Row]) -> Iterator[str]:
    """One operation and mode: a line for each shape and provider, both settings side by side."""
    heads = (
        "shape",
        "provider",
        "median ms",
        "quartiles",
        "× hsv",
        "of the limit",
        "extra MiB",
        "huge pages for all: ms",
    )
    yield f"| {' | '.join(heads)} | × hsv |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        if row["huge_pages_for_all"] and _twin(rows, row, False):
            continue
        default, huge = (row, _twin(rows, row, True)) if not row["huge_pages_for_all"] else (None, row)
        name = f"{row['provider']} ({row['note']})" if row["note"] else row["provider"]
        yield f"| {shape(row)} | {name} | {' | '.join((*_default_cells(default), *_huge_cells(huge)))} |"


def _twin(rows: list[Row], row: Row, huge: bool) -> Row | None:
    return find(rows, huge, **{key: row[key] for key in ("operation", "shape", "products", "mode", "provider")})


def _default_cells(row: Row | None) -> tuple[str, ...]:
    if row is None:
        return ("",) * 5
    memory = row["extra_bytes"]
    extra = "" if memory is None else f"{'≈ ' * row['extra_predicted']}{memory / 2**20:,.1f}"
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}".replace("|", "\\|"), "", "", "", extra
    spread = f"{milliseconds(row['q1_s'])}–{milliseconds(row['q3_s'])}"
    return milliseconds(row["median_s"]), spread, _times(row), _fraction(row), extra


def _huge_cells(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return (milliseconds(row["median_s"]), _times(row)) if row["status"] == "ok" else (row["status"], "")


def _times(row: Row) -> str:
    return "" if row.get("times_hsv") is None else f"{row['times_hsv']:.2f}"


def shape(row: Row) -> str:
    return ", ".join(f"{name} = {size:,}" for name, size in row["shape"].items())


def milliseconds(seconds: float) -> str:
    """Three digits."""
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(rows: list[Row]) -> Iterator[str]:
    """The rows of one run as aligned lines for a terminal."""
    cells = [("case", "mode", "provider", "ms", "quartiles", "× hsv", "of the limit", "extra MiB")]
    for row in rows:
        case = f"{row['operation']}, {shape(row)}, {row['products']}"
        cells.append((case, row["mode"], row["provider"], *_default_cells(row)))
    widths = [max(min(len(line[i]), 60) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


if __name__ == "__main__":
    main()
