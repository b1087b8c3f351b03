"""`python -m bench [op ...]`: measures a selection of the registry and writes a report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from bench import environment, measure, registry, report


def parser() -> argparse.ArgumentParser:
    default = Path(__file__).with_name("results")
    result = argparse.ArgumentParser(prog="python -m bench", description="Time ops against their rivals.")
    result.add_argument("ops", nargs="*", metavar="op", help=f"all by default: {', '.join(registry.ops())}")
    result.add_argument("--cases", metavar="GLOB", help='over op/size/dtype/pass, or from the size on: "1B-256p*"')
    result.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's CPU threads")
    result.add_argument("--seconds", type=float, default=5.0, help="timing of a case, all contestants together")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--no-memory", action="store_true", help="leave peak memory out: no child processes")
    result.add_argument("--out", type=Path, default=default, help="folder of the report (bench/results)")
    result.add_argument("--list", action="store_true", help="print the cases and their contestants, measure nothing")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        cases = registry.select(options.ops, options.cases or ("*" if options.list else None))
    except ValueError as error:
        parser().error(str(error))
    if options.list:
        for case in cases:
            names = [c.name for c in registry.ops()[case.op].contestants(case, options.device)]
            print(f"{case.key}{' (slow)' if case.slow else ''}: {', '.join(names)}")
        return 0
    if not cases:
        parser().error(f"no case matches {options.cases!r}; --list prints them")
    return measure_and_write(cases, options)


def measure_and_write(cases: Sequence[registry.Case], options: argparse.Namespace) -> int:
    """1 if one of ours failed or computed something wrong, else 0. The report is written anyway, after every case."""
    where = environment.record(options.device, options.threads)
    settings = {"ops": options.ops, "cases": options.cases, "seconds": options.seconds}
    records, wrong = [], 0
    # A training step's peak says more than its forward's, and each peak takes a process of seconds.
    trained = [dataclasses.replace(case, backward=False) for case in cases if case.backward]
    for case in tqdm(cases, disable=not sys.stderr.isatty()):
        with_memory = not options.no_memory and (case.backward or case not in trained)
        rows = measure.measure_case(case, options.device, options.seconds, options.threads, with_memory, tolerant=True)
        wrong += sum(row.status in ("wrong", "failed") for row in rows if row.role == registry.OURS)
        records.append(report.case_record(case, rows))
        files = report.write(options.out, where, settings, records)
    print(report.markdown({"environment": where, "cases": records}))
    print("\n".join(str(file) for file in files), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
