"""Which runs bench.methods makes, what is known of each, and bench/results/methods.json, which keeps it."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from bench.paths import RESULTS
from hsv.config import METHODS, load_config

IMAGES, K = 10_000, 20
JSON = RESULTS / "methods.json"
FIXED = "--weighting.kind fixed"
HYBRIDS = {
    "simclr+mae learned shared": "",
    "simclr+mae learned own": " --mae.view own",
    "simclr+mae fixed shared": f" {FIXED}",
    "simclr+mae fixed own": f" {FIXED} --mae.view own",
}
"""Weights learned or fixed at 1; mae's view shared with simclr or its own."""
RUNS = {name: f"--preset {name}-32" for name in METHODS}
RUNS |= {name: f"--preset small-32 --objectives simclr,mae{words}" for name, words in HYBRIDS.items()}


@dataclass
class Run:
    """What is known of a run; accuracies as fractions of 1, times in seconds of training."""

    name: str
    length: str
    command: str
    origin: dict[str, Any]
    failure: str | None = None
    pool: str | None = None
    knn: float | None = None
    untrained: float | None = None
    spread: float | None = None
    rank: float | None = None
    losses: dict[str, tuple[float, float]] | None = None
    steps: int | None = None
    seconds: float | None = None
    images_per_second: float | None = None


def preset_digest(name: str) -> str:
    """Of a run's preset with all that it leaves to the defaults, the settings of other methods left out."""
    methods = name.split()[0].split("+")
    config = load_config(preset=RUNS[name].split()[1]).to_dict()
    own = {key: value for key, value in config.items() if key not in METHODS or key in methods}
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]


def kept() -> list[Run]:
    """The newest run of each name and length."""
    return [Run(**one) for one in json.loads(JSON.read_text())["rows"]] if JSON.is_file() else []


def keep(run: Run) -> None:
    """Add a run to the results, in the place of one of the same name and length."""
    runs = {(one.length, one.name): one for one in [*kept(), run]}
    found = [asdict(runs[key]) for key in sorted(runs, key=lambda key: (key[0], list(RUNS).index(key[1])))]
    every = {"images": IMAGES, "k": K, "rows": found}
    JSON.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n")
