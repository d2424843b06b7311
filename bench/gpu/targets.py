"""What the GPU kernels are held to, on an NVIDIA H200."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench.gpu.store import MEASURED
from bench.results import Row
from bench.tables import milliseconds

TARGET_DEVICE = "NVIDIA H200"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    """A bound on a measure of hsv's row: "fraction" and "times" from below, "seconds" and "gib" from above.

    `against` names the provider whose time over hsv's is meant by "times".
    """

    operation: str
    shape: dict[str, int]
    mode: str
    measure: str
    bound: float
    against: str = "hsv"

    @property
    def work(self) -> str:
        return ", ".join([self.operation, *(f"{name} = {size:,}" for name, size in self.shape.items()), "bfloat16"])

    @property
    def wanted(self) -> str:
        return {
            "fraction": f"≥ {self.bound:.0%} of the limit",
            "times": f"≥ {self.bound:g} × {self.against}",
            "seconds": f"≤ {milliseconds(self.bound)} ms",
            "gib": f"≤ {self.bound:g} GiB more memory",
        }[self.measure]


def _targets() -> Iterator[Target]:
    yield Target("nt_xent", {"M": 8192, "D": 128}, "both, graph", "seconds", 0.12e-3)
    for m in (32768, 131072):
        shape = {"M": m, "D": 128}
        yield Target("nt_xent", shape, "both", "fraction", 0.6)
        yield Target("nt_xent", shape, "both", "times", 8, "eager")
        yield Target("nt_xent", shape, "both", "times", 3, "torch.compile")
    yield Target("nt_xent", {"M": 1 << 20, "D": 128}, "both", "gib", 3)
    for operation in ("random_masking + gather_patches", "masked_mse"):
        for mode in ("forward", "backward"):
            yield Target(operation, {"B": 4096, "px": 224}, mode, "fraction", 0.8)
    for mode in ("forward", "backward"):
        yield Target("distillation_loss", {"N": 32, "crops": 10, "K": 65_536}, mode, "fraction", 0.8)


TARGETS = list(_targets())


def verdict(target: Target, rows: list[Row]) -> str:
    """What was measured, bold where it misses; without a number, why there is none."""
    row = find(target, target.against, rows)
    if row is None:
        return NOT_MEASURED
    if row["status"] != "ok":
        return f"{target.against}: {row['status']}"
    value = {
        "fraction": row.get("fraction"),
        "times": row.get("times_hsv"),
        "seconds": row["median_s"],
        "gib": None if row.get("extra_bytes") is None else row["extra_bytes"] / 2**30,
    }[target.measure]
    if value is None:
        return NOT_MEASURED
    met = value >= target.bound if target.measure in ("fraction", "times") else value <= target.bound
    text = {
        "fraction": f"{value:.0%}",
        "times": f"{value:.1f} ×",
        "seconds": f"{milliseconds(value)} ms",
        "gib": f"{value:.2f} GiB",
    }[target.measure]
    return f"{text}, met" if met else f"**{text}, missed**"


def find(target: Target, provider: str, rows: list[Row]) -> Row | None:
    wanted = (target.operation, target.shape, "bfloat16", target.mode, provider)
    return next((row for row in rows if tuple(row[field] for field in MEASURED) == wanted), None)


def slower_than_compiled(rows: list[Row]) -> list[Row]:
    """Rows of torch.compile that took less time than hsv in the same rounds."""
    return [row for row in rows if row["status"] == "ok" and (row.get("times_hsv") or 1) < 1]
