"""The other libraries' wheels for a GPU machine without a network: downloads them here, unpacks them there.

    python tools/rivals.py download --out .whl              here: pinned, for Python 3.12 on Linux, in .whl/1, .whl/2
    python tools/rivals.py unpack --site /tmp/site .whl/1   there, each folder that travelled; prints the PYTHONPATH

Each folder stays below --limit MiB. .whl/1 begins with the small ones (Liger, CCE); nvidia-cutlass-dsl, which QuACK and
FlashAttention-4 need, is larger than the limit: it is compressed again with xz, cut into pieces and joined by unpack
once all of them arrived. What the wheels need besides (torch, triton, numpy, einops, protobuf, cuda-bindings,
typing-extensions) must be installed there.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

# By value. Versions whose signatures bench/rivals_*.py were written for.
WHEELS = (
    "liger-kernel==0.8.5",
    "cut-cross-entropy==25.1.1",
    "quack-kernels==0.6.5",
    "flash-attn-4==4.0.0b36",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
PIECE = re.compile(r"(?P<name>.+)\.tar\.xz\.(?P<number>\d+)of(?P<count>\d+)$")
# Folders that a .pth file of the wheels would add: PYTHONPATH entries process none.
EXTRA_PATHS = ("nvidia_cutlass_dsl/dsl_packages",)
MIB = 2**20


def download(folder: Path) -> list[Path]:
    """The wheels, by value."""
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        "3.12",
        "--implementation",
        "cp",
        "-d",
        str(folder),
    ]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *WHEELS], check=True)
    found = {path.name.split("-")[0].replace("_", "-").lower(): path for path in folder.glob("*.whl")}
    return [found[wheel.split("==")[0]] for wheel in WHEELS]


def pack(wheels: Sequence[Path], out: Path, limit: int) -> list[Path]:
    """Puts the wheels into out/1, out/2, ... of at most `limit` bytes each; those above it in compressed pieces."""
    folders: list[Path] = []
    room = 0

    def put(name: str, content: bytes) -> None:
        nonlocal room
        if len(content) > room:
            folders.append(out / str(len(folders) + 1))
            folders[-1].mkdir(parents=True, exist_ok=True)
            room = limit
        (folders[-1] / name).write_bytes(content)
        room -= len(content)

    for wheel in sorted(wheels, key=lambda path: path.stat().st_size > limit):
        if wheel.stat().st_size <= limit:
            put(wheel.name, wheel.read_bytes())
            continue
        content = recompressed(wheel)
        size = limit // 2  # two pieces a folder, the first beside the small wheels
        pieces = [content[begin : begin + size] for begin in range(0, len(content), size)]
        for number, piece in enumerate(pieces):
            put(f"{wheel.name}.tar.xz.{number}of{len(pieces)}", piece)
    return folders


def recompressed(wheel: Path) -> bytes:
    """A wheel's files as tar, compressed by xz with the filter for x86 code: a third smaller than the wheel."""
    stream = io.BytesIO()
    with (
        lzma.open(stream, "wb", filters=FILTERS) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as tar,
        zipfile.ZipFile(wheel) as source,
    ):
        for item in source.infolist():
            if not item.is_dir():
                entry = tarfile.TarInfo(item.filename)
                entry.size = item.file_size
                tar.addfile(entry, source.open(item))
    return stream.getvalue()


def packages(folder: Path) -> Path:
    """Where unpack puts packages. QuACK takes only what lies below a folder of this name for installed code, and
    refuses to be imported with a nvidia-cutlass-dsl that lies elsewhere.
    """
    return folder.resolve() / "site-packages"


def unpack(folders: Sequence[Path], site: Path) -> list[str]:
    """Unpacks wheels and pieces into site. Returns what is still incomplete: name and the pieces that are here."""
    kept = site / ".pieces"
    kept.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        for piece in folder.glob("*.tar.xz.*"):
            (kept / piece.name).write_bytes(piece.read_bytes())
    return _join(kept, site)


def _join(kept: Path, site: Path) -> list[str]:
    """Unpacks every archive whose pieces are complete and removes them."""
    archives: dict[tuple[str, int], dict[int, Path]] = {}
    for path in kept.iterdir():
        found = PIECE.fullmatch(path.name)
        if found:
            archives.setdefault((found["name"], int(found["count"])), {})[int(found["number"])] = path
    waiting = []
    for (name, count), pieces in sorted(archives.items()):
        if len(pieces) < count:
            waiting.append(f"{name}: pieces {sorted(pieces)} of {count}")
            continue
        content = b"".join(pieces[number].read_bytes() for number in range(count))
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as tar:
            tar.extractall(site, filter="data")
        for path in pieces.values():
            path.unlink()
    return waiting


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/rivals.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("download")
    here.add_argument("--out", type=Path, default=Path(".whl"))
    here.add_argument("--limit", type=float, default=40.0, help="MiB a folder")
    there = commands.add_parser("unpack")
    there.add_argument("folders", nargs="+", type=Path)
    there.add_argument("--site", type=Path, required=True)
    options = parser.parse_args(arguments)
    if options.command == "download":
        for folder in pack(download(options.out / "wheels"), options.out, int(options.limit * MIB)):
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{folder}: {size / MIB:.1f} MiB, {', '.join(sorted(file.name for file in folder.iterdir()))}")
        return 0
    site = packages(options.site)
    for line in unpack(options.folders, site):
        print(f"incomplete: {line}", file=sys.stderr)
    print(f"export PYTHONPATH={':'.join(str(path) for path in (site, *(site / extra for extra in EXTRA_PATHS)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
