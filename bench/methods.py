"""Trains each method's 32-pixel preset, and a hybrid beside its parts, at equal wall time; writes docs/methods.md.

    python -m bench.methods --data CIFAR10 [--methods simclr,mae] [--minutes 5 | --steps 500] [--threads 1 --jobs 2]

Each run is a process of its own in runs/methods/<length>/<name>. An interrupted call goes on where it was, and what is
done there stays: remove the folder to measure anew. A run that failed keeps its row, with the reason, and is tried
again by the next call. --minutes become steps by a rehearsal, so leave the machine to the runs.
bench/results/methods.json keeps the newest run of each name and length; bench.methods_page makes the tables of it.
Both are written after each run.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from bench import methods_page
from bench.methods_runs import IMAGES, RUNS, K, Run, keep, preset_digest
from bench.paths import ROOT
from bench.results import origin
from hsv.checkpoint import find_checkpoint
from hsv.config import load_config
from hsv.data import Source, open_source
from hsv.evaluate.features import extract_features
from hsv.evaluate.knn import knn_accuracy
from hsv.evaluate.run import untrained_encoder
from hsv.export import load_encoder
from hsv.models import Encoder
from hsv.monitor import effective_rank, feature_spread, read_metrics

ORIGIN = "origin.json"  # in a run's folder


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
            for run in pool.map(lambda name: finish(options, name), names):
                keep(run)
                methods_page.main()
                failed |= run.failure is not None
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            return 130
    return int(failed)


def finish(options: argparse.Namespace, name: str) -> Run:
    """Train and measure a run, or what is left of it; what is known of it lies in its folder afterwards."""
    folder, run = _folder(options, name), _finished(options, name)
    if run and not run.failure:
        return run
    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    if not find_checkpoint(folder):
        (folder / ORIGIN).write_text(json.dumps(_origin(options, name)))
    failure = train(options, name)
    if failure is None:
        done = _process(options, [sys.executable, "-m", "bench.methods", *_arguments(options), "--measure", name])
        if not done.returncode:
            run = Run(**json.loads(done.stdout.splitlines()[-1]))
        failure = _reason(done)
    if failure is not None:
        run = Run(name, _length(options), command(options, name), _trained_by(folder), failure)
    (folder / "row.json").write_text(json.dumps(asdict(run), indent=1) + "\n")
    print(f"{name}: {failure or f'{100 * run.knn:.1f} %'} ({time.monotonic() - begin:.0f} s)", flush=True)
    return run


def measure(options: argparse.Namespace, name: str) -> Run:
    """The figures of a run that was trained, its test images read once."""
    folder = _folder(options, name)
    encoder, metrics = load_encoder(folder), read_metrics(folder / "metrics.jsonl")
    train, test = open_source(options.data, split="train", limit=IMAGES), open_source(options.data, split="test")
    knn, features = _accuracy(encoder, train, test)
    untrained, _ = _accuracy(untrained_encoder(encoder, seed=0), train, test)
    last = metrics[-1]
    seen = last["step"] * load_config(folder / "config.yaml").run.batch_size
    return Run(
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


def _origin(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """What a run says of where it comes from."""
    here = origin()
    known = {key: here[key] for key in ("cpu", "isa", "commit", "date")}
    load = {"torch": here["versions"]["torch"], "threads": options.threads, "jobs": options.jobs}
    return known | load | {"preset": preset_digest(name)}


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
    """What trains a run, as a user would type it in the repository's root."""
    length = f"--minutes {options.minutes:g}" if options.steps is None else f"--run.steps {options.steps}"
    data = f"--data {shlex.quote(options.data)} --input.limit {IMAGES}"
    settings = "--run.checkpoint_every 100 --run.progress false"
    if options.threads == 1:
        settings = f"--input.workers 0 {settings}"  # decoding counts as part of the one thread
    output = f"--output {shlex.quote(str(_folder(options, name)))}"
    return f"OMP_NUM_THREADS={options.threads} hsv pretrain {RUNS[name]} {data} {length} {settings} {output}"


def train(options: argparse.Namespace, name: str) -> str | None:
    """Train a run by its command, or what is left of it by its folder; returns why it failed."""
    folder = _folder(options, name)
    _, _, *words = shlex.split(command(options, name))  # _process sets the threads, and this Python runs hsv
    if find_checkpoint(folder):
        words = ["pretrain", "--resume", str(folder)]
    return _reason(_process(options, [sys.executable, "-m", "hsv", *words]))


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


def _finished(options: argparse.Namespace, name: str) -> Run | None:
    path = ROOT / _folder(options, name) / "row.json"
    return Run(**json.loads(path.read_text())) if path.is_file() else None


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
