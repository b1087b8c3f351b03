"""`lumos tokenize` and `lumos convert`: clips and official samples to folders of samples."""

from __future__ import annotations

import sys
from typing import Any

from lumos.cli_generate import parse_shard, parse_size
from lumos.cosmos import check_codec
from lumos.data.buckets import BUCKETS

_MAX_PIXELS = 256 * 448
_INTERRUPTED = 130  # what shells report for Ctrl-C


def add_data(commands: Any) -> None:
    """Adds the subcommands to argparse's subparsers."""
    command = commands.add_parser(
        "tokenize",
        help="encode video clips into a folder of training samples",
        description="Encodes videos and pictures into a folder of training samples; run again, goes on where it was.",
    )
    command.set_defaults(run=_tokenize)
    command.add_argument(
        "clips",
        nargs="+",
        help="videos and pictures; folders of them, with captions beside them (clip.txt for clip.mp4); .csv tables "
        "with the columns path and caption (or text), and fps and seconds where wanted",
    )
    command.add_argument("--caption", action="append", default=[], help="one for all that has none, or one a clip")
    command.add_argument("--out", required=True, help="folder of samples, added to if it exists")
    command.add_argument("--fps", type=int, default=12, help="frames per second (default 12)")
    command.add_argument("--seconds", type=int, default=2, help="length of a sample (default 2)")
    command.add_argument("--windows", type=int, default=1, help="consecutive samples of a clip (default 1)")
    size = command.add_mutually_exclusive_group()
    size.add_argument("--size", type=parse_size, help="HEIGHTxWIDTH, multiples of 32 (default: the clip's shape)")
    size.add_argument("--buckets", choices=BUCKETS, help="upstream's size of the aspect ratio nearest to each clip's")
    size.add_argument(
        "--max-pixels",
        type=int,
        default=_MAX_PIXELS,
        help=f"without --size and --buckets: scale down to so many pixels (default {_MAX_PIXELS}, 256x448)",
    )
    command.add_argument("--tokenizer", help="folder of a checkpoint with tokenizer.json (default: byte tokenizer)")
    command.add_argument(
        "--template", default="plain", help="words around a caption: plain (default), official, or a text with {prompt}"
    )
    command.add_argument(
        "--codec", type=check_codec, default="dct", help="dct (default), or cosmos:FOLDER of the published .jit files"
    )
    command.add_argument("--device", default="auto", help="where cosmos runs: cpu, cuda, or auto")
    command.add_argument("--workers", type=int, default=1, help="processes that read and encode (default 1)")
    command.add_argument(
        "--shard",
        type=parse_shard,
        default=(1, 1),
        help="i/n: the i-th of n parts of the clips, into a folder of its own",
    )

    command = commands.add_parser(
        "convert",
        help="copy official training samples into a folder of samples",
        description="Copies official samples into a folder that loads faster. Run again, it goes on where it was. "
        "Placeholders in the texts stay; `lumos train` writes the numbers (numbers= of --data).",
    )
    command.set_defaults(run=_convert)
    command.add_argument("official", nargs="+", help="indexes (.json, .jsonl), META lists (.yaml), samples (.pkl)")
    command.add_argument("--out", required=True, help="folder of samples, added to if it exists")
    command.add_argument("--workers", type=int, default=1, help="processes that read (default 1)")


def _tokenize(
    clips: list[str], caption: list[str], out: str, codec: str, device: str, shard: tuple[int, int], **options: Any
) -> None:
    from lumos.cosmos import load_codec
    from lumos.data import find_clips, tokenize_clips
    from lumos.evaluation import shard as part_of
    from lumos.tokens import load_tokenizer

    options["tokenizer"] = load_tokenizer(options["tokenizer"])
    if options["buckets"] is not None:
        options["max_pixels"] = None
    found = part_of(find_clips(clips, caption), *shard)
    _run(lambda: tokenize_clips(found, out, load_codec(codec, device), **options), out)


def _convert(official: list[str], out: str, workers: int) -> None:
    from lumos.data import convert

    _run(lambda: convert(official, out, workers), out)


def _run(work: Any, out: str) -> None:
    try:
        print(work())
    except KeyboardInterrupt:
        print(f"lumos: interrupted; the same command goes on with what {out} holds", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
