"""A whole training step, ours against the official way, on the same weights and batch.

    compare_training_step(model, batch) -> dict

Times come from one fresh process in which the two alternate step by step; each peak of memory from a fresh process of
its own. `python -m bench.training_step MODEL BATCH` prints the same as JSON.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import environment, memory, timing
from bench.official_style import official_style_loss
from lumos import Lumos, LumosConfig, MaskedBatch
from lumos.checkpoint import CONFIG_NAME
from lumos_kernels import FrameLayout, tube_masked_loss

OURS, OFFICIAL = "ours", "official"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# How far the two losses may be apart, in units of the dtype's eps: in 16 bits the mean over the target slots averages
# the roundings of single logits out, in fp32 the order of the sums remains.
LOSS_EPS = {"float32": 8.0, "bfloat16": 1.0}
# How far the official way may be from fp64 where the two differ by more, in eps of the logsumexp: the loss is the small
# rest of that and a logit on trained weights. There it was 5 such eps off, 114 of a loss of 0.71 (ours 2 of the loss).
OFFICIAL_EPS = {"float32": 8.0, "bfloat16": 1.0}


def compare_training_step(
    model: str | Path | LumosConfig,
    batch: str | Path | MaskedBatch | tuple[Tensor, Tensor],
    *,
    dtype: str = "float32",
    seed: int = 0,
    impl: str = "auto",
    optimizer: bool = False,
    seconds: float = 20.0,
    rounds: int = 3,
    threads: int | None = None,
    device: str = "cpu",
    official: bool = True,
) -> dict[str, Any]:
    """Measures forward + backward of both ways and returns plain values for a report.

    Args:
        model: a folder written by Lumos.save_pretrained, or a LumosConfig, whose weights are then drawn from `seed`.
        batch: a safetensors file with int64 [B, L] "input_ids" and "labels" (and int32 "rows", if known), the same as
            a MaskedBatch, or as (input_ids, labels): what lumos.mask_tokens returns.
        dtype: of weights and activations, "float32" or "bfloat16".
        impl: of our ops.
        optimizer: AdamW's step is part of the step, with a learning rate of 0 so that the weights stay comparable.
        seconds, rounds: how long to alternate, and at least how often.
        threads: torch's CPU threads, as many as now by default. device: "cpu" or "cuda".
        official: False where the official way does not fit into memory: its figures, and those of both, are None, and
            ours are those of one step after a first one.

    Returns:
        {"ours": side, "official": side, "speedup": official time / ours (median over the rounds), "memory_ratio":
        official extra_bytes / ours, "loss_difference", "loss_limit", "tokens", "targets", "useful_flops", "dtype",
        "optimizer", "environment"}, where side = {"loss", "median_s", "min_s", "iqr_s", "samples", "flops_per_s",
        "peak_bytes", "extra_bytes"}. peak_bytes is the largest size of the whole process (cuda: of torch's
        allocations) in a step, extra_bytes its part beyond the weights, the optimizer's state and the program;
        both None, like memory_ratio, where the system does not tell.

    Raises:
        RuntimeError: the losses differ by more than rounding (judged by fp64 where it is close), or a child process
            fails (out of memory).
    """
    threads = threads or torch.get_num_threads()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [str(_model_folder(model, Path(scratch))), str(_batch_file(batch, Path(scratch)))]
        arguments += ["--dtype", dtype, "--seed", str(seed), "--impl", impl, "--threads", str(threads)]
        arguments += ["--device", device, "--seconds", str(seconds), "--rounds", str(rounds)]
        arguments += ["--optimizer"] if optimizer else []
        result = memory.run_child("bench.training_step", [*arguments, "--part", "both" if official else "alone"])
        for side in (OURS, OFFICIAL) if official else ():
            result[side].update(memory.run_child("bench.training_step", [*arguments, "--part", side]))
    extra = [result[side]["extra_bytes"] if result[side] else None for side in (OFFICIAL, OURS)]
    result["memory_ratio"] = None if None in extra else extra[0] / max(extra[1], 1)
    result["environment"] = environment.record(device, threads)
    return result


def _model_folder(model: str | Path | LumosConfig, scratch: Path) -> Path:
    if not isinstance(model, LumosConfig):
        return Path(model).resolve()
    (scratch / CONFIG_NAME).write_text(json.dumps(model.to_dict()), encoding="utf-8")
    return scratch


def _batch_file(batch: str | Path | MaskedBatch | tuple[Tensor, Tensor], scratch: Path) -> Path:
    if isinstance(batch, (str, Path)):
        return Path(batch).resolve()
    if isinstance(batch, MaskedBatch):
        tensors = {"input_ids": batch.input_ids, "labels": batch.labels, "rows": batch.rows}
    else:
        tensors = dict(zip(("input_ids", "labels"), batch, strict=True))
    file = scratch / "batch.safetensors"
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)
    return file


class Comparison:
    """Both steps in one process: the same model object computes ours and lends its weights to the official way."""

    def __init__(self, options: argparse.Namespace) -> None:
        folder, self.dtype, self.device = Path(options.model), DTYPES[options.dtype], options.device
        if any(file.suffix in (".safetensors", ".bin") for file in folder.glob("*model*")):
            model = Lumos.from_pretrained(folder)
        else:
            torch.manual_seed(options.seed)
            model = Lumos(LumosConfig.from_json_file(folder / CONFIG_NAME))
        self.model = model.to(device=self.device, dtype=self.dtype).train()
        self.model.impl = options.impl
        batch = {name: tensor.to(self.device) for name, tensor in load_file(options.batch).items()}
        self.ids, self.labels, self.rows = batch["input_ids"], batch["labels"], batch.get("rows")
        self.optimizer = None
        if options.optimizer:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

    def loss(self, side: str) -> Tensor:
        if side == OFFICIAL:
            return official_style_loss(self.model, self.ids, self.labels)
        return self.model(self.ids, labels=self.labels, rows=self.rows).loss

    def exact_loss(self) -> tuple[float, float]:
        """By the reference implementations in fp64: the loss of the same weights, the mean |logsumexp| of its slots."""
        model = copy.deepcopy(self.model).double()
        model.impl = "reference"
        with torch.no_grad():
            output = model(self.ids, labels=self.labels, rows=self.rows)
            hidden, labels = output.hidden_states.flatten(0, -2), self.labels.flatten()
            _, stats = tube_masked_loss(
                hidden, model.lm_head.weight, labels, classes=model.config.classes, impl="reference", return_stats=True
            )
            return float(output.loss), float(stats.lse[output.targets].abs().mean())

    def step(self, side: str) -> Tensor:
        """A training step; returns its loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.loss(side)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss.detach()


def time_both(comparison: Comparison, dtype: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Losses, which must agree, and times of the alternating steps; the size of the work."""
    with torch.no_grad():
        losses = {side: float(comparison.loss(side)) for side in (OURS, OFFICIAL)}
    difference, limit = check_losses(comparison, losses, dtype)
    calls: dict[str, Callable[[], None]] = {side: functools.partial(comparison.step, side) for side in losses}
    samples = timing.interleave(calls, seconds, timing.clock_for(comparison.device), min_rounds=rounds)
    size = _size(comparison)
    return {
        **{side: {"loss": losses[side], **_times(samples[side], size["useful_flops"])} for side in losses},
        "speedup": statistics.median(o / m for o, m in zip(samples[OFFICIAL], samples[OURS], strict=True)),
        "loss_difference": difference,
        "loss_limit": limit,
        **size,
    }


def ours_alone(comparison: Comparison) -> dict[str, Any]:
    """Loss of a first step, then the time and the peak of a second one: large sizes take minutes a step."""
    times, size = [], _size(comparison)
    clock, step = timing.clock_for(comparison.device), functools.partial(comparison.step, OURS)
    loss = step()
    peak = _second_peak(comparison, lambda: times.append(clock(step, 1)))
    return {
        OURS: {"loss": float(loss), **_times(times, size["useful_flops"]), **peak},
        **dict.fromkeys((OFFICIAL, "speedup", "loss_difference", "loss_limit")),
        **size,
    }


def _size(comparison: Comparison) -> dict[str, Any]:
    layout = FrameLayout.from_tokens(comparison.ids.cpu())
    config = comparison.model.config
    targets = int(((comparison.labels >= config.classes[0]) & (comparison.labels < config.classes[1])).sum())
    return {
        "tokens": layout.num_tokens,
        "targets": targets,
        "useful_flops": config.training_flops(layout, targets),
        "dtype": str(comparison.dtype).removeprefix("torch."),
        "optimizer": comparison.optimizer is not None,
    }


def check_losses(comparison: Comparison, losses: Mapping[str, float], dtype: str) -> tuple[float, float]:
    """The difference of the two losses and what it may be. RuntimeError where it is more than rounding."""
    difference = abs(losses[OURS] - losses[OFFICIAL])
    limit = LOSS_EPS[dtype] * torch.finfo(DTYPES[dtype]).eps * abs(losses[OFFICIAL])
    if not difference <= limit:  # NaN fails too
        # Where both follow fp64 it is rounding after all, and ours may not be the worse one.
        exact, lse = comparison.exact_loss()
        errors = {side: abs(loss - exact) for side, loss in losses.items()}
        official_limit = OFFICIAL_EPS[dtype] * torch.finfo(DTYPES[dtype]).eps * lse
        if not (errors[OFFICIAL] <= official_limit and errors[OURS] <= max(limit, errors[OFFICIAL])):
            raise RuntimeError(
                f"the losses {dict(losses)} differ by {difference:.3e}, more than {limit:.3e} in {dtype}"
            )
    return difference, limit


def _times(samples: list[float], flops: int) -> dict[str, Any]:
    median = statistics.median(samples)
    return {
        "median_s": median,
        "min_s": min(samples),
        "iqr_s": timing.interquartile_range(samples),
        "samples": len(samples),
        "flops_per_s": flops / median,
    }


def peak_of_step(comparison: Comparison, side: str) -> dict[str, int | None]:
    """Peak of a step after a first one, which loads code and makes the optimizer's state."""
    comparison.step(side)
    return _second_peak(comparison, lambda: comparison.step(side))


def _second_peak(comparison: Comparison, step: Callable[[], Any]) -> dict[str, int | None]:
    comparison.model.zero_grad(set_to_none=True)
    peak = memory.peak_of(step, comparison.device)
    before, highest = peak or (None, None)
    return {"peak_bytes": highest, "extra_bytes": None if peak is None else highest - before}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m bench.training_step", description=__doc__.splitlines()[0])
    result.add_argument("model", help="checkpoint folder, or folder with a config.json alone (weights from --seed)")
    result.add_argument("batch", help="safetensors file with input_ids and labels, int64 [B, L]")
    result.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--impl", default="auto", help="implementation of our ops")
    result.add_argument("--optimizer", action="store_true", help="include AdamW's step")
    result.add_argument("--seconds", type=float, default=20.0)
    result.add_argument("--rounds", type=int, default=3, help="at least so many of each")
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--ours-only", dest="official", action="store_false", help="where the official way has no room")
    result.add_argument(
        "--part",
        choices=("both", "alone", OURS, OFFICIAL),
        help="in this process: the times of both, all of ours, or one side's peak",
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(arguments))
    part = options.pop("part")
    if part is None:
        print(json.dumps(compare_training_step(**options), indent=1))
        return 0
    torch.set_num_threads(options["threads"])
    comparison = Comparison(argparse.Namespace(**options))
    if part == "both":
        result = time_both(comparison, *(options[name] for name in ("dtype", "seconds", "rounds")))
    elif part == "alone":
        result = ours_alone(comparison)
    else:
        result = peak_of_step(comparison, part)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
