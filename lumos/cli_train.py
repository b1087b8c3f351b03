"""`lumos train`: a TrainConfig from a file and the command line, which wins, to a checkpoint. `lumos export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lumos.options import add_options
from lumos.train.config import DTYPES, TrainConfig


def add_train(commands: Any) -> None:
    """Adds the subcommand to argparse's subparsers."""
    command = commands.add_parser("train", help="train a model on folders of samples")
    command.set_defaults(run=_train)
    command.add_argument("--config", type=Path, metavar="FILE", help="options in YAML or JSON; those given here win")
    add_options(command, TrainConfig)

    command = commands.add_parser("recipes", help="list the recipes of `lumos train`, or print one to copy and change")
    command.set_defaults(run=_recipes)
    command.add_argument("name", nargs="?", help="recipe to print")


def _train(config: Path | None, **options: Any) -> None:
    from lumos.train import train

    summary = train(TrainConfig.load(config, **options))
    print(
        f"{summary.steps} steps in {summary.seconds:.1f} s: loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}\n"
        f"log: {summary.log}"
    )
    if summary.checkpoint.exists():  # export none writes none
        print(f"checkpoint: {summary.checkpoint}")


def add_export(commands: Any) -> None:
    """Adds the subcommand to argparse's subparsers."""
    command = commands.add_parser("export", help="write the weights of a run's checkpoint in the official layout")
    command.set_defaults(run=_export)
    command.add_argument("checkpoint", help="a run's folder, for its newest, or a step-* folder of its state")
    command.add_argument("--out", required=True, help="folder of the official layout, made or replaced")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default float32)")


def _export(checkpoint: str, out: str, dtype: str) -> None:
    from lumos.train.export import export

    print(f"checkpoint: {export(checkpoint, out, dtype)}")


def _recipes(name: str | None) -> None:
    from lumos.train.recipes import recipe_names, recipe_options, recipe_text, recipe_title

    if name is not None:
        print(recipe_text(name), end="")
        return
    for known in recipe_names():
        options = recipe_options(known)
        shown = ("lr", "schedule", "warmup", "steps", "token_budget", "micro_batches", "ema")
        print(f"{known:18}{recipe_title(known)}")
        print(f"{'':18}{', '.join(f'{name} {options[name]}' for name in shown if name in options)}")
