"""Measure the kernels' configurations on the GPU at hand, and keep the fastest.

    python -m lumos_kernels.frame_attention.triton.tune --minutes 8     writes the user's table in the cache folder
    python -m lumos_kernels.frame_attention.triton.tune --out FILE      writes a module like tuned.py instead
    python -m lumos_kernels.frame_attention.triton.tune --dry-run       lists what would be measured, on any machine

Every candidate must first give what the default gives, to a rounding or two. Then the fastest by the median of repeated
launches wins, and a default keeps its place unless it is beaten by MARGIN. The fused backward is preferred at a head
size where it beats the deterministic one by as much. The time is shared evenly by what is left to measure, the training
shapes first. The table is written after each kernel, so a run that is cut short loses nothing; what was not reached
keeps its entry.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...layout import Frame, FrameLayout, Text
from ..contract import Inputs, OutputGradients
from . import backward_deterministic, backward_fused, configs, forward, forward_with, measured, tuned
from .defaults import ARCHS, DEFAULTS, KERNELS, VETTED, Config
from .measured import Table
from .primitives import MAX_BLOCK

Call: TypeAlias = Callable[[], tuple[Tensor, ...]]
Clock: TypeAlias = Callable[[Call], float]

MARGIN = 0.98  # a change has to win 2 %: less is within what two runs differ by
REPEATS = 10
FLUSHED_BYTES = 256 * 2**20  # more than any last-level cache
HEAD_START_CYCLES = 4_000_000  # about 2 ms: the host takes less to enqueue a forward or a backward pass
MOST_VETTED = 5


class Shape(NamedTuple):
    """The heads with which a head size is tuned, on 7 frames of 256 x 448 after a prompt: the published clip."""

    head_dim: int
    heads: int
    kv_heads: int


# The 1B and the 3B model first; the other head sizes have their heads.
SHAPES = (Shape(64, 32, 8), Shape(128, 24, 8), Shape(96, 32, 8), Shape(32, 32, 8))


class Subject(NamedTuple):
    """One thing to decide."""

    kernel: str  # of KERNELS
    shape: Shape


def subjects(head_dims: Sequence[int] | None = None) -> list[Subject]:
    """Return what there is to decide, for all head sizes where none are given."""
    shapes = [shape for shape in SHAPES if head_dims is None or shape.head_dim in head_dims]
    return [Subject(kernel, shape) for shape in shapes for kernel in KERNELS]


def candidates(kernel: str, arch: str, head_dim: int, most: int | None = None) -> list[Config]:
    """Return the default, the vetted configurations, then the others that fit, those most like the default first.

    most: how many to return at most. Up to MOST_VETTED they are vetted ones alone, where there are any.
    """
    default = DEFAULTS[kernel, arch][head_dim]
    first = [default, *VETTED.get((kernel, arch, head_dim), ())]
    if len(first) > 1 and most is not None and most <= MOST_VETTED:
        return first[:most]
    rows = (64, 128) if kernel in ("forward", "dq") else (32, 64, 128)
    columns = (64, 128)
    loads = (False,) if arch == "sm_80" else (True, False)
    others = []
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
        if fits and same_way and MAX_BLOCK % m == 0:
            others.append(config)
    others.sort(key=lambda config: _difference(config, default))
    return list(dict.fromkeys([*first, *others]))[:most]


def _difference(a: Config, b: Config) -> int:
    """Return in how many fields two configurations differ. Pointers instead of descriptors count most."""
    fields = a.block_m != b.block_m, a.block_n != b.block_n, a.num_warps != b.num_warps, a.num_stages != b.num_stages
    return sum(fields) + 4 * (a.descriptors != b.descriptors)


def vetted(arch: str, head_dim: int) -> dict[str, list[Config]]:
    """Return at most MOST_VETTED configurations of each kernel, the default first: what to compile ahead and to try."""
    return {kernel: candidates(kernel, arch, head_dim, MOST_VETTED) for kernel in KERNELS}


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


def runner(kernel: str, data: Data, dkdv: Config | None = None) -> Callable[[Config], Call]:
    """Return what makes, of a configuration, a call that runs the kernel in it, with what belongs to it.

    dkdv: the configuration of "dkdv" while "dq" is measured.
    """
    inputs = data.inputs
    if kernel == "forward":
        return lambda config: lambda: forward_with(config, inputs)
    outputs, grad = forward(inputs), OutputGradients(data.grad_o, None)
    if kernel == "fused":
        return lambda config: lambda: backward_fused(inputs, outputs, grad, config=config)
    if kernel == "dkdv":
        return lambda config: lambda: backward_deterministic(inputs, outputs, grad, dkdv=config)
    return lambda config: lambda: backward_deterministic(inputs, outputs, grad, dkdv=dkdv, dq=config)


def seconds_on_gpu(call: Call) -> float:
    """Return the median of REPEATS launches, by events, with an empty L2 and a host that runs ahead."""
    call()
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(REPEATS)]
    for start, end in events:
        flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    milliseconds: list[float] = [start.elapsed_time(end) for start, end in events]
    return statistics.median(milliseconds) * 1e-3


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


def decide(run: Callable[[Config], Call], found: Sequence[Config], deadline: float, clock: Clock) -> Verdict:
    """Return the fastest right one of the configurations that was reached before the deadline (time.monotonic).

    found: the default, then the others.
    """
    default, *others = found
    expected, default_seconds = run(default)(), clock(run(default))
    refused: list[tuple[Config, str]] = []
    best, seconds, tried = default, MARGIN * default_seconds, 1
    for config in others:
        if time.monotonic() > deadline:
            break
        tried += 1
        try:
            results = run(config)()
        except Exception as error:  # too much shared or tensor memory, or a defect of the compiler's
            refused.append((config, f"{type(error).__name__}: {error}"))
            continue
        if not agrees(results, expected):
            refused.append((config, "wrong result"))
            continue
        took = clock(run(config))
        if took < seconds:
            best, seconds = config, took
    return Verdict(best, default_seconds if best == default else seconds, default_seconds, tried, refused)


def tune(
    arch: str,
    minutes: float,
    todo: Sequence[Subject],
    store: Callable[[Table], object],
    *,
    most: int | None = None,
    device: str = "cuda",
    clock: Clock = seconds_on_gpu,
    report: Callable[[str], None] = print,
) -> Table:
    """Return what was measured. store gets all that is decided so far, after each subject.

    most: candidates of a kernel at most.
    """
    found = Table({}, {})
    took: dict[tuple[str, int], float] = {}
    end = time.monotonic() + 60 * minutes
    for number, (kernel, shape) in enumerate(todo):
        now, head_dim = time.monotonic(), shape.head_dim
        if now >= end:
            report(f"time is up: {len(todo) - number} of {len(todo)} keep their entries")
            break
        deadline = now + (end - now) / (len(todo) - number)
        try:
            run = runner(kernel, make_data(shape, device), found.configs.get(("dkdv", head_dim)))
            verdict = decide(run, candidates(kernel, arch, head_dim, most), deadline, clock)
        except Exception as error:  # the default itself: the other kernels are measured all the same
            report(f"{kernel} D={head_dim} keeps its entry: {type(error).__name__}: {str(error)[:300]}")
            continue
        took[kernel, head_dim] = verdict.seconds
        fused = {}
        if kernel == "fused" and ("dq", head_dim) in took:
            # Both times are of a whole backward. That of "dq" is the deterministic one with its best dk, dv and dq.
            fused[head_dim] = verdict.seconds < MARGIN * took["dq", head_dim]
        found = found.updated(Table({(kernel, head_dim): verdict.config}, fused))
        store(found)
        report(
            f"{kernel} D={head_dim}: {verdict.config}, {1e3 * verdict.seconds:.3f} ms"
            f" (default {1e3 * verdict.default_seconds:.3f} ms), {verdict.tried} tried"
        )
        for config, reason in verdict.refused:
            report(f"    refused {config}: {reason.splitlines()[0][:160]}")
    return found


def _literal(entry: dict[str, Any]) -> str:
    return "{" + ", ".join(f'"{name}": {value!r}' for name, value in entry.items()) + "}"


def source(arch: str, found: Table, note: str) -> str:
    """Return the text of tuned.py with the entries of an architecture replaced by those found; the others stay."""
    entries = dict(tuned.CONFIGS)
    entries |= {(k, arch, d): measured.fields_of(config) for (k, d), config in found.configs.items()}
    fused = {key for key in tuned.FUSED_BACKWARD if key[0] != arch or key[1] not in found.fused}
    fused |= {(arch, head_dim) for head_dim, wins in found.fused.items() if wins}
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
        "# (kernel, architecture, head size) -> the fields of a Config",
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


def plan(arch: str, todo: Sequence[Subject], most: int | None) -> Iterator[str]:
    """Yield what a dry run prints: the number of candidates of each subject, and its default."""
    for kernel, shape in todo:
        found = candidates(kernel, arch, shape.head_dim, most)
        yield f"{kernel} D={shape.head_dim}: {len(found)} candidates, default {found[0]}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="to measure for, at most")
    parser.add_argument("--out", type=Path, help="a Python file to write, not the user's table in the cache folder")
    parser.add_argument("--candidates", type=int, help=f"of a kernel, at most; the first {MOST_VETTED} are vetted")
    parser.add_argument("--head-dims", default="", help="e.g. 64,128; all where not given")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates; write nothing")
    parser.add_argument("--arch", choices=ARCHS, default="sm_90", help="of a dry run")
    options = parser.parse_args(arguments)
    todo = subjects([int(text) for text in options.head_dims.split(",")] if options.head_dims else None)
    if options.dry_run:
        print("\n".join(plan(options.arch, todo, options.candidates)))
        return
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to measure on; --dry-run lists what would be measured")
    name = measured.machine()
    arch = configs.family(configs.architecture(torch.empty(0, device="cuda")))

    def store(found: Table) -> None:
        if options.out is None:
            measured.save(name, found)
        else:  # in one step: a run may be killed while it writes
            scratch = options.out.with_name(f".{options.out.name}.partial")
            scratch.write_text(source(arch, found, f"Last run: {name} ({arch})."), encoding="utf-8")
            scratch.replace(options.out)

    tune(arch, options.minutes, todo, store, most=options.candidates)
    print(f"wrote {options.out or measured.path()}")


if __name__ == "__main__":
    main()
