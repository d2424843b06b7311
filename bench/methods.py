"""Trains each method's 32-pixel preset, and a hybrid beside its parts, at equal wall time; writes docs/methods.md.

    python -m bench.methods --data CIFAR10 [--methods simclr,mae] [--minutes 5 | --steps 500] [--threads 1 --jobs 2]

Each run is a process of its own in runs/methods/<length>/<name>. An interrupted call goes on where it was, and what is
done there stays: remove the folder to measure anew. A run that failed keeps its row, with the reason, and is tried
again by the next call. --minutes become steps by a rehearsal, so leave the machine to the runs.
bench/results/methods.json has the newest row of each method and length; the tables show each method's longest run, and
the hybrids of one length beside their parts. Both are written after each run.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.results import RESULTS, ROOT, origin
from hsv.checkpoint import find_checkpoint
from hsv.config import METHODS, load_config
from hsv.data import Source, open_source
from hsv.evaluate.features import extract_features
from hsv.evaluate.knn import knn_accuracy
from hsv.evaluate.run import untrained_encoder
from hsv.export import load_encoder
from hsv.models import Encoder
from hsv.monitor import collapse_verdict, effective_rank, feature_spread, read_metrics

IMAGES, K, WANTED = 10_000, 20, 0.05
PAGE, JSON, MARK = ROOT / "docs" / "methods.md", RESULTS / "methods.json", "<!-- figures:"
ORIGIN = "origin.json"  # in a run's folder
HYBRID = "--preset small-32 --objectives simclr,mae"
FIXED = "--weighting.kind fixed"
HYBRIDS = {
    "simclr+mae learned shared": HYBRID,
    "simclr+mae learned own": f"{HYBRID} --mae.view own",
    "simclr+mae fixed shared": f"{HYBRID} {FIXED}",
    "simclr+mae fixed own": f"{HYBRID} {FIXED} --mae.view own",
}
"""Weights learned or fixed at 1; mae's view shared with simclr or its own."""
RUNS = {name: f"--preset {name}-32" for name in METHODS} | HYBRIDS


@dataclass
class Row:
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


def main() -> int:
    options = _options()
    if options.measure:
        print(json.dumps(asdict(measure(options, options.measure))))
        return 0
    names = list(RUNS) if options.methods is None else options.methods.split(",")
    unknown = set(names) - set(RUNS)
    if unknown:
        raise SystemExit(f"--methods: got {', '.join(sorted(unknown))}; allowed: {', '.join(RUNS)}")
    failed = False
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for row in pool.map(lambda name: finish(options, name), names):
                write(row)
                failed |= row.failure is not None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            return 130
    return int(failed)


def finish(options: argparse.Namespace, name: str) -> Row:
    """Train and measure a run, or what is left of it; its row lies in its folder afterwards."""
    folder, row = _folder(options, name), _kept(options, name)
    if row and not row.failure:
        return row
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not find_checkpoint(folder):
        (folder / ORIGIN).write_text(json.dumps(_origin(options)))
    failure = _train(options, name)
    if failure is None:
        done = _process(options, [sys.executable, "-m", "bench.methods", *_arguments(options), "--measure", name])
        if not done.returncode:
            row = Row(**json.loads(done.stdout.splitlines()[-1]))
        failure = _reason(done)
    if failure is not None:
        row = Row(name, _length(options), command(options, name), _trained_by(folder), failure)
    (folder / "row.json").write_text(json.dumps(asdict(row), indent=1) + "\n")
    print(f"{name}: {failure or f'{100 * row.knn:.1f} %'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return row


def measure(options: argparse.Namespace, name: str) -> Row:
    """The figures of a run that was trained, its test images read once."""
    folder = _folder(options, name)
    encoder, metrics = load_encoder(folder), read_metrics(folder / "metrics.jsonl")
    train, test = open_source(options.data, split="train", limit=IMAGES), open_source(options.data, split="test")
    knn, features = _accuracy(encoder, train, test)
    untrained, _ = _accuracy(untrained_encoder(encoder, seed=0), train, test)
    last = metrics[-1]
    seen = last["step"] * load_config(folder / "config.yaml").run.batch_size
    return Row(
        name,
        _length(options),
        command(options, name),
        _trained_by(folder),
        pool=encoder.pool,
        knn=knn,
        untrained=untrained,
        spread=feature_spread(features).item(),
        rank=effective_rank(features).item(),
        losses={key.removeprefix("loss/"): _ends(metrics, key) for key in last if key.startswith("loss/")},
        steps=last["step"],
        seconds=seen / last["images_per_second"],
        images_per_second=last["images_per_second"],
    )


def _trained_by(folder: Path) -> dict[str, Any]:
    """Where a run comes from: what was there when it began, whatever has been committed since."""
    return json.loads((folder / ORIGIN).read_text())


def _origin(options: argparse.Namespace) -> dict[str, Any]:
    """What a row says of where it comes from."""
    here = origin()
    kept = {key: here[key] for key in ("cpu", "isa", "commit", "date")}
    return kept | {"torch": here["versions"]["torch"], "threads": options.threads, "jobs": options.jobs}


def _accuracy(encoder: Encoder, train: Source, test: Source) -> tuple[float, Tensor]:
    """20-NN accuracy on the test images, and their features."""
    bank, queries = (extract_features(encoder, source) for source in (train, test))
    return knn_accuracy(bank.x, bank.labels, queries.x, queries.labels, k=K), queries.x


def _ends(metrics: list[dict], key: str) -> tuple[float, float]:
    """Mean of the first and of the last few values that were logged."""
    count = max(1, min(5, len(metrics) // 2))
    first, last = ([row[key] for row in part] for part in (metrics[:count], metrics[-count:]))
    return sum(first) / count, sum(last) / count


def command(options: argparse.Namespace, name: str) -> str:
    """What a user would type."""
    length = f"--minutes {options.minutes:g}" if options.steps is None else f"--run.steps {options.steps}"
    data = f"--data {shlex.quote(options.data)} --input.limit {IMAGES}"
    return f"hsv pretrain {RUNS[name]} {data} {length} --output {shlex.quote(str(_folder(options, name)))}"


def _train(options: argparse.Namespace, name: str) -> str | None:
    """Train a run, or what is left of it; returns why it failed."""
    folder = _folder(options, name)
    words = (
        ["pretrain", "--resume", str(folder)] if find_checkpoint(folder) else shlex.split(command(options, name))[1:]
    )
    settings = ["--run.progress", "false", "--run.checkpoint_every", "100"]
    if options.threads == 1:
        settings += ["--input.workers", "0"]  # decoding counts as part of the one thread
    return _reason(_process(options, [sys.executable, "-m", "hsv", *words, *settings]))


def _process(options: argparse.Namespace, words: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


def _reason(done: subprocess.CompletedProcess) -> str | None:
    """The last line of what went wrong; None when nothing did. A run that was stopped raises KeyboardInterrupt."""
    if done.returncode < 0 or done.returncode > 128:
        raise KeyboardInterrupt
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


def _length(options: argparse.Namespace) -> str:
    return f"{options.minutes:g} minutes" if options.steps is None else f"{options.steps} steps"


def _folder(options: argparse.Namespace, name: str) -> Path:
    return Path("runs", "methods", _slug(_length(options)), _slug(name))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name)


def _kept(options: argparse.Namespace, name: str) -> Row | None:
    path = ROOT / _folder(options, name) / "row.json"
    return Row(**json.loads(path.read_text())) if path.is_file() else None


def write(row: Row) -> None:
    """Add a row to the results, in the place of one of the same method and length, and write the tables anew."""
    kept = [Row(**one) for one in json.loads(JSON.read_text())["rows"]] if JSON.is_file() else []
    rows = {(one.length, one.name): one for one in [*kept, row]}
    found = [rows[key] for key in sorted(rows, key=lambda key: (key[0], list(RUNS).index(key[1])))]
    every = {"images": IMAGES, "k": K, "rows": [asdict(one) for one in found]}
    JSON.write_text(json.dumps(every, indent=1, ensure_ascii=False) + "\n")
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("\n", text.index(MARK)) + 1] + "\n" + figures(found), encoding="utf-8")


def figures(found: list[Row]) -> str:
    """The tables, each method's longest run and the hybrids of one length, and the command of each row."""
    longest = {row.name: row for row in sorted(found, key=_seconds)}
    methods = [longest[name] for name in METHODS if name in longest]
    lengths = {row.length: [one for one in found if one.length == row.length] for row in found}
    together = max(lengths.values(), key=lambda rows: sum(row.name in HYBRIDS for row in rows), default=[])
    by_name = {row.name: row for row in together}
    hybrids = [by_name[name] for name in ("simclr", "mae", *HYBRIDS) if name in by_name]
    shown = [*methods, *hybrids]
    return "\n".join(
        [
            *dict.fromkeys(map(_machine, shown)),
            "Loss: mean of the first and of the last five logged values. Minutes: of training.",
            "",
            *table(methods),
            "",
            "### The hybrid beside its parts, at equal wall time",
            "",
            *table(hybrids),
            "",
            "### Commands",
            "",
            "```",
            *dict.fromkeys(row.command for row in shown),
            "```",
            "",
        ]
    )


def _machine(row: Row) -> str:
    where = row.origin
    threads = f"{where['threads']} thread{'s' * (where['threads'] > 1)} a run, {where['jobs']} at a time"
    return f"{where['cpu']}, {threads}, PyTorch {where['torch']}."


def _seconds(row: Row) -> float:
    """Of training: those that were asked for where a run failed, whose steps count as the longest."""
    number, unit = row.length.split()
    asked = 60 * float(number) if unit == "minutes" else math.inf
    return asked if row.failure else row.seconds


def table(found: list[Row]) -> list[str]:
    """Lines of a Markdown table."""
    heads = ("", "20-NN", "untrained", "gain", "spread", "rank", "loss", "minutes", "steps", "images/s", "measured", "")
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *map(_line, found)]


def _line(row: Row) -> str:
    if row.failure:
        return f"| {row.name} |" + " |" * 10 + f" failed: {row.failure.replace('|', '/')} |"
    gain = row.knn - row.untrained
    alone = len(row.losses) == 2
    losses = {key: ends for key, ends in row.losses.items() if key != "total"}
    shown = [f"{'' if alone else key + ' '}{first:.3g} → {last:.3g}" for key, (first, last) in losses.items()]
    verdict = collapse_verdict(spread=row.spread, rank=row.rank)
    if not verdict and gain < WANTED:
        verdict = f"less than {100 * WANTED:.0f} points above untrained"
    cells = [
        *(row.name, f"{100 * row.knn:.1f} % ({row.pool})", f"{100 * row.untrained:.1f} %", f"{100 * gain:+.1f}"),
        *(f"{row.spread:.2f}", f"{row.rank:.0f}", ", ".join(shown), f"{row.seconds / 60:.1f}", f"{row.steps:,}"),
        *(f"{row.images_per_second:,.0f}", f"{row.origin['date'][:10]} {row.origin['commit']}", verdict or ""),
    ]
    return f"| {' | '.join(cells)} |"


def _arguments(options: argparse.Namespace) -> list[str]:
    length = ["--minutes", str(options.minutes)] if options.steps is None else ["--steps", str(options.steps)]
    load = ["--threads", str(options.threads), "--jobs", str(options.jobs)]
    return ["--data", options.data, *length, *load]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="labelled images with a training and a test part")
    parser.add_argument("--methods", help="names of runs, comma-separated as in the tables; unset = all of them")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="training time of each run")
    length.add_argument("--steps", type=int, help="steps of each run instead")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
