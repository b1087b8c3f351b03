"""The `lumos` command: tokenize clips, train, generate, list the kernels' implementations."""

from __future__ import annotations

import argparse
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, fields

import lumos_kernels
from lumos.cli_generate import add_generate, parse_size
from lumos.train import TrainConfig, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after printing what is wrong with the arguments or their files."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(**options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lumos: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lumos", description="Train and sample Lumos-1 video models.")
    parser.add_argument("--version", action="version", version=lumos_kernels.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("tokenize", help="encode video clips into a folder of training samples")
    command.set_defaults(run=_tokenize)
    command.add_argument("clips", nargs="+", help="video files")
    command.add_argument("--caption", action="append", required=True, help="one for all clips, or one a clip")
    command.add_argument("--out", required=True, help="folder of samples, appended to if it exists")
    command.add_argument("--fps", type=int, default=12, help="frames per second (default 12)")
    command.add_argument("--seconds", type=int, default=2, help="length of a sample (default 2)")
    command.add_argument("--windows", type=int, default=1, help="consecutive samples of a clip (default 1)")
    command.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH, multiples of 32 (default: the clip's shape)")
    command.add_argument(
        "--max-pixels",
        type=int,
        default=256 * 448,
        help="without --size: scale pictures down to so many pixels (default 114688, 256x448)",
    )
    command.add_argument("--tokenizer", help="folder of a checkpoint with tokenizer.json (default: byte tokenizer)")

    command = commands.add_parser("train", help="train a model on folders of samples")
    command.set_defaults(run=lambda **options: _train(TrainConfig(**options)))
    _add_fields(command, TrainConfig)

    add_generate(commands)

    command = commands.add_parser("backends", help="list the kernels' implementations and what runs here")
    command.set_defaults(run=lumos_kernels.backends)
    return parser


def _tokenize(
    clips: list[str],
    caption: list[str],
    out: str,
    fps: int,
    seconds: int,
    windows: int,
    size: tuple[int, int] | None,
    max_pixels: int,
    tokenizer: str | None,
) -> None:
    from lumos.codec import DctCodec
    from lumos.data import tokenize
    from lumos.tokens import load_tokenizer

    if len(caption) not in (1, len(clips)):
        raise ValueError(
            f"--caption must be given once, or once for each of the {len(clips)} clips; got {len(caption)}"
        )
    captions = caption * len(clips) if len(caption) == 1 else caption
    summary = tokenize(
        clips,
        captions,
        out,
        codec=DctCodec(),
        fps=fps,
        seconds=seconds,
        size=size,
        tokenizer=load_tokenizer(tokenizer),
        windows=windows,
        max_pixels=max_pixels,
    )
    print(summary)


def _train(config: TrainConfig) -> None:
    summary = train(config)
    print(
        f"{summary.steps} steps in {summary.seconds:.1f} s: loss {summary.first_loss:.3f} -> {summary.last_loss:.3f}\n"
        f"log: {summary.log}\ncheckpoint: {summary.checkpoint}"
    )


def _add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """One option for each field of a dataclass, with its type, default and help."""
    hints = typing.get_type_hints(config)
    for field in fields(config):
        hint = hints[field.name]
        if isinstance(hint, types.UnionType):  # "str | None"
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        default = None if field.default is MISSING else field.default
        text = field.metadata["help"] + ("" if default in (None, (), False) else f" (default {default})")
        flag = "--" + field.name.replace("_", "-")
        if typing.get_origin(hint) is tuple:
            parser.add_argument(flag, nargs="+", default=default, required=default == (), help=text)
        elif hint is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            parser.add_argument(flag, type=hint, default=default, help=text)


if __name__ == "__main__":
    sys.exit(main())
