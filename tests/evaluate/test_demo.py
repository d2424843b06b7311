import re
import runpy
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "examples" / "digits_demo.py"


def test_the_demo_ends_with_table_speed_checkpoint_and_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main = runpy.run_path(str(DEMO))["main"]
    assert main(["--steps", "2", "--output", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for row in ("raw pixels", "untrained encoder (mean pooling)", "trained encoder (mean pooling)"):
        assert re.search(rf"^{re.escape(row)} +\d+\.\d +\d+\.\d ± \d+\.\d +\d+\.\d$", out, re.M)
    speed, checkpoint, report = (
        re.search(rf"^{name} +(\S+)", out, re.M)[1] for name in ("images/s", "checkpoint", "report")
    )
    assert float(speed.replace(",", "")) > 0
    assert Path(checkpoint).is_file() and Path(report).read_text().startswith("<!doctype html>")
