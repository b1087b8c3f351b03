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

SITE, BEFORE = "/tmp/rivals", "/tmp/gpu-suite-1"  # on the GPU machine, outside the tree
OUT = Path("gpu-suite")  # here; git ignores it
TUNED = "lumos_kernels/frame_attention/triton/tuned.py"
COMMAND_CHARACTERS, FILES_BACK = 2000, 8


@dataclass(frozen=True)
class Call:
    """One call of the machine: its title, the folders it carries beside the working tree, and its one command."""

    title: str
    carry: tuple[Path, ...]
    command: str


def unpack_command(folder: Path) -> str:
    """Return the command that unpacks a folder of wheels on the machine."""
    return f"python3 tools/rivals.py unpack --site {SITE} {folder}"


def suite_command(call: int, seconds: float, commit: str, *options: str) -> str:
    """Return the suite's command for a call. The machine has no git to ask for the commit."""
    parts = ["python3 -m bench.gpu_suite", f"--call {call}", f"--seconds {seconds:g}", '--out "$OUT"']
    return " ".join([*parts, f"--commit {commit}", *options])


def keep_command(source: str) -> str:
    """Return the command that keeps the result of call 1 where call 2 looks for it."""
    return f"mkdir -p {BEFORE} && cp -r {source}/. {BEFORE}"


def calls(folders: Sequence[Path], seconds: float, commit: str) -> list[Call]:
    """Return the calls in their order.

    Call 1 imports nothing foreign. It carries the last folder, which is of no use alone, and leaves that and its own
    result for call 2, should the machine be kept. Otherwise one short call brings both to the new machine. Call 2
    carries the first folder: Liger and CCE run with that one alone.
    """
    first, *others = folders
    last, middle = tuple(others[-1:]), others[:-1]
    bring = [unpack_command(folder) for folder in last]
    one = [*bring, suite_command(1, seconds, commit), "code=$?", keep_command('"$OUT"'), "exit $code"]
    again = [*bring, keep_command(str(OUT / "1"))]
    two = suite_command(2, seconds, commit, f"--before {BEFORE}", f"--rivals-site {SITE}")
    return [
        Call("Call 1", last, "; ".join(one)),
        Call("Before call 2, if the machine was given back", (*last, OUT / "1"), "; ".join(again)),
        *(Call(f"Before call 2, for {folder}", (folder,), unpack_command(folder)) for folder in middle),
        Call("Call 2, within half a minute of the last one", (first,), f"{unpack_command(first)}; {two}"),
    ]


def bytes_of(folders: Sequence[Path]) -> int:
    """Return the bytes of the files in the folders; none where there is no such folder yet."""
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())


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
        carried = "".join(f"{folder} ({bytes_of([folder]) / MIB:.1f} MiB) and " for folder in call.carry)
        total = f"{(bytes_of(call.carry) + tree) / MIB:.1f} of {options.limit:g} MiB"
        lines += ["", f"# {call.title}: carry {carried}the working tree ({tree / MIB:.1f} MiB), {total}", call.command]
        if call.title.startswith("Call"):
            lines.append(f"# At most {FILES_BACK} files come back from $OUT: put them into {OUT}/{call.title[5]}.")
    lines += [
        "",
        "# Afterwards. The result of call 2 holds call 1; the table that call 1 tuned enters the sources as a file.",
        f"cp {OUT}/1/tuned.py {TUNED}",
        f"python -m bench.gpu.proof {OUT}/2/suite.json",
        "# Commit the table, the two files below bench/results/ that the last command names, and the entries of PROVEN",
        "# that it prints, in lumos_kernels/dispatch.py. A kernel that changes later needs a new run.",
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
