"""Everything a GPU is needed for, in two calls of 300 seconds, in order of value.

    python -m bench.gpu_suite --call 1 --out DIR                compiles, compares with fp64, tunes, measures, profiles
    python -m bench.gpu_suite --call 2 --out DIR2 --with DIR    tests, JIT rivals, frames, long steps

DIR gets at most eight files: suite.json and suite.md, which are replaced after each item, log.txt, tuned.py, ncu.txt.
Call 2 may run at once on the same machine, or later on another one with the same code: it takes the table that call 1
tuned, and its result holds both calls. `--dry-run` exercises a call on a CPU at small sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import proof, suite


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.splitlines()[0])
    result.add_argument("--call", type=int, choices=sorted(suite.CALLS), required=True)
    result.add_argument("--seconds", type=float, default=suite.SECONDS, help="for the whole call")
    result.add_argument("--out", type=Path, required=True, help="folder of the results")
    result.add_argument(
        "--with", "--before", dest="before", type=Path, help="folder of the other call's results, of the same code"
    )
    result.add_argument(
        "--rivals-site", type=Path, help="folder of the rivals' libraries, for the process that needs them"
    )
    result.add_argument("--commit", help="of the code under test, where there is no git to ask")
    result.add_argument("--dry-run", action="store_true", help="on the CPU at small sizes: that it works, no figure")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 where every item of the call is ok."""
    options = parser().parse_args(arguments)
    before = options.before.resolve() if options.before else None
    try:
        call = suite.Call(
            options.call,
            options.out.resolve(),
            options.seconds,
            dry_run=options.dry_run,
            commit=options.commit,
            before=before,
            rivals_site=options.rivals_site,
        )
    except ValueError as error:
        parser().error(str(error))
    result = call.run()
    print((call.out / "suite.md").read_text(encoding="utf-8"))
    print("Entries of dispatch.PROVEN that this supports (python -m bench.gpu.proof commits the result by its name):")
    print("\n".join(proof.conclusion(result["verdicts"], "suite.json")))
    return 0 if all(item["status"] == "ok" for item in call.items.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
