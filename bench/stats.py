"""Statistics of interleaved rounds."""

import statistics
from collections.abc import Sequence
from math import log


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median and third quartile; of a single value three times that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, second, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, second, third


def quotient(numerators: Sequence[float | None], denominators: Sequence[float | None]) -> float:
    """Median of the quotients of the rounds in which both have a value: what slows a round slows both of its parts."""
    pairs = zip(numerators, denominators, strict=True)
    return statistics.median(a / b for a, b in pairs if a is not None and b is not None)


def growth(sizes: Sequence[float], values: Sequence[float], size: float) -> float | None:
    """The value at `size` of c · sizeᵖ through the last two points, p the nearest integer, at most 2.

    None for fewer than two points. Nothing here grows faster than a matrix of the rows: more is noise of small sizes.
    """
    if len(sizes) < 2 or min(values[-2:]) <= 0:
        return None
    power = min(2, round(log(values[-1] / values[-2]) / log(sizes[-1] / sizes[-2])))
    return values[-1] * (size / sizes[-1]) ** power
