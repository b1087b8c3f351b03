"""Sampling, ours against the official way, on the same weights and prompt.

    python -m bench.generation                                   # tiny model, 1,828 tokens a frame
    python -m bench.generation --batch 1 2 4 8 --contestants ours --device cuda --dtype bfloat16 --model 1B

Every contestant samples whole documents; times come from one process in which they alternate, each peak of memory from
a process of its own. Greedy in fp32, the contestants must agree on the tokens, or there is no figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench import environment, memory, timing
from bench.official_sampler import official_style_sample
from lumos import Lumos, LumosConfig, generate_tokens
from lumos.tokens import SEPARATOR, VIDEO_START, number
from lumos_kernels.frame_layout.frames import frame_length
from lumos_kernels.token_ids import TEXT_START

OURS, OFFICIAL, UNCACHED = "ours", "official", "official without cache"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AGREEMENT = 0.99  # share of equal tokens: with 64,000 classes and untrained weights a few calls are close


class Generation:
    """The model, the prompts and the contestants of a comparison."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        torch.manual_seed(options.seed)
        model = Lumos(LumosConfig.preset(options.model))
        with torch.no_grad():  # so large that attention and draws are far from uniform
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.mul_(50 if "embed_tokens" in name else options.gain)
        self.model = model.to(device=self.device, dtype=DTYPES[options.dtype]).eval()
        text = torch.randint(1, 4000, (max(options.batch), options.text))
        header = torch.tensor([VIDEO_START, number(2), number(12)])
        start, end = torch.tensor([TEXT_START]), torch.tensor([SEPARATOR])
        self.prompts = [torch.cat([start, row, end, header]) for row in text]

    def sample(self, contestant: str, batch: int = 1, greedy: bool = True) -> list[Tensor]:
        options = self.options
        common = {"steps": options.steps, "guidance_scale": options.guidance, "greedy": greedy}
        if contestant == OURS:
            return generate_tokens(
                self.model,
                self.prompts[:batch],
                options.grid,
                options.frames,
                documents_per_pass=options.documents_per_pass or batch,
                cuda_graphs=options.cuda_graphs,
                **common,
            )
        return [
            official_style_sample(
                self.model, prompt, options.grid, options.frames, cache=contestant == OFFICIAL, **common
            ).cpu()
            for prompt in self.prompts[:batch]
        ]

    def forwards(self, contestant: str) -> int:
        """Passes through the network for one batch (ours: of all documents that share them)."""
        steps, frames = self.options.steps, self.options.frames
        if contestant == OURS:
            return 1 + frames * steps + frames - 1
        return 2 * frames * (steps + 1) if contestant == OFFICIAL else 2 * frames * steps


def time_all(generation: Generation, rounds: int) -> dict[str, Any]:
    """Seconds a frame of each contestant and batch size, alternating, after the greedy tokens were compared."""
    options = generation.options
    contestants = [(name, batch) for name in options.contestants for batch in (options.batch if name == OURS else [1])]
    agreement = {}
    if len(options.contestants) > 1:
        tokens = {name: generation.sample(name)[0] for name in options.contestants}
        reference = tokens[options.contestants[-1]]
        agreement = {name: float((ids == reference).float().mean()) for name, ids in tokens.items()}
        wrong = {name: share for name, share in agreement.items() if options.dtype == "float32" and share < AGREEMENT}
        if wrong:
            raise RuntimeError(f"the contestants' greedy tokens differ: shares of equal ones {agreement}")
    clock = timing.clock_for(generation.device)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in contestants}
    for round_ in range(rounds):
        for key in contestants[round_ % len(contestants) :] + contestants[: round_ % len(contestants)]:
            times[key].append(clock(lambda key=key: generation.sample(*key, greedy=False), 1))
    rows = []
    for (name, batch), samples in times.items():
        median = statistics.median(samples)
        rows.append(
            {
                "contestant": name,
                "batch": batch,
                "seconds_a_frame": median / options.frames / batch,
                "seconds": samples,
                "forwards": generation.forwards(name) * (1 if name == OURS else batch),
                "agreement": agreement.get(name),
            }
        )
    return {"rows": rows}


def peak(generation: Generation, contestant: str) -> dict[str, int | None]:
    """Bytes beyond the weights and the program while one document is sampled, after a first, shorter one."""
    steps, generation.options.steps = generation.options.steps, 1
    generation.sample(contestant, greedy=False)
    generation.options.steps = steps
    found = memory.peak_of(lambda: generation.sample(contestant, greedy=False), generation.device)
    return {"extra_bytes": None if found is None else found[1] - found[0]}


def _grid(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    return int(rows), int(cols)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__.splitlines()[0])
    result.add_argument("--model", default="tiny", help="preset: tiny, 1B, 3B (random weights)")
    result.add_argument("--grid", type=_grid, default=(32, 56), help="codes of a frame, ROWSxCOLUMNS")
    result.add_argument("--frames", type=int, default=2)
    result.add_argument("--steps", type=int, default=4)
    result.add_argument("--text", type=int, default=64, help="tokens of text in a prompt")
    result.add_argument("--guidance", type=float, default=15.0)
    result.add_argument("--batch", type=int, nargs="+", default=[1], help="documents at a time, ours only")
    result.add_argument("--documents-per-pass", type=int, help="ours: documents in a pass (default: all of a batch)")
    result.add_argument("--cuda-graphs", action="store_true", help="ours: replay the steps")
    result.add_argument("--contestants", nargs="+", default=[OURS, OFFICIAL], choices=[OURS, OFFICIAL, UNCACHED])
    result.add_argument("--rounds", type=int, default=1)
    result.add_argument("--gain", type=float, default=7.0, help="factor of the random weights")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--no-memory", action="store_true")
    result.add_argument("--part", help="in this process: 'time', or the peak of one contestant")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.part is not None:
        generation = Generation(options)
        result = time_all(generation, options.rounds) if options.part == "time" else peak(generation, options.part)
        print(json.dumps(result))
        return 0
    result = memory.run_child("bench.generation", [*arguments, "--part", "time"])
    for row in result["rows"]:
        measured = options.no_memory or row["batch"] != 1
        part = [*arguments, "--part", row["contestant"]]
        row["extra_bytes"] = None if measured else memory.run_child("bench.generation", part)["extra_bytes"]
    ours = result["rows"][0]
    for row in result["rows"]:
        row["times_as_long"] = row["seconds_a_frame"] / ours["seconds_a_frame"]
    result["tokens_a_frame"] = frame_length(*options.grid)
    result["settings"] = {key: value for key, value in vars(options).items() if key != "part"}
    result["environment"] = environment.record(options.device, options.threads)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
