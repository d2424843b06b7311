"""Builds hsv_kernels._C with CMake and Ninja.

Environment: HSV_BUILD=0 installs without compiled code; HSV_BUILD_CUDA=auto|1|0 chooses csrc/cuda (auto: when nvcc is
found); CXX names the C++ compiler; HSV_BUILD_TYPE is CMake's build type (Release where it is not set);
HSV_CMAKE_ARGS is appended to CMake's command line.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        compiler = find_compiler()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={os.environ.get('HSV_BUILD_TYPE', 'Release')}",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DHSV_BUILD_CUDA={os.environ.get('HSV_BUILD_CUDA', 'auto')}",
            f"-DHSV_MODULE_DIR={target.parent}",
            *shlex.split(os.environ.get("HSV_CMAKE_ARGS", "")),
        ]
        run(configure, build)
        run(["cmake", "--build", str(build)], build)


def find_compiler() -> str:
    """Path of a C++ compiler, or an exit with one sentence."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return path
    sys.exit(
        f"hsv needs a C++17 compiler and found none ({', '.join(names)}): install g++ or clang++, name one in CXX, "
        "or set HSV_BUILD=0 to install without compiled code."
    )


def run(command: list[str], build: Path) -> None:
    """Runs one CMake step; a failure ends in one sentence under its output."""
    if subprocess.run(command, cwd=build).returncode:
        sys.exit(f"hsv: `{' '.join(command[:3])} …` failed; its output above says why.")


if os.environ.get("HSV_BUILD", "1") == "0":
    print(
        "hsv: HSV_BUILD=0, installing without compiled code; CPU tensors use the reference operations.",
        file=sys.stderr,
    )
    setup()
else:
    setup(ext_modules=[Extension("hsv_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
