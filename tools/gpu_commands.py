"""Prints the commands of a GPU run on a bare machine without a network, in order, after checking what they need.

    python tools/gpu_commands.py [--wheels .whl] [--limit 64] [--python 3.12] [--seconds 300]

Such a machine gets a copy of the working tree and of the folders that a call carries, runs one command in the tree's
root and returns what the command wrote to the folder $OUT. It may be kept for half a minute after a call; whatever was
written outside the tree then serves the next one. The tool ends with 1 where something is missing or too large.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import rivals
from rivals import CALL_MIB, HEADERS, MIB, PYTHON, ROOT

SITE = "/tmp/rivals"  # on the GPU machine, outside the tree
OUT = "gpu-suite"  # here: git ignores it
COMMAND_CHARACTERS, FILES_BACK = 2000, 8


@dataclass(frozen=True)
class Call:
    """One call of the machine: its title, the folder it carries (None: the tree alone) and its one command."""

    title: str
    carry: Path | None
    command: str


def unpack_command(folder: Path) -> str:
    """Return the command that unpacks a folder of wheels on the machine."""
    return f"python3 tools/rivals.py unpack --site {SITE} {folder}"


def suite_command(call: int, seconds: float, commit: str, *options: str) -> str:
    """Return the suite's command for a call. The machine has no git to ask for the commit."""
    parts = ["python3 -m bench.gpu_suite", f"--call {call}", f"--seconds {seconds:g}", '--out "$OUT"']
    return " ".join([*parts, f"--commit {commit}", *options])


def calls(folders: Sequence[Path], seconds: float, commit: str) -> list[Call]:
    """Return the calls in their order.

    Call 1 imports nothing foreign. It carries the last folder, which is of no use alone, and leaves it unpacked for
    call 2, should the machine be kept. Call 2 carries the first folder: Liger and CCE run with that one alone.
    """
    first, *others = folders
    carried = others[-1:] or [None]
    one = suite_command(1, seconds, commit)
    two = f"{unpack_command(first)}; {suite_command(2, seconds, commit, '--rivals-site', SITE)}"
    found = [Call("Call 1", carried[0], "; ".join([*map(unpack_command, others[-1:]), one]))]
    found += [Call(f"Between the calls: {path}", path, unpack_command(path)) for path in others[:-1]]
    again = [
        Call(f"Before call 2, if the machine was given back: {path}", path, unpack_command(path))
        for path in others[-1:]
    ]
    return [*found, *again, Call("Call 2, within half a minute of the last one", first, two)]


def bytes_of(folder: Path | None) -> int:
    """Return the bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir()) if folder else 0


def git(*arguments: str) -> str:
    """Return what git prints about the working tree."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def problems(wheels: Path, planned: Sequence[Call], limit_mib: float, python: str) -> list[str]:
    """Return what would make a call fail: wheels, sizes, the version of Python, an unclean tree, a long command."""
    names = [file.name for folder in rivals.folders(wheels) for file in folder.iterdir()]
    found = [f"{wheel} is not in {wheels}, or not whole" for wheel in rivals.absent(wheels)]
    found += [f"{name} is for another Python than {python}" for name in rivals.unfit(names, python)]
    if wheels.is_absolute():
        found.append(f"{wheels} must be a path inside the working tree: the commands name it on the machine")
    tree = rivals.tree_bytes()
    for call in planned:
        total = tree + bytes_of(call.carry) + HEADERS
        if total > limit_mib * MIB:
            found.append(f"{call.title}: {total / MIB:.1f} MiB are more than {limit_mib:g}")
        if len(call.command) > COMMAND_CHARACTERS:
            found.append(f"{call.title}: a command of {len(call.command)} characters")
    changed = git("status", "--porcelain").splitlines()
    if changed:
        found.append(f"the working tree differs from the commit in {len(changed)} files: {changed[0].strip()}, ...")
    return found


def text(wheels: Path, planned: Sequence[Call], options: argparse.Namespace) -> str:
    """Return the commands as text, each with what it carries and brings back."""
    tree = rivals.tree_bytes()
    lines = [
        "# Beforehand, with a network",
        f"python tools/rivals.py download --out {wheels} --limit {options.limit:g}",
        f"python tools/gpu_commands.py --wheels {wheels} --limit {options.limit:g}    # this text, for the new folders",
    ]
    for call in planned:
        size = bytes_of(call.carry)
        carried = f"{call.carry} ({size / MIB:.1f} MiB) and " if call.carry else ""
        total = f"{(size + tree) / MIB:.1f} of {options.limit:g} MiB"
        lines += ["", f"# {call.title}: carry {carried}the working tree ({tree / MIB:.1f} MiB), {total}", call.command]
    lines += [
        "",
        f"# Afterwards. At most {FILES_BACK} files of a call come back from $OUT: put them into {OUT}/1 and {OUT}/2.",
        f"python -m bench.gpu.proof {OUT}/1/suite.json",
        f"python -m bench.gpu.proof {OUT}/2/suite.json",
        "# Commit what they name: the two files of each result below bench/results/, and the entries of PROVEN in",
        "# lumos_kernels/dispatch.py. A change of a kernel or of its tuned configurations needs a new run.",
        "",
        "# The rivals' packages",
        f"# unpack fills {SITE}. The suite's --rivals-site {SITE} puts it on the PYTHONPATH of the process that times",
        "# rivals and of no other, by bench/rivals_site.py. Elsewhere FlashAttention-4 would make impl=flash join the",
        "# tests and the sanitizer. Rivals that compile at their first call (Contestant.jit) run last, at gate shapes.",
        "# QuACK, FlashAttention-4 and cudnn.flex_attention need every folder unpacked on the same machine.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/gpu_commands.py", description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=Path(".whl"), help="what `tools/rivals.py download` filled")
    parser.add_argument("--limit", type=float, default=CALL_MIB, help="MiB a call carries, the working tree included")
    parser.add_argument("--python", default=PYTHON, help="version of python3 on the GPU machine")
    parser.add_argument("--seconds", type=float, default=300.0, help="of each call")
    options = parser.parse_args(arguments)
    folders = rivals.folders(options.wheels)
    if not folders:
        print(f"problem: {options.wheels} holds no folder of wheels", file=sys.stderr)
        print(f"python tools/rivals.py download --out {options.wheels} --limit {options.limit:g}")
        return 1
    planned = calls(folders, options.seconds, git("rev-parse", "HEAD"))
    found = problems(options.wheels, planned, options.limit, options.python)
    print(text(options.wheels, planned, options))
    for problem in found:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
