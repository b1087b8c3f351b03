"""The items of every process of the two calls, in order of value, and the seconds each is planned for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.gpu import compile_ahead, correctness, generation, machine, ops, profiles, tests, tuner, whole_model
from bench.gpu.worker import Item

NCU_CASES = (
    "frame_attention/1B-256p-7f/bf16/forward+backward",
    "frame_attention/3B-256p-7f/bf16/forward+backward",
)
CASE_SECONDS, LONG_CASE_SECONDS = 6.0, 5.0
# Of the time for JIT rivals. Those that are not named get what these leave over, as do all where one is not installed.
JIT_WEIGHTS = {
    "flex_attention": 5.0,
    "flash-attn-4 per frame": 2.5,
    "cudnn.flex_attention": 2.5,
    "QuACK": 3.0,
    "Liger": 2.0,
    "Liger chain": 1.5,
    "flash-attn-4 causal": 1.0,
}
OTHER_WEIGHT = 0.2


def prepare(dry_run: bool) -> list[Item]:
    """Return the items before anything of ours is measured: the kernels are compiled, compared with fp64 and tuned."""
    return [
        Item("compile ahead", 5, compile_ahead.start),  # before CUDA is initialised: its processes are forked
        Item("machine", 5, machine.describe),
        Item("ceilings", 7, machine.ceilings),
        Item("compiled", 18, compile_ahead.finish),
        Item("correctness", 36, correctness.find),
        Item("tune", 48, tuner.find),
    ]


def measure(dry_run: bool) -> list[Item]:
    """Return the items that measure what was tuned: cases, steps, where a step's time goes."""
    cases, long_cases = (ops.SMOKE_CASES[:1], ops.SMOKE_CASES[1:]) if dry_run else (ops.CASES, ops.LONG_CASES)
    profiled = ops.SMOKE_CASES[:1] if dry_run else NCU_CASES
    return [
        Item("self-check", 8, machine.check),
        *(Item(f"case {key}", CASE_SECONDS, ops.case_finder(key)) for key in cases),
        Item("step, larger", 16, whole_model.step_finder(-1)),
        Item("step, smaller", 8, whole_model.step_finder(0)),
        Item("losses", 6, whole_model.losses),
        Item("kernels of a step", 8, whole_model.kernel_table),
        *(Item(f"ncu {key}", 20, profiles.finder(key)) for key in profiled),
        Item("launches", 6, whole_model.launches),
        *(Item(f"case {key}", LONG_CASE_SECONDS, ops.case_finder(key)) for key in long_cases),
    ]


def prove(dry_run: bool) -> list[Item]:
    """Return the items that prove the kernels right."""
    return [
        Item("compile ahead", 5, compile_ahead.start),
        Item("machine", 5, machine.describe),
        Item("compiled", 8, compile_ahead.finish),
        Item("tests", 85, tests.find),
        Item("sanitizer", 20, tests.sanitizer),
    ]


def compare(dry_run: bool) -> list[Item]:
    """Return the items that need the rivals' libraries, then generation and the steps that take long."""
    pairs = ops.SMOKE_JIT if dry_run else ops.jit_pairs("cuda", ops.JIT_CASES)
    weights = [JIT_WEIGHTS.get(rival, OTHER_WEIGHT) for _, rival in pairs]
    shares = [ops.JIT_SECONDS * weight / sum(weights) for weight in weights]
    return [
        Item("self-check", 8, machine.check),
        *(
            Item(f"jit {key}: {rival}", share, ops.jit_finder(key, rival))
            for (key, rival), share in zip(pairs, shares, strict=True)
        ),
        Item("generation", 12, generation.eager),
        Item("graphs", 18, generation.graphs),
        Item("official step", 14, whole_model.official_step),
        Item("longest", 16, whole_model.longest),
    ]


# The names of suite.CALLS.
ITEMS: Mapping[str, Callable[[bool], list[Item]]] = {
    "prepare": prepare,
    "measure": measure,
    "prove": prove,
    "compare": compare,
}
