"""The package as it is built and installed: with a compiler, without one, and without compiled code."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hsv_kernels
from hsv_kernels.backends import compiled_module

ROOT = Path(__file__).parent.parent
needs_module = pytest.mark.skipif(isinstance(compiled_module(), str), reason="built without compiled code")


def python(*args: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *args]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)


def test_missing_compiler_is_one_sentence(tmp_path: Path) -> None:
    result = python("setup.py", "-q", "build_ext", "--build-temp", str(tmp_path), CXX="no-such-compiler")
    assert result.returncode != 0
    message = [line for line in result.stderr.splitlines() if "Warning" not in line]
    assert "needs a C++17 compiler" in message[-1]
    assert "no-such-compiler" in message[-1]
    assert "Traceback" not in result.stderr


def test_without_compiled_code_says_so_and_works(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "hsv_kernels", tmp_path / "hsv_kernels", ignore=ignore)
    script = (  # an editable install would lend its compiled module to the copy
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "import torch, hsv_kernels as k; print(k.backends())\n"
        "print('loss', float(k.nt_xent(torch.randn(4, 8), torch.randn(4, 8))))\n"
        "k.nt_xent(torch.randn(4, 8), torch.randn(4, 8), backend='cpu')"
    )
    result = python("-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="0")
    assert re.search(r"contrast +cpu +absent: .*HSV_BUILD=0", result.stdout)
    assert "loss" in result.stdout
    assert "runs its reference operation" in result.stderr
    assert "BackendError: backend 'cpu' cannot serve contrast" in result.stderr


def test_install_without_compiled_code_says_so(tmp_path: Path) -> None:
    result = python("setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), HSV_BUILD="0")
    assert result.returncode == 0, result.stderr
    assert "installing without compiled code" in result.stderr


@needs_module
def test_instruction_set_is_forced() -> None:
    for isa in compiled_module().cpu_isas():
        result = python("-c", "import hsv_kernels as k; print(k.backends())", HSV_CPU_ISA=isa)
        assert result.returncode == 0, result.stderr
        assert re.search(rf"C\+\+, {isa}$", result.stdout, re.MULTILINE)


@needs_module
def test_instruction_sets_are_those_of_this_machine() -> None:
    """The best first, and none that /proc/cpuinfo does not list the flags of."""
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
    needs = {"avx512bf16": avx512 | {"avx512_bf16"}, "avx512": avx512, "avx2": avx2, "portable": set()}
    listed = re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(listed[1].split()) if listed else set()
    supported = [isa for isa, needed in needs.items() if needed <= flags]
    found = compiled_module().cpu_isas()
    assert found == [isa for isa in supported if isa in found]
    assert {"avx512", "avx2", "portable"} & set(supported) <= set(found)


@needs_module
def test_unknown_instruction_set_is_named() -> None:
    result = python("-c", "import hsv_kernels as k; print(k.backends())", HSV_CPU_ISA="mmx")
    allowed = ", ".join(compiled_module().cpu_isas())
    assert f"HSV_CPU_ISA=mmx cannot be used on this machine; allowed: {allowed}\n" in result.stdout


@needs_module
def test_module_links_one_openmp_runtime() -> None:
    script = (
        "import torch, hsv_kernels as k\n"
        "z = torch.randn(256, 64); k.nt_xent(z, z)\n"
        "maps = open('/proc/self/maps').read()\n"
        "import re; print(sorted(set(re.findall(r'/lib(?:gomp|omp|iomp5)[^/ ]*[.]so[^ \\n]*', maps))))"
    )
    result = python("-c", script)
    assert result.returncode == 0, result.stderr
    assert len(eval(result.stdout)) == 1, result.stdout


def test_compiled_sources_know_no_torch() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".cu"):
            assert not re.search(r"#include [<\"](torch|ATen|c10)/", path.read_text()), path


@pytest.mark.skipif(
    isinstance(compiled_module(), str) or not compiled_module().has_cuda, reason="built without csrc/cuda"
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, so launches succeed")
def test_cuda_launches_without_a_driver_fail_cleanly() -> None:
    module, patches, ids, three = compiled_module(), (0,) * 7, (0, 1, 1, 1, 1), (1, 1, 1)
    problem = module.CudaReconstructionProblem(
        **{"pred": 0, "pred_dtype": 0, "pred_strides": three, "images": 0, "images_dtype": 0, "strides": patches},
        **{"shape": three, "mask": 0, "B": 1, "L": 1},
    )
    calls = {
        "cuda_masking_random_masking": (0, 0, 0, 1, 1, 1, 0, 0, 0),
        "cuda_masking_gather": (4, 0, patches, 0, *ids, 1, three, 0),
        "cuda_masking_scatter": (4, 0, three, *ids, 1, three, 0, patches),
        "cuda_masking_masked_sum": (0, 0, three, *ids, 1, 1, 0),
        "cuda_reconstruction_forward": (problem, True, 0, 0, 0),
        "cuda_reconstruction_backward": (problem, 0, 0, 0, 0),
    }
    assert calls.keys() == {name for name in dir(module) if name.startswith("cuda_")}
    for name, arguments in calls.items():
        with pytest.raises(RuntimeError, match="cannot use CUDA"):
            getattr(module, name)(0, 0, *arguments)
    with pytest.raises(hsv_kernels.BackendError, match="cuda serves cuda tensors"):
        hsv_kernels.random_masking(1, 4, num_keep=1, backend="cuda")
