"""The `lumos` command: tokenize clips, train, generate, list the kernels' implementations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import lumos_kernels
from lumos.cli_generate import add_generate, parse_size
from lumos.cli_train import add_export, add_train
from lumos.train.signals import EXIT_STOPPED, StoppedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns 0, or 2 after printing what is wrong with the arguments or their files.

    75 (EX_TEMPFAIL) where SIGTERM or SIGINT stopped a training run: the same command goes on from its checkpoint.
    """
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        run(**options)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"lumos: {error}", file=sys.stderr)
        return 2
    except StoppedError as stopped:
        print(f"lumos: {stopped}", file=sys.stderr)
        return EXIT_STOPPED
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

    add_train(commands)
    add_export(commands)
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


if __name__ == "__main__":
    sys.exit(main())
