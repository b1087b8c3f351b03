"""Builds the compiled libraries with CMake where that is possible; everything else is in pyproject.toml.

LUMOS_BUILD: auto (default) builds what this machine can build, and installs the Python part alone where it cannot;
cpu and cuda make every missing piece an error; off installs the Python part alone.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
NOTE = ROOT / "lumos_kernels" / "build_note.txt"
MODES = ("auto", "cpu", "cuda", "off")


def missing_pieces(mode: str) -> list[str]:
    """What the compiled part needs and this machine or environment lacks."""
    checks = {
        "a Linux x86-64 machine": (sys.platform, platform.machine()) == ("linux", "x86_64"),
        "cmake": tool("cmake"),
        "ninja": tool("ninja"),
        "a C++ compiler": shutil.which(os.environ.get("CXX", "c++").split()[0]),
        "the headers of Python": (Path(sysconfig.get_path("include")) / "Python.h").exists(),
        "pybind11": importlib.util.find_spec("pybind11"),
        "torch >= 2.11 (install it first, then use --no-build-isolation)": torch_version() >= (2, 11),
    }
    if mode == "cuda":
        checks["nvcc"] = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return [piece for piece, there in checks.items() if not there]


def torch_version() -> tuple[int, ...]:
    """Without importing torch. (0,) where it is not installed."""
    try:
        return tuple(int(part) for part in importlib.metadata.version("torch").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def tool(name: str) -> str | None:
    """The program of the environment that builds, which need not be on PATH, or the system's."""
    here = Path(sysconfig.get_path("scripts")) / name
    return str(here) if here.exists() else shutil.which(name)


def python_part_alone(reason: str) -> None:
    """Says so, in the build's output and, since pip hides that, in the installed package: lumos_kernels.library."""
    print(f"lumos-kernels: installing the Python part alone; {reason}")
    NOTE.write_text(reason + "\n", encoding="utf-8")


class CopyPython(build_py):
    """Adds the note, which is no part of the sources, to a wheel."""

    def run(self) -> None:
        super().run()
        if NOTE.exists() and not self.editable_mode:
            self.copy_file(NOTE, Path(self.build_lib) / NOTE.relative_to(ROOT))


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions. The op library carries no Python tag, the pybind11 module does."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("_ops"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        # Not self.build_temp: an editable build gets a fresh one each time, and would compile everything again.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        configure = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "CMAKE_INSTALL_PREFIX": Path(self.build_lib).resolve(),
            "Python_EXECUTABLE": sys.executable,
            "LUMOS_CUDA": {"cuda": "ON", "cpu": "OFF"}.get(MODE, "AUTO"),
        }
        options = [f"-D{name}={value}" for name, value in configure.items()]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        try:
            subprocess.check_call([tool("cmake"), "-S", ROOT, "-B", build, "-G", "Ninja", *options])
            subprocess.check_call([tool("cmake"), "--build", build, "--target", "install", "-j", jobs])
        except subprocess.CalledProcessError:
            if MODE != "auto":
                raise
            self.extensions = []
            python_part_alone("the compiled part does not build here (LUMOS_BUILD=cpu shows why)")
            return
        if self.inplace or self.editable_mode:
            self.copy_extensions_to_source()


def extensions() -> list[Extension]:
    NOTE.unlink(missing_ok=True)
    if MODE not in MODES:
        raise SystemExit(f"LUMOS_BUILD={MODE} is not one of {', '.join(MODES)}")
    if MODE == "off":
        python_part_alone("LUMOS_BUILD=off asked for it")
        return []
    missing = missing_pieces(MODE)
    if not missing:
        return [Extension("lumos_kernels._ops", sources=[]), Extension("lumos_kernels._host", sources=[])]
    if MODE == "auto":
        python_part_alone(f"the compiled part needs {', '.join(missing)}")
        return []
    raise SystemExit(f"LUMOS_BUILD={MODE} needs {', '.join(missing)}")


MODE = os.environ.get("LUMOS_BUILD", "auto")

setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "build_py": CopyPython})
