"""The table of methods, on made-up runs: nothing is trained here."""

import argparse
import json
import shlex
import subprocess
from pathlib import Path

import pytest

from bench import methods, methods_page, methods_runs
from bench.methods_runs import Run

ORIGIN = {"cpu": "A CPU", "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00"}
ORIGIN |= {"torch": "2.15", "threads": 1, "jobs": 2}


def run(name: str, length: str, knn: float, *, seconds: float = 60.0, **fields: object) -> Run:
    figures = {"pool": "mean", "untrained": 0.3, "spread": 0.5, "rank": 30.0, "steps": 1000, "images_per_second": 100.0}
    losses = {name: (3.0, 2.0), "total": (1.0, 0.7)}
    given = {"origin": ORIGIN, **figures, "losses": losses, "knn": knn, "seconds": seconds, **fields}
    return Run(name, length, f"hsv pretrain {name} --data FOLDER {length}", **given)


def write(*runs: Run) -> None:
    for one in runs:
        methods_runs.keep(one)
        methods_page.main()


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "methods.md"
    path.write_text("# Methods\n\n<!-- figures: -->\nolder tables\n")
    monkeypatch.setattr(methods_page, "PAGE", path)
    monkeypatch.setattr(methods_runs, "JSON", tmp_path / "methods.json")
    return path


def line(page: Path, name: str) -> str:
    return next(text for text in page.read_text().splitlines() if text.startswith(f"| {name} |"))


def test_a_run_joins_those_of_earlier_calls(page: Path) -> None:
    write(run("mae", "10 minutes", 0.36))
    write(run("simclr", "10 minutes", 0.38))
    assert "36.0 % (mean) | 30.0 % | +6.0" in line(page, "mae")
    assert "38.0 % (mean)" in line(page, "simclr")
    assert "2026-01-02 abc1234" in line(page, "simclr")
    assert page.read_text().startswith("# Methods\n\n<!-- figures: -->\n")
    assert "older tables" not in page.read_text()


def test_a_run_takes_the_place_of_its_method_and_length(page: Path) -> None:
    for knn in (0.36, 0.37):
        write(run("mae", "10 minutes", knn))
    (kept,) = json.loads(methods_runs.JSON.read_text())["rows"]
    assert kept["knn"] == 0.37


def test_the_longest_run_of_a_method_is_shown(page: Path) -> None:
    write(run("mae", "10 minutes", 0.36, seconds=600))
    write(run("mae", "3 minutes", 0.35, seconds=180))
    assert "36.0 %" in line(page, "mae")
    assert len(json.loads(methods_runs.JSON.read_text())["rows"]) == 2


def test_hybrids_stand_beside_their_parts_of_the_same_length(page: Path) -> None:
    write(run("simclr", "10 minutes", 0.38, seconds=600))
    write(run("simclr", "3 minutes", 0.34, seconds=180))
    write(run("simclr+mae fixed own", "3 minutes", 0.35, seconds=180))
    together = page.read_text().split("### The hybrid")[1]
    assert "34.0 %" in together
    assert "35.0 %" in together
    assert "38.0 %" not in together


@pytest.mark.parametrize(
    ("fields", "verdict"),
    [
        ({"knn": 0.34}, "less than 5 points above untrained"),
        ({"knn": 0.36, "spread": 1e-6}, "collapsed"),
        ({"knn": 0.36}, "|  |"),
    ],
)
def test_what_falls_short_is_said(page: Path, fields: dict, verdict: str) -> None:
    write(run("mae", "10 minutes", **fields))
    assert verdict in line(page, "mae")


def test_a_failure_is_kept(page: Path) -> None:
    write(Run("dino", "10 minutes", "hsv pretrain --data FOLDER", ORIGIN, "ValueError: a | b"))
    write(run("dino", "3 minutes", 0.36, seconds=180))
    assert "failed: ValueError: a / b" in line(page, "dino")
    write(run("dino", "12 minutes", 0.36, seconds=720))
    assert "36.0 %" in line(page, "dino")


def test_the_calls_that_made_the_tables_are_named(page: Path) -> None:
    write(run("moco", "3 minutes", 0.36), run("swav", "500 steps", 0.36), run("mae", "3 minutes", 0.36))
    text = page.read_text()
    assert "make methods DATA=FOLDER MINUTES=3 THREADS=1 JOBS=2 METHODS=moco,mae\n" in text
    assert "make methods DATA=FOLDER STEPS=500 THREADS=1 JOBS=2 METHODS=swav\n" in text


def test_a_preset_that_changed_is_noticed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = methods_runs.preset_digest("mae")
    write(run("mae", "3 minutes", 0.36, origin=ORIGIN | {"preset": digest}), run("simclr", "3 minutes", 0.36))
    monkeypatch.setattr(methods_page, "preset_digest", lambda name: f"another than {digest}")
    write(run("moco", "3 minutes", 0.34, origin=ORIGIN | {"preset": digest}))
    assert line(page, "mae").endswith("| preset changed since |")
    assert line(page, "moco").endswith("| less than 5 points above untrained; preset changed since |")
    assert line(page, "simclr").endswith("|  |")


def test_a_digest_is_that_of_the_settings_that_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = {name: methods_runs.preset_digest(name) for name in methods_runs.RUNS}
    assert len(set(digests.values())) == len(methods_runs.METHODS) + 1  # hybrids differ in their commands alone
    config = methods_runs.load_config(preset="mae-32")
    config.mae.decoder_depth += 1
    monkeypatch.setattr(methods_runs, "load_config", lambda preset: config)
    assert methods_runs.preset_digest("mae") != digests["mae"]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_command_is_what_is_run(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def record(words: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess:
        asked.extend([f"OMP_NUM_THREADS={env['OMP_NUM_THREADS']}", *words])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", record)
    options = argparse.Namespace(data="some images", minutes=5.0, steps=None, threads=threads, jobs=1)
    assert methods.train(options, "mae") is None
    said = shlex.split(methods.command(options, "mae"))
    assert asked[4:] == said[2:] and asked[0] == said[0] and said[1] == asked[3] == "hsv"
    assert ("--input.workers" in said) == (threads == 1)
