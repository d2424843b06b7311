"""Builds hsv_kernels._C in its place with what is on the machine; nothing is fetched or installed."""

import importlib.util
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from bench.gpu.child import run
from bench.paths import ROOT
from hsv_kernels.backends import compiled_module


def find_nvcc() -> str | None:
    """Path of CUDA's compiler: of CUDACXX, on PATH, or under CUDA_HOME and /usr/local."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    names = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def missing() -> list[str]:
    """What the build needs and does not find."""
    found = {
        "setuptools": importlib.util.find_spec("setuptools"),
        "pybind11": importlib.util.find_spec("pybind11"),
        "cmake": shutil.which("cmake", path=_path()),
        "ninja": shutil.which("ninja", path=_path()),
        "a C++ compiler": next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "c++"))), None),
    }
    return [name for name, where in found.items() if not where]


def build(seconds: float) -> list[str]:
    """Builds what is older than its sources, and says what will be left out for want of it; empty if nothing is."""
    notes = [] if find_nvcc() else ["nvcc was not found: the CUDA C++ kernels are neither built, tested nor timed"]
    if up_to_date():
        return notes
    if lacking := missing():
        return [*notes, f"the extension is not built: {', '.join(lacking)} missing; Triton's kernels do without"]
    print("Building hsv_kernels._C", flush=True)
    environment = {"PATH": _path()} | ({"CUDACXX": nvcc} if (nvcc := find_nvcc()) else {})
    code = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], seconds, environment)
    if code != 0:
        how = "ended for want of time" if code is None else "failed, see above"
        return [*notes, f"the build of hsv_kernels._C {how}: kernels in C++ and CUDA C++ are left out"]
    return notes


def up_to_date() -> bool:
    """Whether this Python's module is newer than its sources and has, where nvcc is there, the CUDA kernels."""
    modules = [path for suffix in EXTENSION_SUFFIXES if (path := ROOT / "hsv_kernels" / f"_C{suffix}").exists()]
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    newest = max(path.stat().st_mtime for path in sources)
    compiled_module.cache_clear()  # what was not there before an earlier part may have been built since
    importlib.invalidate_caches()
    complete = not find_nvcc() or getattr(compiled_module(), "has_cuda", False)
    return complete and any(module.stat().st_mtime > newest for module in modules)


def _path() -> str:
    """PATH, with the tools that are installed beside this Python first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
