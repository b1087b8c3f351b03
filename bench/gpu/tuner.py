"""The item that tunes: attention's tuner writes its table in place, and later processes import that table.

`python -m lumos_kernels.frame_attention.triton.tune --minutes M --out FILE` measures for at most M minutes and writes
its table after each kernel, as Python source; `--dry-run` lists what it would try.
"""

from __future__ import annotations

import ast
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench.gpu import results
from bench.gpu.compile_ahead import CANDIDATES
from bench.gpu.processes import run_bounded, tail

if TYPE_CHECKING:
    from bench.gpu.worker import Run

MODULE = "lumos_kernels.frame_attention.triton.tune"
SPARE = 6  # seconds of its share for its start and the candidate that is under way at its end


def find(run: Run) -> None:
    """Record the table that the tuner left in the package, and a copy of it among the results."""
    table, log = results.TUNED, run.work / "tune.log"
    earlier = table.read_text(encoding="utf-8")
    run["module"], run["before"] = MODULE, results.table_digest()
    try:
        run["status"] = run_bounded(command(run.dry_run, run.left() - SPARE), run.left() - 1, log)
    finally:
        run["log"] = tail(log)
        if not is_table(table):  # cut off while it was written
            table.write_text(earlier, encoding="utf-8")
            run["restored"] = True
        shutil.copyfile(table, run.out / results.TABLE)
        run["after"], run["table"] = results.table_digest(), tail(table, 20000)


def command(dry_run: bool, seconds: float) -> list[str]:
    """Return the tuner's command, for the models' head sizes and few candidates of each kernel."""
    base = [sys.executable, "-m", MODULE]
    if dry_run:
        return [*base, "--dry-run"]
    options = ["--candidates", str(CANDIDATES), "--head-dims", "64,128"]
    return [*base, "--minutes", f"{max(seconds, 1) / 60:.3f}", "--out", str(results.TUNED), *options]


def is_table(file: Path) -> bool:
    """Return whether the file is Python with a table of configurations."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return False
    names = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return {"CONFIGS", "FUSED_BACKWARD"} <= names
