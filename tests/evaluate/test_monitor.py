import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hsv.monitor import MetricLog, effective_rank, feature_spread, read_metrics, verdicts


def test_spread_is_one_on_the_sphere_and_zero_when_collapsed() -> None:
    z = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert feature_spread(z).item() == pytest.approx(1, abs=0.02)
    assert feature_spread(z[:1].expand(100, -1)).item() == pytest.approx(0, abs=1e-6)
    assert feature_spread(z.abs() * 0 + 5 + 0.01 * z).item() < 0.05
    assert feature_spread(3 * z.double()).item() == pytest.approx(feature_spread(z).item(), rel=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_counts_equal_directions(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(64, 20, generator=torch.Generator().manual_seed(1))).Q  # [64, 20]
    basis = torch.cat([basis, -basis])[:, :rank]  # centred, orthogonal columns of equal length
    directions = torch.linalg.qr(torch.randn(20, rank, generator=torch.Generator().manual_seed(2))).Q
    assert effective_rank(basis @ directions.T + 3).item() == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_constant_features_is_zero() -> None:
    assert effective_rank(torch.ones(8, 4)).item() == 0


@pytest.mark.parametrize("measure", [feature_spread, effective_rank])
def test_one_row_does_not_vary(measure: Callable[[Tensor], Tensor]) -> None:
    assert measure(torch.ones(1, 4)).item() == 0


@pytest.mark.parametrize("measure", [feature_spread, effective_rank])
def test_measures_refuse_other_shapes(measure: Callable[[Tensor], Tensor]) -> None:
    for shape in [(4,), (0, 4), (2, 3, 4)]:
        with pytest.raises(ValueError, match="z: got shape"):
            measure(torch.zeros(shape))


def test_log_writes_one_strict_object_a_line(tmp_path: Path) -> None:
    with MetricLog(tmp_path / "run") as log:
        log.log(1, {"loss/total": torch.tensor(0.5), "learning_rate": 1e-3})
        log.log(2, {"loss/total": math.nan, "learning_rate": math.inf})
        flushed = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in flushed] == [
        {"step": 1, "loss/total": 0.5, "learning_rate": 1e-3},
        {"step": 2, "loss/total": None, "learning_rate": None},
    ]
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_resume_drops_later_and_torn_lines(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        for step in range(1, 6):
            log.log(step, {"loss/total": step})
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 6, "loss/to')
    with MetricLog(tmp_path, resume_step=3) as log:
        log.log(4, {"loss/total": 40})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/total"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_a_new_log_replaces_an_old_one(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log:
        log.log(1, {"a": 1})
    with MetricLog(tmp_path) as log:
        log.log(7, {"a": 2})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [7]
    assert read_metrics(tmp_path / "absent.jsonl") == []


def test_step_is_not_a_metric(tmp_path: Path) -> None:
    with MetricLog(tmp_path) as log, pytest.raises(ValueError, match="'step'"):
        log.log(1, {"step": 3})


def test_verdicts_are_plain_and_silent_when_all_is_well() -> None:
    well = {"feature_spread": 0.8, "effective_rank": 40.0, "loss/dino": 5.0, "loss/simsiam": -0.9}
    chances = {"dino": 8.3, "simsiam": 0.0, "mae": 1.0}
    assert verdicts(well, chances) == []
    assert verdicts(well | {"loss/dino": 8.29}, chances) == [
        "dino has not learned: its loss is 8.29, and knowing nothing gives 8.3"
    ]
    assert "feature spread 0.01" in verdicts(well | {"feature_spread": 0.01}, chances)[0]
    assert "effective rank 1.2" in verdicts(well | {"effective_rank": 1.2}, chances)[0]
    assert math.isnan(effective_rank(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
