"""Scalars of a run: metrics.jsonl for people and scripts, TensorBoard event files beside it."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["MetricLog", "read_metrics"]


class MetricLog:
    """Writes scalars to run_dir/metrics.jsonl, one JSON object a line, and to run_dir/tensorboard.

    A name is `group` or `group/name` (`loss/total`, `loss/simclr`, `weight/mae`, `learning_rate`): the report
    draws one chart per group. Each line is flushed when written; a value that is not finite becomes null, so
    that every line is strict JSON.

    run_dir: folder of the run, made when absent.
    resume_step: the last step whose line is kept; later lines, and a line torn by a crash, are dropped. None
        starts a new log. In a resumed run the TensorBoard curves are purged from resume_step + 1 on.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resume_step] if resume_step is not None else []
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        os.replace(partial, path)
        self._lines = path.open("a", encoding="utf-8")
        purge_step = None if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """values: numbers or 0-dim tensors by name; `step` is not a name."""
        if "step" in values:
            raise ValueError("values: got a metric named 'step'; allowed: any other name")
        row = {name: float(value) for name, value in values.items()}
        self._lines.write(_line({"step": int(step), **row}))
        self._lines.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, int(step))

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> "MetricLog":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _line(row: Mapping[str, Any]) -> str:
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl file, in order; none when it is absent. Torn lines are left out."""
    path = Path(path)
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
