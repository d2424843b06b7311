"""Compares two result files: what got slower.

    python -m bench.check [--base FILE] [--new FILE] [--tolerance 0.15]

hsv is compared by its speed against eager in the same rounds or, where eager was not timed, by its share of the limit
that was measured in the same rounds: the machine's mood on either day takes no part. By default the two newest files of
the device that was measured last. Exits with 1 when something is slower by more than the tolerance.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.paths import RESULTS
from bench.results import Row, newest, read
from bench.tables import describe, shape

TOLERANCE = 0.15  # medians of interleaved rounds of one commit differ by up to so much on a shared machine

Key = tuple[str, str, str, str, bool]  # operation, shape, products, mode, huge pages for all


@dataclass(frozen=True)
class Change:
    """hsv's measure of one case in both files; None where the newer file has none or not the case."""

    case: str
    measure: str  # "× eager" or "of the limit"
    base: float
    new: float | None

    def slower(self, tolerance: float) -> bool:
        return self.new is None or self.new < self.base * (1 - tolerance)

    def faster(self, tolerance: float) -> bool:
        return self.new is not None and self.base < self.new * (1 - tolerance)

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.case}: {self.base:.2f} {self.measure}, and no longer measured"
        return f"{self.case}: {self.base:.2f} → {self.new:.2f} {self.measure} ({self.new / self.base - 1:+.0%})"


def compare(base: list[Row], new: list[Row]) -> list[Change]:
    """The cases of `base` in which hsv was timed, by a measure that both files have."""
    after = _measures(new)
    changes = []
    for key, before in _measures(base).items():
        now = after.get(key, {})
        if measure := next((m for m in before if m in now), next(iter(before), None)):
            changes.append(Change(_title(key), measure, before[measure], now.get(measure)))
    return changes


def _measures(rows: list[Row]) -> dict[Key, dict[str, float]]:
    """Case → {measure: value}, the preferred measure first; empty where hsv could not be timed."""
    found: dict[Key, dict[str, float]] = {}
    eager = {_key(row): row for row in rows if row["provider"] == "eager"}
    for row in rows:
        if row["provider"] != "hsv":
            continue
        key = _key(row)
        values = {"× eager": eager.get(key, {}).get("times_hsv"), "of the limit": row.get("fraction")}
        found[key] = {name: value for name, value in values.items() if value is not None and row["status"] == "ok"}
    return found


def _key(row: Row) -> Key:
    return row["operation"], shape(row), row["products"], row["mode"], row["huge_pages_for_all"]


def _title(key: Key) -> str:
    *parts, huge = key
    return ", ".join((*parts, *(["huge pages for all"] if huge else [])))


def report(changes: list[Change], tolerance: float) -> Iterator[str]:
    for name, chosen in (
        ("slower", [c for c in changes if c.slower(tolerance)]),
        ("faster", [c for c in changes if c.faster(tolerance)]),
    ):
        yield f"{len(chosen)} of {len(changes)} cases {name} by more than {tolerance:.0%}{':' if chosen else ''}"
        yield from (f"  {change}" for change in chosen)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, help="older results; default: the newest file of the device but one")
    parser.add_argument("--new", type=Path, help="newer results; default: the newest file of the device")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="share by which a case may be slower")
    options = parser.parse_args(arguments)
    base_path, new_path = _chosen(options.base, options.new)
    base, new = read(base_path), read(new_path)
    for name, path, rows in (("base", base_path, base), ("new ", new_path, new)):
        print(f"{name} {path}\n     {describe(rows[0])}")
    for field in ("device", "threads", "isa"):
        if base[0][field] != new[0][field]:
            sys.exit(f"the files differ in {field}: {base[0][field]} and {new[0][field]}")
    if base[0]["versions"]["torch"] != new[0]["versions"]["torch"]:
        print("the files differ in PyTorch's version, and so in what eager takes")
    changes = compare(base, new)
    print("\n".join(report(changes, options.tolerance)))
    return int(any(change.slower(options.tolerance) for change in changes))


def _chosen(base: Path | None, new: Path | None) -> tuple[Path, Path]:
    """What is named, and the newest files of one device for what is not."""
    if base and new:
        return base, new
    folders = [path for path in RESULTS.glob("*") if newest(path)] if RESULTS.exists() else []
    folder = (
        (base or new).parent if base or new else max(folders, key=lambda p: read(newest(p)[0])[0]["date"], default=None)
    )
    files = [path for path in newest(folder) if path not in (base, new)] if folder else []
    if len(files) < 2 - bool(base) - bool(new):
        sys.exit(f"two result files of one device are needed under {RESULTS}; name them with --base and --new")
    new = new or files.pop(0)
    return base or files[0], new


if __name__ == "__main__":
    sys.exit(main())
