"""`lumos generate`: one prompt, or a file of them, to pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from lumos.cosmos import check_codec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float8": torch.float8_e4m3fn}


def add_generate(commands: Any) -> None:
    """Adds the subcommand to argparse's subparsers."""
    command = commands.add_parser("generate", help="make images and videos with a trained model")
    command.set_defaults(run=_generate)
    command.add_argument("checkpoint", help="folder of a checkpoint")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="the caption")
    what.add_argument("--prompts", type=Path, help="file of captions, .json or .jsonl (official evaluation formats)")
    command.add_argument(
        "--out",
        type=Path,
        required=True,
        help=".png, .jpg, .mp4, .gif or .safetensors (codes); with --prompts a folder",
    )
    given = command.add_mutually_exclusive_group()
    given.add_argument("--image", type=Path, help="first picture; with --prompts the folder of first pictures")
    given.add_argument("--video", type=Path, help="clip to continue")
    command.add_argument("--given-seconds", type=float, default=0.5, help="of --video (default 0.5)")
    command.add_argument("--size", type=parse_size, default=(256, 448), help="HEIGHTxWIDTH, multiples of 32 (256x448)")
    command.add_argument("--fps", type=int, default=12, help="frames per second of a video (default 12)")
    command.add_argument("--seconds", type=int, default=2, help="length of a video (default 2)")
    command.add_argument("--tokenizer", help="tokenizer.json, or 'bytes' (default: the checkpoint's)")
    command.add_argument(
        "--codec", type=check_codec, help="what the codes mean: dct, the embedded codec, or cosmos:FOLDER"
    )
    command.add_argument("--template", default="official", help="official, plain, or a text with {prompt}")
    command.add_argument("--dtype", choices=tuple(_DTYPES), help="default: the checkpoint's")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")

    files = command.add_argument_group("with --prompts")
    files.add_argument("--layout", choices=("vbench", "geneval"), default="vbench", help="of the folder (vbench)")
    files.add_argument("--suffix", help="of the files (default .mp4, for geneval .png)")
    files.add_argument("--samples", type=int, default=1, help="of each prompt (default 1)")
    files.add_argument("--shard", type=parse_shard, default=(1, 1), help="i/n: the i-th of n parts, i from 1")
    files.add_argument("--documents-per-pass", type=int, default=1, help="samples made together (default 1)")

    sampling = command.add_argument_group("sampling")
    sampling.add_argument("--steps", type=int, default=50, help="a frame (default 50)")
    sampling.add_argument("--guidance", type=float, help="scale (default 15, images 16); 1 turns it off")
    sampling.add_argument("--history-ratio", type=float, default=0.7, help="re-masked share of the past (default 0.7)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="of the confidence noise (default 1)")
    sampling.add_argument("--temperature-schedule", default="official", help="official or per_frame")
    sampling.add_argument("--greedy", action="store_true", help="the most probable tokens, no noise")
    sampling.add_argument("--seed", type=int, default=0)

    faster = command.add_argument_group("faster or smaller than exact (docs/generation.md)")
    faster.add_argument("--confidence-threshold", type=float, help="keep every token at least so probable")
    faster.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"))
    faster.add_argument("--window", type=int, nargs=2, metavar=("SINK", "RECENT"), help="frames a frame sees")
    faster.add_argument("--kv-dtype", choices=tuple(_KV_DTYPES), help="of the past's keys and values")
    faster.add_argument("--kv-device", help="where they are kept, e.g. cpu")


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of HEIGHTxWIDTH."""
    height, separator, width = text.partition("x")
    if not separator or not height.isdigit() or not width.isdigit():
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, e.g. 256x448, got {text!r}")
    return int(height), int(width)


def parse_shard(text: str) -> tuple[int, int]:
    part, separator, parts = text.partition("/")
    if not separator or not part.isdigit() or not parts.isdigit():
        raise argparse.ArgumentTypeError(f"expected i/n, e.g. 1/4, got {text!r}")
    return int(part), int(parts)


def _generate(**options: Any) -> None:
    from lumos.evaluation import Batch, read_items, shard
    from lumos.pipelines import PICTURES, Pipeline, check_suffix

    out, many = options["out"], options["prompts"] is not None
    suffix = options["suffix"] or (".png" if options["layout"] == "geneval" else ".mp4") if many else out.suffix
    still = suffix in PICTURES
    if still and (options["image"] or options["video"]):
        raise ValueError(f"--out: an image cannot continue --image or --video, got {suffix}")
    if still:
        options["fps"] = options["seconds"] = 1
    sampling = _sampling(options, still)
    # Everything that can be wrong with the request is said before the weights are read.
    if many:
        if options["video"]:
            raise ValueError("--video goes with --prompt; with --prompts only first pictures can be given (--image)")
        items = shard(read_items(options["prompts"]), *options["shard"])
        names = ("layout", "samples", "seed", "size", "fps", "seconds")
        batch = Batch(
            out,
            suffix=suffix,
            images=options["image"],
            together=options["documents_per_pass"],
            **{name: options[name] for name in names},
        )
    else:
        check_suffix(out, options["codec"] is not None)
        request = _request(options)
    pipeline = Pipeline.from_pretrained(
        options["checkpoint"],
        options["tokenizer"],
        options["codec"],
        options["template"],
        _DTYPES.get(options["dtype"]),
        options["device"],
    )
    progress = sys.stderr.isatty()
    if not many:
        [result] = pipeline([request], progress=progress, **sampling)
        result.save(out)
        print(out)
        return
    made = batch.run(pipeline, items, progress=progress, **sampling)
    print(f"{made} samples of {len(items)} prompts made, {len(items) * batch.samples - made} were there: {out}")


def _request(options: dict[str, Any]) -> Any:
    from lumos.pipelines import Request

    prompt, size = options["prompt"], options["size"]
    known = {name: options[name] for name in ("fps", "seconds", "seed")}
    if options["video"]:
        return Request.from_video(prompt, options["video"], size, given_seconds=options["given_seconds"], **known)
    if options["image"]:
        return Request.from_image(prompt, options["image"], size, **known)
    return Request(prompt, size, **known)


def _sampling(options: dict[str, Any], still: bool) -> dict[str, Any]:
    """Fields of lumos.sampling.Sampling, checked."""
    from lumos.sampling import Sampling

    guidance = options["guidance"]
    fields = {
        "steps": options["steps"],
        "guidance_scale": (16.0 if still else 15.0) if guidance is None else guidance,
        "mask_history_ratio": options["history_ratio"],
        "temperature": options["temperature"],
        "temperature_schedule": options["temperature_schedule"],
        "greedy": options["greedy"],
        "confidence_threshold": options["confidence_threshold"],
        "guidance_interval": tuple(options["guidance_interval"]),
        "window": None if options["window"] is None else tuple(options["window"]),
        "kv_dtype": _KV_DTYPES.get(options["kv_dtype"]),
        "kv_device": options["kv_device"],
    }
    Sampling(**fields)
    return fields
