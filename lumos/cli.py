"""The `lumos` command: tokenize clips, convert samples, train, generate, list and check the kernels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import lumos_kernels
from lumos.cli_data import add_data
from lumos.cli_generate import add_generate
from lumos.cli_train import add_export, add_train
from lumos.train.signals import EXIT_STOPPED, StoppedError
from lumos_kernels import check, env


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns its status, or 2 after printing what is wrong with the arguments or their files.

    75 (EX_TEMPFAIL) where SIGTERM or SIGINT stopped a training run: the same command goes on from its checkpoint.
    """
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        return run(**options) or 0
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lumos: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"lumos: {stopped}", file=sys.stderr)
        return EXIT_STOPPED


def _check(ops: Sequence[str] | None, impls: Sequence[str] | None, quick: bool) -> int:
    return check.check(ops or check.checkable(), impls or (), quick)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lumos", description="Train and sample Lumos-1 video models.")
    parser.add_argument("--version", action="version", version=lumos_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_data(commands)
    add_train(commands)
    add_export(commands)
    add_generate(commands)

    command = commands.add_parser("backends", help="list the kernels' implementations and what runs here")
    command.set_defaults(run=lumos_kernels.backends)

    command = commands.add_parser("check", help="compare the kernels with their references on this machine")
    check.add_arguments(command)
    command.set_defaults(run=_check)

    command = commands.add_parser("env", help="print versions, CPU, GPU, implementations and self-checks")
    command.set_defaults(run=env.env)
    return parser


if __name__ == "__main__":
    sys.exit(main())
