"""Carries the other libraries' wheels to a GPU machine without a network: downloads them here, unpacks them there.

    python tools/rivals.py download --out .whl               here: pinned, for Python 3.12 on Linux, in .whl/1, .whl/2
    python tools/rivals.py unpack --site /tmp/rivals .whl/1  there, each folder that travelled, at once or call by call

A folder and the working tree together stay below --limit MiB, which is what one call carries. .whl/1 has every wheel
but one: Liger and CCE run with it alone. QuACK, FlashAttention-4 and cudnn.flex_attention are written in CuTe DSL and
need nvidia-cutlass-dsl-libs-cu13 too. That one is larger than a call: it is compressed again with xz, cut into pieces
that fill the folders, and joined by unpack once all of them arrived. What the wheels need besides (torch, triton,
numpy, einops, protobuf, cuda-bindings, typing-extensions) must be installed there. unpack needs the standard library
alone.

The unpacked folder is for `python -m bench.gpu_suite --rivals-site DIR`. bench/rivals_site.py says why it must not be
on the PYTHONPATH of a whole run. tools/gpu_commands.py prints the commands of such a run.
"""

from __future__ import annotations

import argparse
import io
import itertools
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import rivals_site  # noqa: E402

# By value: what a gate names first. Versions whose signatures bench/rivals_*.py were written for.
WHEELS = (
    "liger-kernel==0.8.5",
    "quack-kernels==0.6.5",
    "flash-attn-4==4.0.0b36",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cudnn-frontend==1.32.0",
    "cut-cross-entropy==25.1.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
)
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# The large library repeats code over all of its 226 MiB. A window of that size makes 50 MiB of it, the usual one 60.
FILTERS = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 2**28}]
PIECE = re.compile(r"(?P<name>.+)\.tar\.xz\.(?P<number>\d+)of(?P<count>\d+)$")
MIB = 2**20
CALL_MIB = 64.0  # what one call carries, the working tree included
HEADERS = MIB  # of an archive: 512 bytes or two for each file
GROWTH = 3 * MIB  # what the tree may gain before the folders must be packed again


def download(folder: Path) -> list[Path]:
    """Download the wheels and return them in the order of WHEELS."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    options += [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "-d", str(folder), *WHEELS]
    subprocess.run(command, check=True)
    found = {wheel_of(path.name): path for path in folder.glob("*.whl")}
    return [found[wheel] for wheel in WHEELS]


def wheel_of(name: str) -> str:
    """Return "project==version" of a wheel's file name or of a piece's."""
    project, version = name.split("-")[:2]
    return f"{project.replace('_', '-').lower()}=={version}"


def tree_bytes(root: Path = ROOT) -> int:
    """Return the bytes of the working tree that each call carries: the tracked files, and what git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split("\0")
    return sum((root / name).lstat().st_size for name in set(names) if name and (root / name).is_file())


def pack(wheels: Sequence[Path], out: Path, limit: int) -> list[Path]:
    """Put the wheels into out/1, out/2, ... of at most `limit` bytes each and return these folders.

    A wheel above the limit comes last, compressed again, in pieces: the first fills the folder that is begun.
    """
    for old in [*out.glob("[0-9]*/*.whl"), *out.glob("[0-9]*/*.tar.xz.*")]:
        old.unlink()
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
        cuts = [0, *range(room or limit, len(content), limit), len(content)]
        pieces = [content[begin:end] for begin, end in itertools.pairwise(cuts)]
        for number, piece in enumerate(pieces):
            put(f"{wheel.name}.tar.xz.{number}of{len(pieces)}", piece)
    return folders


def recompressed(wheel: Path) -> bytes:
    """Return a wheel's files as tar, compressed by xz with the filter for x86 code: 50 MiB instead of 88.

    That takes minutes and 3 GB of memory, so the result is kept beside the wheel.
    """
    kept = wheel.with_name(f"{wheel.name}.tar.xz")
    if not kept.exists() or kept.stat().st_mtime < wheel.stat().st_mtime:
        kept.write_bytes(_recompress(wheel))
    return kept.read_bytes()


def _recompress(wheel: Path) -> bytes:
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


def folders(out: Path) -> list[Path]:
    """Return out/1, out/2, ... as far as they hold something."""
    numbered = [path for path in out.glob("[0-9]*") if path.name.isdigit() and any(path.iterdir())]
    return sorted(numbered, key=lambda path: int(path.name))


def absent(out: Path) -> list[str]:
    """Return the wheels of WHEELS that the folders do not hold, or not in all their pieces."""
    names = [file.name for folder in folders(out) for file in folder.iterdir()]
    whole = {wheel_of(name) for name in names if name.endswith(".whl")}
    pieces: dict[str, set[int]] = {}
    counts: dict[str, int] = {}
    for piece in filter(None, map(PIECE.fullmatch, names)):
        pieces.setdefault(wheel_of(piece["name"]), set()).add(int(piece["number"]))
        counts[wheel_of(piece["name"])] = int(piece["count"])
    joined = {wheel for wheel, count in counts.items() if pieces[wheel] == set(range(count))}
    return [wheel for wheel in WHEELS if wheel not in whole | joined]


def unfit(names: Sequence[str], python: str) -> list[str]:
    """Return the wheels among the files that are for another Python than e.g. "3.12"."""
    tag = f"cp{python.replace('.', '')}"
    tags = {name: name.split(".whl")[0].split("-")[-3:-1] for name in names if ".whl" in name}
    return sorted(name for name, (own, abi) in tags.items() if own.startswith("cp") and tag != own and abi != "abi3")


def unpack(folders: Sequence[Path], site: Path) -> list[str]:
    """Unpack wheels and pieces into site. Returns what is still incomplete: name and the pieces that are here."""
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
    """Unpack every archive whose pieces are complete and remove them."""
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


def _download(options: argparse.Namespace) -> int:
    tree = tree_bytes()
    limit = int(options.limit * MIB) - tree - HEADERS - GROWTH
    if limit < MIB:
        print(f"the working tree of {tree / MIB:.1f} MiB leaves no room below {options.limit:.0f}", file=sys.stderr)
        return 1
    for folder in pack(download(options.out / "wheels"), options.out, limit):
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"{folder}: {size / MIB:.1f} MiB, {(size + tree) / MIB:.1f} with the working tree")
        print("".join(f"  {file.stat().st_size / MIB:5.1f} {file.name}\n" for file in sorted(folder.iterdir())), end="")
    return 0


def _unpack(options: argparse.Namespace) -> int:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    for name in unfit([file.name for folder in options.folders for file in folder.iterdir()], python):
        print(f"for another Python than {python}: {name}", file=sys.stderr)
    for line in unpack(options.folders, rivals_site.packages(options.site)):
        print(f"incomplete: {line}", file=sys.stderr)
    print(
        f"python -m bench.gpu_suite --rivals-site {options.site.resolve()} gives the process that times rivals, alone,"
    )
    print(f"PYTHONPATH={':'.join(map(str, rivals_site.paths(options.site)))}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/rivals.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    here = commands.add_parser("download")
    here.add_argument("--out", type=Path, default=Path(".whl"))
    here.add_argument("--limit", type=float, default=CALL_MIB, help="MiB a call carries, the working tree included")
    there = commands.add_parser("unpack")
    there.add_argument("folders", nargs="+", type=Path)
    there.add_argument("--site", type=Path, required=True)
    options = parser.parse_args(arguments)
    return _download(options) if options.command == "download" else _unpack(options)


if __name__ == "__main__":
    sys.exit(main())
