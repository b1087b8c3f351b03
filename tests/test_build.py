"""Installing: with and without a compiler, from the sdist, and what the compiled libraries may depend on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lumos_kernels import library

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("csrc", "lumos", "lumos_kernels")

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="there is no source checkout here")
needs_library = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))

USE_WITHOUT_LIBRARY = """
import torch
import lumos_kernels
from lumos_kernels import library, mm_rope

q, positions = torch.ones(2, 1, 32), torch.zeros(3, 2, dtype=torch.int32)
assert not library.OPS_FILE.exists(), library.OPS_FILE
mm_rope(q, q, positions)
try:
    mm_rope(q, q, positions, impl="native")
except ValueError as error:
    print(error)
"""


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the sources alone: setuptools writes into the tree that it builds."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return copy


def python(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120
    )


@needs_sources
@pytest.mark.skipif(
    library.OPS_FILE.parent != ROOT / "lumos_kernels"
    or (sys.platform, platform.machine()) != ("linux", "x86_64")
    or not (shutil.which("cmake") and shutil.which("c++")),
    reason="the library cannot be built here",
)
def test_the_library_is_there_where_it_can_be_built():
    """Every other test of native code skips without it, and a skip is not a pass."""
    assert library.refusal() is None


@needs_sources
def test_python_part_alone(checkout, tmp_path):
    """LUMOS_BUILD=off installs a package that imports, computes, and says why impl="native" cannot run."""
    target = tmp_path / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-compile")
    installed = python(*pip, "--target", str(target), ".", cwd=checkout, LUMOS_BUILD="off")
    assert installed.returncode == 0, installed.stderr
    assert not list(target.rglob("*.so"))
    used = python("-c", USE_WITHOUT_LIBRARY, cwd=tmp_path, PYTHONPATH=str(target))
    assert used.returncode == 0, used.stderr
    assert "impl='native' cannot run here: the compiled library is not installed: LUMOS_BUILD=off asked" in used.stdout


@needs_sources
@pytest.mark.parametrize(
    ("mode", "code", "message"),
    [
        ("auto", 0, "installing the Python part alone; the compiled part needs a C++ compiler"),
        ("cpu", 1, "LUMOS_BUILD=cpu needs a C++ compiler"),
        ("all", 1, "LUMOS_BUILD=all is not one of auto, cpu, cuda, off"),
    ],
)
def test_a_missing_compiler(checkout, mode, code, message):
    asked = python("setup.py", "--quiet", "--name", cwd=checkout, LUMOS_BUILD=mode, CXX="no-such-compiler")
    lines = (asked.stdout + asked.stderr).splitlines()
    assert asked.returncode == code
    assert sum(message in line for line in lines) == 1, lines


@needs_sources
def test_the_sdist_can_be_built_from(checkout, tmp_path):
    build = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    made = python("-c", build, str(tmp_path), cwd=checkout, LUMOS_BUILD="off")
    assert made.returncode == 0, made.stderr
    with tarfile.open(tmp_path / made.stdout.split()[-1]) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(path.relative_to(checkout)) for path in (checkout / "csrc").rglob("*") if path.is_file()}
    assert wanted | set(SOURCES) <= packed


def symbols(path: Path, *options: str) -> list[str]:
    return subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout.splitlines()


@needs_library
@pytest.mark.skipif(not shutil.which("nm"), reason="binutils is not installed")
def test_the_op_library_uses_the_stable_abi_alone():
    """No symbol of Python or of torch's C++ (at::, c10::, torch::): one file serves every version from 2.11 on."""
    undefined = symbols(library.OPS_FILE, "-D", "--undefined-only")
    assert any("aoti_torch" in symbol for symbol in undefined)
    assert not [symbol for symbol in undefined if any(part in symbol for part in (" _Py", " Py", "N2at", "3c10"))]


def kernel_objects() -> list[Path]:
    """The object files of the CPU kernels: one for each op, or shared room, and instruction set. Skips without a build.

    Objects of sources that are gone, which a build folder keeps, do not count.
    """
    objects = [
        path
        for path in (ROOT / "build").glob("cmake-*/CMakeFiles/lumos_cpu.dir/csrc/*/*.cpp.o")
        if path.name != "isa.cpp.o" and (ROOT / "csrc" / path.parent.name / path.name.removesuffix(".o")).exists()
    ]
    if not list((ROOT / "build").glob("cmake-*")):
        pytest.skip("no build folder here")
    return objects


@pytest.mark.skipif(not shutil.which("nm"), reason="binutils is not installed")
def test_kernels_share_no_code_between_instruction_sets():
    """A function that two of these files could define lets the linker keep the copy that this CPU cannot run."""
    objects = kernel_objects()
    assert {path.name.removesuffix(".cpp.o").rpartition("_")[2] for path in objects} == {"base", "avx2", "avx512"}
    for path in objects:
        assert not [line for line in symbols(path, "-C", "--defined-only") if line.split()[1] in "WwuV"], path


@pytest.mark.skipif(not shutil.which("objdump"), reason="binutils is not installed")
def test_tiles_are_used_where_they_are_meant_to_be():
    """AMX instructions in the one file that the CPU is asked about before it runs, from configuration to release."""
    objects = kernel_objects()
    assert any(path.parent.name == "frame_attention" and path.name == "amx_avx512.cpp.o" for path in objects)
    wanted = {"ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"}
    for path in objects:
        code = subprocess.run(["objdump", "-d", str(path)], check=True, capture_output=True, text=True).stdout
        found = set(re.findall(r"\b(?:\w*tile(?:cfg|zero|load|store|release)\w*|tdp\w+)\b(?=\s|$)", code))
        assert found == (wanted if path.name == "amx_avx512.cpp.o" else set()), path
        assert "%tmm" not in code or found, path
