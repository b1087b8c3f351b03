"""Measure the kernels' configurations on the GPU at hand and rewrite tuned.py.

    python -m lumos_kernels.frame_attention.triton.tune --minutes 8     measures, writes tuned.py
    python -m lumos_kernels.frame_attention.triton.tune --dry-run       lists what would be measured, on any machine

Every candidate must first give what the default gives, to a rounding or two. Then the fastest by the median of repeated
launches wins, and a default keeps its place unless it is beaten by MARGIN. Entries of other architectures stay. The
time is shared evenly by what is left to measure, the training shapes first. What was not reached keeps its entry.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from ...layout import Frame, FrameLayout, Text
from ..contract import Inputs, OutputGradients
from . import backward, configs, forward, tuned
from .configs import Config
from .primitives import MAX_BLOCK

Call: TypeAlias = Callable[[], tuple[Tensor, ...]]
Entries: TypeAlias = dict[tuple[str, str, int], dict[str, Any]]  # as tuned.CONFIGS

MARGIN = 0.98  # a change has to win 2 %: less is within what two runs differ by
REPEATS = 10
FILE = Path(tuned.__file__)


class Shape(NamedTuple):
    """The heads with which a head size is tuned, on 7 frames of 256 x 448 after a prompt: the published clip."""

    head_dim: int
    heads: int
    kv_heads: int


# The 1B and the 3B model first; the other head sizes have their heads.
SHAPES = (Shape(64, 32, 8), Shape(128, 24, 8), Shape(96, 32, 8), Shape(32, 32, 8))


class Subject(NamedTuple):
    """One thing to decide."""

    kernel: str  # of configs.KERNELS
    shape: Shape


def subjects() -> list[Subject]:
    return [Subject(kernel, shape) for shape in SHAPES for kernel in configs.KERNELS]


def candidates(kernel: str, arch: str, head_dim: int) -> list[Config]:
    """Return the default, then the configurations that differ from it in tile, warps, stages or loads."""
    default = configs.DEFAULTS[kernel, arch][head_dim]
    rows = (64, 128) if kernel in ("forward", "dq") else (32, 64, 128)
    columns = (64, 128)
    loads = (False,) if arch == "sm_80" else (True, False)
    found = [default]
    for m, n, warps, stages, descriptors in itertools.product(rows, columns, (4, 8), (1, 2, 3), loads):
        config = Config(block_m=m, block_n=n, num_warps=warps, num_stages=stages, descriptors=descriptors)
        # The fp32 accumulators of a thread must leave some of its 255 registers: s (and dp), and what the program owns.
        owned = 2 * n if kernel in ("dkdv", "fused") else m
        scores = m * n * (1 if kernel == "forward" else 2)
        fits = (scores + owned * head_dim) / (32 * warps) <= 224
        # Shared memory holds tiles that stay and tiles of the pipeline, in bf16.
        kept, streamed = (n, m) if kernel in ("dkdv", "fused") else (m, n)
        shared = (2 * kept + 2 * streamed * stages) * head_dim * 2
        fits &= shared <= (99 if arch == "sm_80" else 227) * 1024
        same_way = descriptors == default.descriptors or stages == default.num_stages
        if fits and same_way and MAX_BLOCK % m == 0 and config != default:
            found.append(config)
    return found


class Data(NamedTuple):
    """What the kernels are measured on."""

    inputs: Inputs
    grad_o: Tensor


def make_data(shape: Shape, device: str, frames: int = 7) -> Data:
    """Return random inputs. q, k and v are slices of one projection, as in the model."""
    layout = FrameLayout.from_segments([[Text(266), *[Frame(32, 56)] * frames]]).to(device)
    heads, kv_heads, head_dim = shape.heads, shape.kv_heads, shape.head_dim
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16, generator=generator)

    q, k, v = normal(layout.num_tokens, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 1)
    return Data(Inputs(q, k, v, layout.limits, head_dim**-0.5), normal(*q.shape))


def runner(subject: Subject, data: Data) -> Call:
    """Return a call that runs the kernel, with what belongs to it, in the configuration that configs.choose gives."""
    if subject.kernel == "forward":
        return lambda: forward(data.inputs)
    outputs, grad = forward(data.inputs), OutputGradients(data.grad_o, None)
    return lambda: backward(data.inputs, outputs, grad, deterministic=False)


def using(subject: Subject, config: Config) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the subject's kernel takes `config`, and the others keep theirs."""
    choose = configs.choose

    def chosen(kernel: str, q: Tensor) -> Config:
        return config if kernel == subject.kernel else choose(kernel, q)

    return mock.patch.multiple(configs, choose=chosen, fuses_backward=lambda q: subject.kernel == "fused")


def seconds_on_gpu(call: Call) -> float:
    """Return the median of REPEATS launches, by events."""
    call()
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def agrees(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Return whether the results are within the error of bf16 operands. A NaN never is."""
    return all(
        bool((a.double() - b.double()).norm() <= 1e-2 * b.double().norm())
        for a, b in zip(results, expected, strict=True)
    )


class Verdict(NamedTuple):
    config: Config
    seconds: float
    default_seconds: float
    tried: int
    refused: list[tuple[Config, str]]  # configurations that do not compile or are wrong, and why


def decide(
    subject: Subject, arch: str, data: Data, deadline: float, measure: Callable[[Call], float] = seconds_on_gpu
) -> Verdict:
    """Return the fastest right configuration that was reached before the deadline (time.monotonic)."""
    call = runner(subject, data)
    default, *others = candidates(subject.kernel, arch, subject.shape.head_dim)
    with using(subject, default):
        expected, default_seconds = call(), measure(call)
    refused: list[tuple[Config, str]] = []
    best, seconds, tried = default, MARGIN * default_seconds, 1
    for config in others:
        if time.monotonic() > deadline:
            break
        tried += 1
        with using(subject, config):
            try:
                results = call()
            except Exception as error:  # too much shared or tensor memory, or a defect of the compiler's
                refused.append((config, f"{type(error).__name__}: {error}"))
                continue
            if not agrees(results, expected):
                refused.append((config, "wrong result"))
                continue
            took = measure(call)
        if took < seconds:
            best, seconds = config, took
    return Verdict(best, default_seconds if best == default else seconds, default_seconds, tried, refused)


def _literal(entry: dict[str, Any]) -> str:
    return "{" + ", ".join(f'"{name}": {value!r}' for name, value in entry.items()) + "}"


def source(entries: Entries, fused: frozenset[tuple[str, int]], note: str) -> str:
    """Return the text of tuned.py."""
    lines = [
        '"""Written by python -m lumos_kernels.frame_attention.triton.tune: what was measured fastest, and where.',
        "",
        note,
        '"""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import Any",
        "",
        "# (kernel, architecture, head size) -> the fields of a configs.Config",
        "CONFIGS: dict[tuple[str, str, int], dict[str, Any]] = {",
        *(f'    ("{k}", "{a}", {d}): {_literal(entries[k, a, d])},' for k, a, d in sorted(entries)),
        "}",
        "",
        "# (architecture, head size) at which the fused backward beat the deterministic one",
        "FUSED_BACKWARD: frozenset[tuple[str, int]] = frozenset(",
        "    [",
        *(f'        ("{a}", {d}),' for a, d in sorted(fused)),
        "    ]",
        ")",
        "",
    ]
    return "\n".join(lines)


def tune(
    arch: str,
    minutes: float,
    device: str = "cuda",
    measure: Callable[[Call], float] = seconds_on_gpu,
    report: Callable[[str], None] = print,
    make: Callable[[Shape, str], Data] = make_data,
    todo: list[Subject] | None = None,
) -> tuple[Entries, frozenset[tuple[str, int]]]:
    """Return the table's entries after measuring: the earlier ones, changed where something was decided now."""
    entries, fused = dict(tuned.CONFIGS), set(tuned.FUSED_BACKWARD)
    todo = subjects() if todo is None else todo
    end = time.monotonic() + 60 * minutes
    backward_seconds: dict[tuple[str, int], float] = {}
    for number, subject in enumerate(todo):
        now = time.monotonic()
        if now >= end:
            report(f"time is up: {len(todo) - number} of {len(todo)} keep their entries")
            break
        head_dim = subject.shape.head_dim
        # The winners so far serve while the next kernel is measured: dq after dk and dv.
        with mock.patch.object(tuned, "CONFIGS", entries):
            data = make(subject.shape, device)
            verdict = decide(subject, arch, data, now + (end - now) / (len(todo) - number), measure)
        entries[subject.kernel, arch, head_dim] = fields_of(verdict.config)
        backward_seconds[subject.kernel, head_dim] = verdict.seconds
        report(
            f"{subject.kernel} D={head_dim}: {verdict.config}, {1e3 * verdict.seconds:.3f} ms"
            f" (default {1e3 * verdict.default_seconds:.3f} ms), {verdict.tried} tried"
        )
        for config, reason in verdict.refused:
            report(f"    refused {config}: {reason.splitlines()[0][:160]}")
        if subject.kernel == "fused" and ("dq", head_dim) in backward_seconds:
            # Both times are of a whole backward. That of "dq" is the deterministic one with its best dk, dv and dq.
            wins = verdict.seconds < MARGIN * backward_seconds["dq", head_dim]
            (fused.add if wins else fused.discard)((arch, head_dim))
    return entries, frozenset(fused)


def fields_of(config: Config) -> dict[str, Any]:
    """Return the fields that are set, as a table entry has them."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def plan(arch: str) -> Iterator[str]:
    """Yield what a dry run prints: the number of candidates of each subject, and its default."""
    for subject in subjects():
        found = candidates(subject.kernel, arch, subject.shape.head_dim)
        yield f"{subject.kernel} D={subject.shape.head_dim}: {len(found)} candidates, default {found[0]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="to measure for, at most")
    parser.add_argument("--out", type=Path, default=FILE, help="the table to write (default: the package's own)")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates; write nothing")
    parser.add_argument("--arch", choices=configs.ARCHS, default="sm_90", help="of a dry run")
    options = parser.parse_args(arguments)
    if options.dry_run:
        print("\n".join(plan(options.arch)))
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on; --dry-run lists what would be measured")
    name = torch.cuda.get_device_name()
    arch = configs.family(configs.architecture(torch.empty(0, device="cuda")))
    entries, fused = tune(arch, options.minutes)
    import triton

    note = f"Last run: {name} ({arch}), torch {torch.__version__}, triton {triton.__version__}."
    options.out.write_text(source(entries, fused, note), encoding="utf-8")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
