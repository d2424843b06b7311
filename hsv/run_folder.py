"""The folder of a run: whose it is, and which files could not be read."""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from hsv.checkpoint import find_checkpoint, read_checkpoint
from hsv.config import Config

__all__ = ["claim_run_folder", "name_failures"]


def claim_run_folder(config: Config, resume: bool) -> dict | None:
    """Settle `config.output` and return the checkpoint to go on from, if any."""
    if resume:
        return _checkpoint_to_resume(config.output)
    if config.output is None:
        name = re.sub(r"[^\w.-]+", "-", Path(config.data).name).strip("-.") or "run"
        config.output = broadcast_object_list([f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"])[0]
    if Path(config.output).is_file():
        raise ValueError(f"output: got {config.output!r}, which is a file; allowed: a folder, made when absent")
    if find_checkpoint(config.output):
        raise ValueError(f"output: got {config.output!r}, which holds a run; allowed: another folder, or to resume it")
    return None


def _checkpoint_to_resume(output: str | None) -> dict:
    if output is None:
        raise ValueError("output: got None; allowed: the folder of the run to resume")
    configured = Path(output) / "config.yaml"
    if configured.is_file() and find_checkpoint(output) is None:
        anew = shlex.join(["hsv", "pretrain", "--config", str(configured), "--output", output])
        raise ValueError(
            f"resume: got {output!r}, a run that was stopped before it saved anything; allowed: a run with a "
            f"checkpoint. This one begins anew with: {anew}"
        )
    return read_checkpoint(output)


def name_failures(run_dir: Path, failures: dict[str, str]) -> None:
    """Append to failures.jsonl the files that it does not name yet, with the reasons."""
    path = run_dir / "failures.jsonl"
    known = {json.loads(line)["name"] for line in path.read_text().splitlines()} if path.exists() else set()
    lines = [json.dumps({"name": n, "reason": r}) + "\n" for n, r in failures.items() if n not in known]
    if lines:
        with path.open("a") as file:
            file.writelines(lines)
