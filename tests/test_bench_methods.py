"""The table of methods, on made-up rows: nothing is trained here."""

import json
from pathlib import Path

import pytest

from bench import methods
from bench.methods import Row

ORIGIN = {"cpu": "A CPU", "commit": "abc1234", "date": "2026-01-02T03:04:05+00:00"}
ORIGIN |= {"torch": "2.15", "threads": 1, "jobs": 2}


def row(name: str, length: str, knn: float, *, seconds: float = 60.0, **fields: object) -> Row:
    figures = {"pool": "mean", "untrained": 0.3, "spread": 0.5, "rank": 30.0, "steps": 1000, "images_per_second": 100.0}
    losses = {name: (3.0, 2.0), "total": (1.0, 0.7)}
    given = {**figures, "losses": losses, "knn": knn, "seconds": seconds, **fields}
    return Row(name, length, f"hsv pretrain {name} {length}", ORIGIN, **given)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "methods.md"
    path.write_text("# Methods\n\n<!-- figures: -->\nolder tables\n")
    monkeypatch.setattr(methods, "PAGE", path)
    monkeypatch.setattr(methods, "JSON", tmp_path / "methods.json")
    return path


def line(page: Path, name: str) -> str:
    return next(text for text in page.read_text().splitlines() if text.startswith(f"| {name} |"))


def test_a_row_joins_those_of_earlier_calls(page: Path) -> None:
    methods.write(row("mae", "10 minutes", 0.36))
    methods.write(row("simclr", "10 minutes", 0.38))
    assert "36.0 % (mean) | 30.0 % | +6.0" in line(page, "mae")
    assert "38.0 % (mean)" in line(page, "simclr")
    assert "2026-01-02 abc1234" in line(page, "simclr")
    assert page.read_text().startswith("# Methods\n\n<!-- figures: -->\n")
    assert "older tables" not in page.read_text()


def test_a_row_takes_the_place_of_its_method_and_length(page: Path) -> None:
    for knn in (0.36, 0.37):
        methods.write(row("mae", "10 minutes", knn))
    (kept,) = json.loads(methods.JSON.read_text())["rows"]
    assert kept["knn"] == 0.37


def test_the_longest_run_of_a_method_is_shown(page: Path) -> None:
    methods.write(row("mae", "10 minutes", 0.36, seconds=600))
    methods.write(row("mae", "3 minutes", 0.35, seconds=180))
    assert "36.0 %" in line(page, "mae")
    assert len(json.loads(methods.JSON.read_text())["rows"]) == 2


def test_hybrids_stand_beside_their_parts_of_the_same_length(page: Path) -> None:
    methods.write(row("simclr", "10 minutes", 0.38, seconds=600))
    methods.write(row("simclr", "3 minutes", 0.34, seconds=180))
    methods.write(row("simclr+mae fixed own", "3 minutes", 0.35, seconds=180))
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
    methods.write(row("mae", "10 minutes", **fields))
    assert verdict in line(page, "mae")


def test_a_failure_keeps_its_row(page: Path) -> None:
    methods.write(Row("dino", "10 minutes", "hsv pretrain", ORIGIN, "ValueError: a | b"))
    methods.write(row("dino", "3 minutes", 0.36, seconds=180))
    assert "failed: ValueError: a / b" in line(page, "dino")
    methods.write(row("dino", "12 minutes", 0.36, seconds=720))
    assert "36.0 %" in line(page, "dino")
