"""What each option that is faster or smaller than exact costs: agreement with exact, NLL under the model, time, bytes.

    python -m bench.generation_quality demo/run/checkpoint --data demo/tokens

Every variant continues the same documents from their first frame with the same seeds. `agreement`: share of generated
codes equal to the exact sampler's, greedy (a draw that differs once differs ever after, so draws would say nothing).
`nll`: what the model itself, without any shortcut, gives the drawn documents: mean cross entropy of their generated
codes under random tube masks, the training objective, on the same masks for every variant. `clip`: agreement of the
greedy codes with the documents they continue.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import environment
from lumos import Lumos, generate_frames, mask_tokens
from lumos.data import SampleFolder
from lumos.kv_cache import FP8
from lumos.sampling import Sampling, plan_memory, read_prompts
from lumos.tokens import SEPARATOR, VIDEO_END, Spans

VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "half the steps": {"steps": 0.5},
    "confidence_threshold 0.9": {"confidence_threshold": 0.9},
    "confidence_threshold 0.5": {"confidence_threshold": 0.5},
    "guidance_interval 0 to 0.5": {"guidance_interval": (0.0, 0.5)},
    "guidance_interval 0.5 to 1": {"guidance_interval": (0.5, 1.0)},
    "window (1, 1)": {"window": (1, 1)},
    "window (0, 1)": {"window": (0, 1)},
    "kv_dtype bfloat16": {"kv_dtype": torch.bfloat16},
    "kv_dtype float8": {"kv_dtype": FP8},
}
MASKS = 4  # random masks a document for the NLL


def measure(model: Lumos, documents: Sequence[Tensor], steps: int, guidance: float) -> list[dict[str, Any]]:
    """One row a variant, exact first."""
    spans = [Spans.of(ids) for ids in documents]
    prompts = [ids[: span.frames[0][1]] for ids, span in zip(documents, spans, strict=True)]
    grids, counts = [(span.rows, span.cols) for span in spans], [len(span.frames) for span in spans]
    true = [ids[span.frames[1][0] : span.stop] for ids, span in zip(documents, spans, strict=True)]
    rows: list[dict[str, Any]] = []
    exact: list[Tensor] = []
    for name, changes in tqdm(VARIANTS.items(), disable=not sys.stderr.isatty()):
        options = {"steps": steps, "guidance_scale": guidance, **changes}
        if "steps" in changes:
            options["steps"] = max(1, int(steps * changes["steps"]))
        greedy, _, _ = _continue(model, prompts, grids, counts, greedy=True, **options)
        drawn, taken, seconds = _continue(model, prompts, grids, counts, **options)
        exact = exact or greedy
        plan = plan_memory(
            model.config,
            read_prompts(model.config, prompts, grids, counts, 0, Sampling(**options)),
            Sampling(**options),
            torch.float32,
        )
        rows.append(
            {
                "variant": name,
                "agreement": _agreement(greedy, exact, model),
                "clip": _agreement(greedy, true, model),
                "nll": _nll(model, prompts, drawn),
                "steps_a_frame": taken,
                "seconds": seconds,
                "cache_bytes": plan.cache,
            }
        )
    return rows


def _continue(
    model: Lumos, prompts: list[Tensor], grids: list[tuple[int, int]], counts: list[int], **options: Any
) -> tuple[list[Tensor], float, float]:
    """The generated frames of each document as ids, steps a frame, seconds."""
    readers = read_prompts(model.config, prompts, grids, counts, 0, Sampling(**options))
    made: list[list[Tensor]] = [[] for _ in prompts]
    begin, steps = time.perf_counter(), []
    for frame in generate_frames(model, prompts, grids, counts, **options):
        made[frame.document].append(readers[frame.document].frame_ids(frame.codes + model.config.visual_start))
        steps.append(frame.steps)
    seconds = time.perf_counter() - begin
    return [torch.cat(frames) for frames in made], sum(steps) / len(steps), seconds


def _agreement(some: Sequence[Tensor], others: Sequence[Tensor], model: Lumos) -> float:
    a, b = torch.cat(list(some)), torch.cat(list(others))
    return float((a == b)[b >= model.config.visual_start].float().mean())


@torch.no_grad()
def _nll(model: Lumos, prompts: list[Tensor], made: list[Tensor]) -> float:
    """Mean over documents and masks; the given frame is never masked."""
    model.eval()
    end, losses = torch.tensor([VIDEO_END, SEPARATOR]), []
    for number, (prompt, frames) in enumerate(zip(prompts, made, strict=True)):
        ids = torch.cat([prompt, frames, end])[None]
        for mask in range(MASKS):
            batch = mask_tokens(ids, seeds=[MASKS * number + mask], given_frames=1, classes=model.config.classes)
            losses.append(model(batch.input_ids, labels=batch.labels, rows=batch.rows).loss)
    return float(torch.stack(losses).mean())


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | agreement with exact | with the clip | NLL | steps a frame | time | cache |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['variant']} | {100 * row['agreement']:.1f} % | {100 * row['clip']:.1f} % | {row['nll']:.3f} "
            f"| {row['steps_a_frame']:.1f} | {row['seconds'] / rows[0]['seconds']:.2f} x "
            f"| {row['cache_bytes'] / rows[0]['cache_bytes']:.2f} x |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.generation_quality", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="folder of samples to continue")
    parser.add_argument("--documents", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--json", help="also write the rows and the machine to this file")
    options = parser.parse_args(arguments)
    folder = SampleFolder(options.data)
    # Spread over the folder: neighbours come from one clip.
    places = torch.linspace(0, len(folder) - 1, options.documents).long().tolist()
    model = Lumos.from_pretrained(options.checkpoint)
    rows = measure(model, [folder[at].ids for at in places], options.steps, options.guidance)
    print(markdown(rows))
    if options.json:
        record = {
            "rows": rows,
            "settings": vars(options),
            "environment": environment.record("cpu", torch.get_num_threads()),
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
