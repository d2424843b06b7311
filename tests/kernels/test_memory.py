"""Fresh outputs of several MiB are advised to be huge pages, unless HSV_HUGE_PAGES=0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsv_kernels.backends import compiled_module

ROOT = Path(__file__).parents[2]

SCRIPT = """
import re, sys, torch
from pathlib import Path
from hsv_kernels import gather_tokens

rows = int(sys.argv[1])
ids = torch.arange(rows)[None]
out = gather_tokens(torch.ones(1, 1, 1).expand(1, rows, 1024), ids, backend="cpu")
assert out.eq(1).all()
middle = out.data_ptr() + out.numel() * 2
for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
    begin, end = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
    if begin <= middle < end:
        print("hg" in re.search("VmFlags:(.*)", mapping)[1].split())
"""


@pytest.mark.skipif(isinstance(compiled_module(), str), reason="needs hsv_kernels._C")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without huge pages")
@pytest.mark.parametrize(("rows", "setting", "advised"), [(9000, None, True), (9000, "0", False), (1000, None, False)])
def test_large_outputs_are_advised(rows: int, setting: str | None, advised: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "THP_MEM_ALLOC_ENABLE": "0"}
    environment.pop("HSV_HUGE_PAGES", None)
    if setting is not None:
        environment["HSV_HUGE_PAGES"] = setting
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(rows)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(advised)], result.stderr
