"""The plots of NT-Xent against N."""

from collections.abc import Iterator
from pathlib import Path

from bench.plots import Series, line_plot
from bench.results import Row


def figures(slug: str, rows: list[Row], folder: Path) -> Iterator[str]:
    """Writes the plots to folder/speed and gives the lines of Markdown that show them."""
    (folder / "speed").mkdir(parents=True, exist_ok=True)
    for products in ("float32", "bfloat16"):
        chosen = [r for r in rows if (r["operation"], r["products"]) == ("nt_xent", products)]
        both = [r for r in chosen if r["mode"] == "both" and not r["huge_pages_for_all"]]
        memory = series_of(both, "extra_bytes", 2**-20)
        available = ("available memory", chosen[0]["memory_bytes"] / 2**20) if chosen else None
        for name, title, unit, series, ceiling in (
            ("time", "time, forward and backward", "ms", series_of(both, "median_s", 1e3), None),
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


def series_of(rows: list[Row], field: str, unit: float, size: str = "N") -> list[Series]:
    """A line for each provider against shape[size]; predicted memory apart, and with the times where none suffices."""
    series = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == provider]
        known = [row for row in own if row.get(field)]
        predicted = [row for row in known if field == "extra_bytes" and row["extra_predicted"]]
        drawn = [row for row in predicted if row[field] < 4 * row["memory_bytes"]]  # beyond, the plot is all axis
        series.append(
            Series(
                provider,
                [(row["shape"][size], unit * row[field]) for row in known if row not in predicted],
                [(row["shape"][size], unit * row[field]) for row in drawn],
                [row["shape"][size] for row in own if row["status"] == "out of memory" and field == "median_s"],
            )
        )
    return series


def _limit_series(rows: list[Row]) -> list[Series]:
    """hsv with and without the exponentials, and eager for comparison; both modes."""
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
