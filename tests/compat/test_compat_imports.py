"""hsv_kernels.compat needs nothing but what hsv_kernels needs."""

import ast
import sys
from pathlib import Path

import pytest

import hsv_kernels.compat

FILES = sorted(Path(hsv_kernels.compat.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_imports_none_of_the_originals(file: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= {"torch", "numpy", "hsv_kernels"}
