"""Memory of the compiled CPU kernels: huge pages under large outputs, an error where there is not enough."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hsv_kernels.backends import compiled_module
from tests.kernels.cases import sanitized

ROOT = Path(__file__).parents[2]
needs_compiled = pytest.mark.skipif(isinstance(compiled_module(), str), reason="needs hsv_kernels._C")

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


@needs_compiled
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


LIMITED = """
import re, resource, sys, torch
from pathlib import Path
from hsv_kernels import distillation_loss, masked_mse, sinkhorn_centre

torch.set_num_threads(1)
logits, side = torch.zeros(1, 1 << 22).expand(16, -1), 6000
image, pred = torch.empty(1, 1, 1, side).expand(-1, -1, side, -1), torch.empty(1, 1, side * side)
operations = {
    "distillation_loss": lambda: distillation_loss(logits, logits, backend="cpu"),
    "sinkhorn_centre": lambda: sinkhorn_centre(logits, 0.1, iterations=2, backend="cpu"),
    "masked_mse": lambda: masked_mse(pred, image, torch.ones(1, 1), side, backend="cpu"),
}
in_use = int(re.search(r"VmSize:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (in_use + (128 << 20), -1))
try:
    operations[sys.argv[1]]()
except MemoryError:
    print("MemoryError")
"""


@needs_compiled
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(sanitized(), reason="a sanitizer takes all addresses")
@pytest.mark.parametrize("operation", ["distillation_loss", "sinkhorn_centre", "masked_mse"])
def test_memory_that_is_not_there_is_an_error(operation: str) -> None:
    """Each works in 256 MiB of its own or more, where the process may have 128."""
    result = subprocess.run([sys.executable, "-c", LIMITED, operation], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "MemoryError\n"), result.stderr
