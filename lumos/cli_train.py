"""`lumos train`: a TrainConfig from a file and the command line, which wins, to a trained checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumos.options import add_options
from lumos.train.config import TrainConfig


def add_train(commands: Any) -> None:
    """Adds the subcommand to argparse's subparsers."""
    command = commands.add_parser("train", help="train a model on folders of samples")
    command.set_defaults(run=_train)
    command.add_argument("--config", type=Path, metavar="FILE", help="options in YAML or JSON; those given here win")
    add_options(command, TrainConfig)


def _train(config: Path | None, **options: Any) -> None:
    from lumos.train import train

    summary = train(TrainConfig.load(config, **options))
    print(
        f"{summary.steps} steps in {summary.seconds:.1f} s: loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}\n"
        f"log: {summary.log}\ncheckpoint: {summary.checkpoint}"
    )
