"""Line plots as SVG, without a library: one unit of y against sizes, both on logarithmic axes unless said."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 200, 40, 50
COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#d68910", "#7d3c98", "#6e2c00", "#839192")


@dataclass
class Series:
    """Points (x, y) of one provider; `predicted` are drawn hollow, `missing` are x where no memory suffices."""

    name: str
    points: list[tuple[float, float]]
    predicted: list[tuple[float, float]] = field(default_factory=list)
    missing: list[float] = field(default_factory=list)


@dataclass
class Axis:
    """Maps values to pixels, along a logarithm or straight from 0."""

    low: float
    high: float
    begin: float
    end: float
    logarithmic: bool = True

    def __call__(self, value: float) -> float:
        if self.logarithmic:
            share = (log10(value) - log10(self.low)) / (log10(self.high) - log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    *,
    share: bool = False,
    ceiling: tuple[str, float] | None = None,
) -> str:
    """An SVG document.

    With `share` y starts at 0 % and is not logarithmic. A cross on the upper edge marks what is out of memory;
    `ceiling` is a name and a value of y, drawn as a horizontal line.
    """
    sizes = sorted({x for s in series for x in (*(p[0] for p in (*s.points, *s.predicted)), *s.missing)})
    values = [y for s in series for _, y in (*s.points, *s.predicted)]
    x = Axis(sizes[0] / 1.2, sizes[-1] * 1.2, LEFT, WIDTH - RIGHT)
    if share:
        low, high = 0, max(1, ceil(5 * max(values)) / 5)
    else:
        low, high = 10 ** floor(log10(min(values))), 10 ** ceil(log10(max(values) * 1.001))
    y = Axis(low, high, HEIGHT - BOTTOM, TOP, logarithmic=not share)
    body = [*_frame(title, x_label, y_label, x, y, sizes, share)]
    for number, one in enumerate(series):
        body += _line(one, COLOURS[number % len(COLOURS)], x, y, number)
    if any(one.missing for one in series):
        body.append(_text(WIDTH - RIGHT + 12, _legend(len(series)), "× out of memory", size=11))
    if ceiling and low < ceiling[1] < high:
        height = y(ceiling[1])
        body.append(_path(f"M{x.begin} {height:.1f}H{x.end}", "#555555", dash="6 3"))
        body.append(_text(x.begin + 6, height - 5, ceiling[0], size=11))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def _frame(title: str, x_label: str, y_label: str, x: Axis, y: Axis, sizes: Sequence[float], share: bool) -> list[str]:
    centre = (x.begin + x.end) / 2
    parts = [
        _text(LEFT, 22, title, size=15),
        _text(centre, HEIGHT - 10, x_label, anchor="middle"),
        _text(18, TOP - 14, y_label),
    ]
    for size in sizes:
        parts.append(_text(x(size), y.begin + 18, f"{size:,.0f}", anchor="middle"))
        parts.append(_path(f"M{x(size):.1f} {y.begin}V{y.end}", "#eeeeee"))
    for value, label in _marks(y, share):
        parts.append(_text(x.begin - 8, y(value) + 4, label, anchor="end"))
        parts.append(_path(f"M{x.begin} {y(value):.1f}H{x.end}", "#dddddd"))
    return parts


def _marks(y: Axis, share: bool) -> Iterator[tuple[float, str]]:
    """Values on the y axis and their labels: every 20 %, or every power of ten."""
    if share:
        yield from ((percent / 100, f"{percent} %") for percent in range(0, round(100 * y.high) + 1, 20))
        return
    for power in range(round(log10(y.low)), round(log10(y.high)) + 1):
        yield 10.0**power, f"{10.0**power:,.0f}" if power >= 0 else f"{10.0**power:g}"


def _line(series: Series, colour: str, x: Axis, y: Axis, number: int) -> list[str]:
    points = [(x(a), y(b)) for a, b in series.points]
    predicted = [(x(a), y(b)) for a, b in series.predicted]
    parts = []
    if points:
        parts.append(_path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), colour, 2))
    if points and predicted:
        dashed = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in (points[-1], *predicted))
        parts.append(_path(dashed, colour, 1.5, dash="4 4"))
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in points]
    parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="white" stroke="{colour}"/>' for a, b in predicted]
    for size in series.missing:
        a, b = x(size) + 5 * (number % 7 - 3), y.end + 8
        parts.append(_path(f"M{a - 4:.1f} {b - 4}l8 8m0 -8l-8 8", colour, 2))
    parts.append(_path(f"M{WIDTH - RIGHT + 12} {_legend(number) - 4}h16", colour, 3))
    parts.append(_text(WIDTH - RIGHT + 34, _legend(number), series.name, size=11))
    return parts


def _legend(number: int) -> int:
    return TOP + 10 + 18 * number


def _path(d: str, colour: str, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width}"{dashed}/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
