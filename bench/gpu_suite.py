"""Everything a GPU is needed for, in one command, in order of value, each part bounded in time.

    python -m bench.gpu_suite --minutes 9 --out DIR

Each part runs in a process of its own and writes DIR/parts/<part>.json as it goes; DIR/suite.json and DIR/suite.md hold
all of them and are rewritten after each part, so that nothing is lost when the last ones do not finish.
`--resume` leaves out what is finished, `--dry-run` exercises all of it on a CPU at small sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import proof, summary
from bench.gpu.parts import PARTS, run_part
from bench.gpu.suite import Suite


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.splitlines()[0])
    result.add_argument("--minutes", type=float, default=9.0, help="for all parts together")
    result.add_argument("--out", type=Path, required=True, help="folder of suite.json and suite.md")
    result.add_argument("--work", type=Path, help="folder of the parts' own files (OUT/parts)")
    result.add_argument("--parts", help=f"comma separated, of {', '.join(part.name for part in PARTS)}")
    result.add_argument("--resume", action="store_true", help="leave out the parts that are finished in --work")
    result.add_argument("--dry-run", action="store_true", help="on the CPU at small sizes: that it works, no figure")
    result.add_argument("--commit", help="of the code under test, where there is no git to ask")
    result.add_argument("--part", help=argparse.SUPPRESS)  # in this process: one part, started by the suite
    result.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every part that ran is ok."""
    options = parser().parse_args(arguments)
    work = (options.work or options.out / "parts").resolve()
    if options.part:
        run_part(options.part, work, options.seconds, options.dry_run)
        return 0
    names = [name.strip() for name in options.parts.split(",")] if options.parts else None
    unknown = set(names or ()) - {part.name for part in PARTS}
    if unknown:
        parser().error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(part.name for part in PARTS)}")
    parts = [part for part in PARTS if names is None or part.name in names]
    suite = Suite(options.out.resolve(), work, 60 * options.minutes, options.dry_run, options.commit)
    try:
        result = suite.run(parts, resume=options.resume)
    except ValueError as error:
        parser().error(str(error))
    print(summary.markdown(result))
    print("Entries of dispatch.PROVEN that this supports (python -m bench.gpu.proof commits the result by its name):")
    print("\n".join(proof.conclusion(result["verdicts"], "suite.json")))
    return 0 if all(part["status"] == "ok" for part in result["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
