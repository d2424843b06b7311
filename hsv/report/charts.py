"""Line charts as inline SVG: one chart per group of metrics, drawn with the page's colours."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

__all__ = ["Series", "figure", "number"]

Series = Sequence[tuple[float, float]]  # (step, value), values may be None or not finite

WIDTH, HEIGHT = 420, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 28
BINS = 160
COLOURS = 6  # --series-0 … of the style sheet


def number(value: float) -> str:
    """Three significant digits, without an exponent where that stays short."""
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    text = f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def figure(title: str, series: Mapping[str, Series], *, log: bool = False) -> str:
    """A <figure> with a legend and a chart of several series over the training step; "" when nothing is finite.

    More than BINS points are drawn as the mean of each bin of steps, with the range of the bin as a band. `log` asks
    for a logarithmic axis of values, which is linear all the same when a value is not positive.
    """
    binned = {name: _bin(points) for name, points in series.items()}
    binned = {name: bins for name, bins in binned.items() if len(bins)}
    if not binned:
        return ""
    everything = np.concatenate(list(binned.values()))  # [points, (step, mean, low, high)]
    x = _Axis(everything[:, 0].min(), everything[:, 0].max(), LEFT, WIDTH - RIGHT)
    low, high = everything[:, 2].min(), everything[:, 3].max()
    y = _Axis(low, high, HEIGHT - BOTTOM, TOP, log=log and low > 0, pad=True)

    marks, legend, data = [_grid(x, y)], [], {}
    for i, (name, bins) in enumerate(binned.items()):
        colour = f"style='--c:var(--series-{i % COLOURS})'"
        px, mean, bottom, top = x(bins[:, 0]), y(bins[:, 1]), y(bins[:, 2]), y(bins[:, 3])
        if (top != bottom).any():
            outline = list(zip(px, top, strict=True)) + list(zip(px, bottom, strict=True))[::-1]
            marks.append(f"<polygon class='band' {colour} points='{_points(outline)}'/>")
        line = list(zip(px, mean, strict=True))
        if len(line) > 1:
            marks.append(f"<polyline class='line' {colour} points='{_points(line)}'/>")
        else:
            marks.append(f"<circle class='dot' {colour} cx='{px[0]:.1f}' cy='{mean[0]:.1f}' r='3'/>")
        last = number(bins[-1, 1])
        legend.append(f"<li {colour}><i></i>{escape(name)} <b data-series='{escape(name)}'>{escape(last)}</b></li>")
        data[name] = [[round(float(p), 1), int(s), number(m)] for p, s, m in zip(px, *bins[:, :2].T, strict=True)]

    return (
        f"<figure class='chart'><figcaption>{escape(title)} <span class='at'></span></figcaption>"
        f"<ul class='legend'>{''.join(legend)}</ul>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)} over training steps' "
        f"data-points='{escape(json.dumps(data, separators=(',', ':')), quote=True)}'>"
        f"{''.join(marks)}<line class='cursor' y1='{TOP}' y2='{HEIGHT - BOTTOM}'/></svg></figure>"
    )


def _bin(points: Series) -> np.ndarray:
    """[bins, (step, mean, low, high)] of the finite points."""
    kept = np.array([(s, v) for s, v in points if v is not None and math.isfinite(v)], dtype=float).reshape(-1, 2)
    groups = np.array_split(kept, min(len(kept), BINS)) if len(kept) else []
    return np.array([(g[-1, 0], g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()) for g in groups]).reshape(-1, 4)


class _Axis:
    """Maps values low … high to pixels start … end, linearly or by the logarithm."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, pad: bool = False
    ) -> None:
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)
        if self.high == self.low:
            self.low, self.high = self.low - (0.5 if pad else 0), self.high + (0.5 if pad else 1)
        if pad:
            margin = 0.04 * (self.high - self.low)
            floor = 0.0 if not log and low >= 0 else -math.inf
            self.low, self.high = max(self.low - margin, floor), self.high + margin

    def __call__(self, value: np.ndarray | float) -> np.ndarray | float:
        value = np.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        """Multiples of 1, 2 or 5 times a power of ten; whole powers of ten on a logarithmic axis."""
        if self.log and self.high - self.low >= 1:
            step = max(1, math.ceil((self.high - self.low) / about))
            return [10.0**e for e in range(math.ceil(self.low), math.floor(self.high) + 1, step)]
        low, high = (10**self.low, 10**self.high) if self.log else (self.low, self.high)
        raw = (high - low) / about
        power = 10 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
        return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _grid(x: _Axis, y: _Axis) -> str:
    lines = [
        f"<line class='grid' x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y(v):.1f}' y2='{y(v):.1f}'/>"
        f"<text x='{LEFT - 6}' y='{y(v) + 4:.1f}' text-anchor='end'>{number(v)}</text>"
        for v in y.ticks(4)
    ]
    steps = [v for v in x.ticks(4) if v == int(v)]
    for v in steps:
        anchor = "end" if x(v) > WIDTH - RIGHT - 16 else "middle"
        label = f"{int(v):,}" + (" steps" if v == steps[-1] else "")
        lines.append(f"<text x='{x(v):.1f}' y='{HEIGHT - 8}' text-anchor='{anchor}'>{label}</text>")
    return "".join(lines)


def _points(pairs: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs)
