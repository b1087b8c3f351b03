"""A training step of a small model on a real 384p sample, at rising numbers of frames: time and peak memory.

    python -m bench.real_sample SAMPLE.pkl --frames 1 2 7 22

The sample is one of the official training format with 48 x 84 frames. Both ways run where the official one fits into
--memory; ours alone runs beyond. Writes <device>_<date>_<sha>_real-sample.json and .md into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import environment
from bench.training_step import OFFICIAL, OURS, compare_training_step
from lumos import LumosConfig, mask_tokens
from lumos.data import read_official_sample
from lumos.tokens import Spans

SMALL = {  # heads of the 1B model
    "vocab_size": 129536,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
}


def first_frames(ids: Tensor, count: int) -> Tensor:
    """int64 [1, L]: the document with its first `count` frames; what follows the last one stays."""
    frames = Spans.of(ids).frames
    if not 1 <= count <= len(frames):
        raise ValueError(f"frames must lie in 1..{len(frames)}, which the sample has; got {count}")
    return torch.cat([ids[: frames[count - 1][1]], ids[frames[-1][1] :]])[None]


def official_bytes(tokens: int, vocabulary: int) -> int:
    """What the official way keeps at the loss: logits of every token and id in bf16 and fp32, their gradients, and a
    selected copy (12 bytes a logit); and its fp32 mask, cast to bf16.
    """
    return 12 * tokens * vocabulary + 6 * tokens**2


def measure(sample: Path, counts: Sequence[int], limit: float, dtype: str, seconds: float) -> list[dict[str, Any]]:
    ids, config = read_official_sample(sample).ids, LumosConfig.from_dict(SMALL)
    results = []
    for count in counts:
        document = first_frames(ids, count)
        fits = official_bytes(document.shape[1], config.vocab_size) <= limit
        result = compare_training_step(
            config,
            mask_tokens(document, seeds=[0]),
            dtype=dtype,
            seconds=seconds,
            official=fits,
        )
        results.append({"frames": count, **result})
        print(_line(results[-1]), flush=True)
    return results


def _line(result: dict[str, Any]) -> str:
    cells = [f"{result['frames']}", f"{result['tokens']:,}", f"{result['targets']:,}"]
    for side in (OURS, OFFICIAL):
        figures = result[side]
        cells += [f"{figures['median_s']:.2f} s", f"{figures['extra_bytes'] / 1e6:,.0f} MB"] if figures else ["-", "-"]
    cells += [f"{result['speedup']:.2f} x", f"{result['memory_ratio']:.1f} x"] if result["speedup"] else ["-", "-"]
    return "| " + " | ".join(cells) + " |"


def markdown(results: list[dict[str, Any]]) -> str:
    where = results[0]["environment"]
    header = ["frames", "tokens", "targets", "ours", "memory", "official style", "memory", "time", "memory"]
    return "\n".join(
        [
            f"# Training step on a real 384p sample: {where['device_name']}, {where['date'][:10]}",
            "",
            f"Forward and backward of {SMALL['num_hidden_layers']} layers x {SMALL['hidden_size']}, "
            f"{results[0]['dtype']}, {where['threads']} threads, commit {where['commit']}"
            f"{' with uncommitted changes' if where['dirty'] else ''}. Memory is the peak beyond the weights.",
            "",
            "| " + " | ".join(header) + " |",
            "|" + " ---: |" * len(header),
            *(_line(result) for result in results),
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.real_sample", description=__doc__.splitlines()[0])
    parser.add_argument("sample", type=Path, help="official training sample (.pkl)")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 2, 7, 22])
    parser.add_argument("--memory", type=float, default=20.0, help="GB that the official way may take")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="timing of a size, at least three rounds of both ways"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    options = parser.parse_args(arguments)
    results = measure(options.sample, options.frames, options.memory * 1e9, options.dtype, options.seconds)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{environment.file_stem(results[0]['environment'])}_real-sample"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
