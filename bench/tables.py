"""Rows as tables, of Markdown and for a terminal."""

from collections.abc import Iterator

from bench.results import Row, without_build


def describe(row: Row) -> str:
    """One line: device, instruction set, threads, versions, commit, settings."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in row["versions"].items())
    gpu = "" if row["device"] == row["cpu"] else f" with {row['cpu']}"
    return (
        f"{row['device']}{gpu}, {row['isa']}, {row['threads']} threads, {without_build(row['system'])}; {versions}; "
        f"commit {row['commit']}{' with uncommitted changes' if row['dirty'] else ''}, {str(row['date'])[:10]}; "
        f"transparent huge pages: {row['transparent_huge_pages']}"
    )


def find(rows: list[Row], huge: bool, **wanted: object) -> Row | None:
    """The row of one setting whose fields are as wanted."""
    for row in rows:
        if row["huge_pages_for_all"] == huge and all(row[name] == value for name, value in wanted.items()):
            return row
    return None


def fraction(row: Row, bold_below: float = 0) -> str:
    """Share of the machine's limit; one below `bold_below` is said to be missed."""
    if row.get("fraction") is None:
        return "–"
    text = f"{row['fraction']:.0%}"
    if row["limit"] == "arithmetic":
        text += f" ({row['fraction_products']:.0%} products alone)"
    return f"**{text}, missed**" if row["fraction"] < bold_below else text


def tables(rows: list[Row]) -> Iterator[str]:
    """A folded table for each operation, type of products and mode."""
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
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}".replace("|", "\\|"), "", "", "", _extra(row)
    spread = f"{milliseconds(row['q1_s'])}–{milliseconds(row['q3_s'])}"
    return milliseconds(row["median_s"]), spread, _times(row), fraction(row), _extra(row)


def _extra(row: Row) -> str:
    if row["extra_bytes"] is None or row["status"] == "out of memory":
        return ""
    return f"{'≈ ' * row['extra_predicted']}{row['extra_bytes'] / 2**20:,.1f}"


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
