"""The cases that compile_triton.py compiles: calls of host functions, and the budgets of their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from triton.runtime import driver


@dataclass(frozen=True)
class Budget:
    """The most a kernel may use, on every architecture, and what its machine code must and must not contain."""

    registers: int
    shared: int | dict[int, int] = 0  # bytes, or bytes by architecture
    spills: int = 0  # STL and LDL instructions
    messages: int = 0  # C75xx of ptxas that name a performance loss: wgmma instructions are serialised
    waits_per_matmul: float = 0.4  # WARPGROUP.DEPBAR per HGMMA on sm_90; 1 where every wgmma is waited for
    tensor_cores: bool = False  # the architecture's own matrix instruction: HMMA, HGMMA (wgmma), UTC*MMA (tcgen05)
    copy_engine: bool = False  # loads by the copy engine where there is one, and no other tile loads
    at_least: dict[str, int] = field(default_factory=dict)  # SASS mnemonic, e.g. "LDG.E.128" -> times
    at_most: dict[str, int] = field(default_factory=dict)
    ptx_without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    budgets: dict[str, Budget]  # by kernel name, in the order of the launches


def mm_rope_cases() -> Iterator[Case]:
    """Every configuration of the table at the 1B model's head counts, and the variants of the one for D = 64."""
    from lumos_kernels import tensors
    from lumos_kernels.mm_rope import triton as implementation
    from lumos_kernels.mm_rope.contract import Inputs, Norm, Rotated

    def call(backward, head_dim, dtype=torch.bfloat16, sizes=(48, 32, 8), norms=True, int64=False) -> None:
        tokens, q_heads, kv_heads = sizes
        qkv = torch.empty(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k = qkv[:, :q_heads], qkv[:, q_heads : q_heads + kv_heads]
        norm = Norm(*(torch.empty(min(kv_heads, 2), head_dim, dtype=dtype) for _ in range(2))) if norms else None
        positions = torch.empty(3, tokens, dtype=torch.int32)
        inputs = Inputs(q, k, positions, norm, norm, torch.empty(head_dim // 2), 1e-5)
        with mock.patch.object(tensors, "needs_int64_offsets", return_value=int64):
            if backward:
                implementation.backward(inputs, Rotated(torch.empty_like(q), torch.empty_like(k)))
            else:
                implementation.forward(inputs)

    # Two halves in and out, for q and for k, 16 bytes at a time. Narrow loads are for positions and the rows of norms.
    limits = {
        "at_least": {"LDG.E.128": 4, "STG.E.128": 4},
        "at_most": {"LDG.E.U16": 8, "LDG.E": 8, "STG.E.U16": 0},
        # A multiplication without .rn may be contracted into an FMA, and that of a position and its frequency must not.
        "ptx_without": ("mul.f32", "add.f32", "sub.f32"),
    }
    forward = Budget(registers=80, shared=512, **limits)  # 24 warps on an SM
    backward = Budget(registers=168, shared=2048, **limits)  # 12 warps
    sums = Budget(registers=64, shared=1024, at_least={"LDG.E.128": 16})  # of q or of k, 8 at once: 32 KB in flight
    variants = {
        "D=32": {"head_dim": 32},
        "D=64": {"head_dim": 64},
        "D=96": {"head_dim": 96},
        "D=128": {"head_dim": 128},
        "D=256": {"head_dim": 256},
        "D=64 fp32": {"head_dim": 64, "dtype": torch.float32},
        "D=64 without norms": {"head_dim": 64, "norms": False},
        "D=64 int64": {"head_dim": 64, "int64": True},
        "D=64, all sizes 1": {"head_dim": 64, "sizes": (1, 1, 1)},  # Triton makes such arguments constants
    }
    for name, variant in variants.items():
        run = functools.partial(call, False, **variant)
        yield Case(f"mm_rope forward {name}", run, {"_forward_kernel": forward})
        run = functools.partial(call, True, **variant)
        second_stage = {"_sum_partials_kernel": sums} if variant.get("norms", True) else {}
        yield Case(f"mm_rope backward {name}", run, {"_backward_kernel": backward, **second_stage})


def tube_masked_loss_cases() -> Iterator[Case]:
    """Every configuration of the tables at the 64,000 visual classes, and the variants of the one for bf16."""
    from lumos_kernels.tube_masked_loss import triton as implementation
    from lumos_kernels.tube_masked_loss.contract import Inputs, RowLoss, StatisticGradients, Wanted

    def call(backward, dtype=torch.bfloat16, classes=64000, weighted=True, trained=True) -> None:
        hidden, weight = torch.empty(4, 8, dtype=dtype), torch.empty(classes, 8, dtype=dtype)
        rows, per_row = torch.arange(4), torch.empty(4)
        inputs = Inputs(hidden, weight, rows, rows)
        wanted = Wanted(trained, torch.empty(weight.shape) if trained else None)
        if backward:
            implementation.backward(inputs, per_row, StatisticGradients(per_row, per_row), wanted)
        else:
            implementation.forward(inputs, RowLoss(per_row if weighted else None, 0.1), wanted)

    # 64 registers are two programs of 16 warps on an SM, or one of 32. The narrow access is the target's logit.
    wide = {"LDG.E.128": 4, "STG.E.128": 2}
    forward = Budget(registers=64, shared=256, at_least=wide, at_most={"LDG.E.U16": 1, "STG.E.U16": 0})
    reading = Budget(registers=64, shared=256, at_least={"LDG.E.128": 4}, at_most={"STG.E.128": 0, "STG.E.U16": 0})
    narrow = Budget(registers=64, shared=256)
    backward = Budget(registers=64, at_least={"LDG.E.128": 2, "STG.E.128": 2}, at_most={"LDG.E.U16": 0})
    variants = {
        "bf16": ({}, forward),
        "fp16": ({"dtype": torch.float16}, forward),
        "fp32": ({"dtype": torch.float32}, forward),
        "bf16 without row weights": ({"weighted": False}, forward),
        "bf16 without gradients": ({"trained": False}, reading),
        "bf16, classes no multiple of 16": ({"classes": 63999}, narrow),
        "bf16, one class": ({"classes": 1}, narrow),  # Triton makes a size of 1 a constant
    }
    for name, (variant, budget) in variants.items():
        run = functools.partial(call, False, **variant)
        yield Case(f"tube_masked_loss forward {name}", run, {"_loss_kernel": budget})
    for name, variant in {"bf16": {}, "fp16": {"dtype": torch.float16}, "fp32": {"dtype": torch.float32}}.items():
        run = functools.partial(call, True, **variant)
        yield Case(f"tube_masked_loss backward {name}", run, {"_gradient_kernel": backward})


def masked_sample_cases() -> Iterator[Case]:
    """The configuration at the 64,000 visual classes, with and without guidance and randomness."""
    from lumos_kernels.masked_sample import triton as implementation
    from lumos_kernels.masked_sample.contract import Inputs

    def call(guided=True, greedy=False, classes=64000, dtype=torch.bfloat16) -> None:
        hidden, weight = torch.empty(4, 8, dtype=dtype), torch.empty(classes, 8, dtype=dtype)
        keys = None if greedy else torch.empty(4, 2, dtype=torch.int64)
        implementation.forward(Inputs(hidden, hidden if guided else None, weight, keys, 3.0, 0.7))

    # No exchange through shared memory but that of the last reductions: a Philox counter's words stay in their thread.
    limits = {"shared": 256, "at_most": {"STS": 8, "LDS": 8}}
    one, two = (Budget(registers=64, **limits, at_least={"LDG.E.128": accesses}) for accesses in (2, 4))
    narrow = Budget(registers=104, **limits)
    variants = {
        "guided": ({}, two),
        "unguided": ({"guided": False}, one),
        "greedy": ({"greedy": True}, two),
        "classes no multiple of 16": ({"classes": 63999}, narrow),
        "one class": ({"classes": 1}, narrow),
    }
    for name, (variant, budget) in variants.items():
        yield Case(f"masked_sample {name}", functools.partial(call, **variant), {"_sample_kernel": budget})


def frame_attention_cases() -> Iterator[Case]:
    """Every default configuration, at the 1B model's head counts with q, k and v as slices of one projection."""
    from lumos_kernels import RowLimits, tensors
    from lumos_kernels.frame_attention.contract import Inputs, OutputGradients, Outputs
    from lumos_kernels.frame_attention.triton import backward, configs, forward

    def call(what, head_dim, dtype=torch.bfloat16, int64=False) -> None:
        q_heads, kv_heads, tokens = 32, 8, 300
        qkv = torch.empty(tokens, q_heads + 2 * kv_heads, head_dim, dtype=dtype)
        q, k, v = qkv.split([q_heads, kv_heads, kv_heads], 1)
        limits = RowLimits(*(torch.zeros(tokens, dtype=torch.int32) for _ in range(4)))
        arch = f"sm_{driver.active.get_current_device()}"
        with (
            mock.patch.object(configs, "architecture", return_value=arch),
            mock.patch.object(configs, "fuses_backward", return_value=what == "fused backward"),
            mock.patch.object(tensors, "needs_int64_offsets", return_value=int64),
        ):
            inputs = Inputs(q, k, v, limits, 0.125)
            if what == "forward":
                forward(inputs)
            else:
                outputs = Outputs(torch.empty(q.shape, dtype=dtype), torch.empty(q_heads, tokens))
                backward(inputs, outputs, OutputGradients(*map(torch.empty_like, outputs)), deterministic=False)

    # The sm_80 configurations serve sm_86, sm_89 and sm_120 too, whose blocks get 99 KB; later ones get 227 KB.
    shared = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
    tiles = Budget(registers=255, shared=shared, tensor_cores=True, copy_engine=True)
    spills = 20 if triton.__version__.startswith("3.6.") else 8
    fp32 = Budget(registers=255, shared=shared, spills=spills)  # on the FMA units: right, not fast
    delta, rounding = Budget(registers=96, shared=2048), Budget(registers=32)
    kernels = {
        "forward": {"_forward_kernel": tiles},
        "backward": {"_delta_kernel": delta, "_key_kernel": tiles, "_query_kernel": tiles},
        "fused backward": {"_delta_kernel": delta, "_key_kernel": tiles, "_round_kernel": rounding},
    }
    for what, budgets in kernels.items():
        for head_dim in configs.HEAD_DIMS:
            run = functools.partial(call, what, head_dim)
            yield Case(f"frame_attention {what} D={head_dim}", run, budgets)
    run = functools.partial(call, "backward", 64, int64=True)
    yield Case("frame_attention backward D=64 int64", run, kernels["backward"])
    for what in ("forward", "backward"):
        run = functools.partial(call, what, 128, dtype=torch.float32)
        slow = {name: fp32 if budget is tiles else budget for name, budget in kernels[what].items()}
        yield Case(f"frame_attention {what} D=128 fp32", run, slow)


def lengths() -> dict[str, list[Callable[[], object]]]:
    """Forward and backward over streams of many lengths, of which only the memory's addresses are used."""
    from lumos_kernels import RowLimits
    from lumos_kernels.frame_attention import contract as attention_contract
    from lumos_kernels.frame_attention import triton as attention
    from lumos_kernels.frame_attention.triton import configs
    from lumos_kernels.mm_rope import contract as rope_contract
    from lumos_kernels.mm_rope import triton as rope

    def of(tokens: int) -> tuple:
        q, k, v = torch.empty(tokens, 48, 64, dtype=torch.bfloat16).split([32, 8, 8], 1)
        return q, k, v, torch.empty(q.shape, dtype=q.dtype)

    def attend(tokens: int, fused: bool = False, with_lse: bool = False) -> None:
        q, k, v, _ = of(tokens)
        limits = RowLimits(*(torch.empty(tokens, dtype=torch.int32) for _ in range(4)))
        with mock.patch.object(configs, "fuses_backward", return_value=fused):
            inputs = attention_contract.Inputs(q, k, v, limits, 0.125)
            outputs = attention.forward(inputs)
            grad = attention_contract.OutputGradients(outputs.o, outputs.lse if with_lse else None)
            attention.backward(inputs, outputs, grad, deterministic=False)

    def rotate(tokens: int) -> None:
        q, k, *_ = of(tokens)
        norm = rope_contract.Norm(torch.empty(1, 64), torch.empty(1, 64))
        positions = torch.empty(3, tokens, dtype=torch.int32)
        inputs = rope_contract.Inputs(q, k, positions, norm, norm, torch.empty(32), 1e-5)
        rope.backward(inputs, rope.forward(inputs))

    tokens = (2, 32, 33, 300, 2_000, 7_000, 12_796, 13_000, 28_900, 89_848)
    return {
        "frame_attention": [functools.partial(attend, count) for count in tokens],
        "frame_attention fused": [functools.partial(attend, count, fused=True) for count in tokens],
        "frame_attention with a gradient of lse": [functools.partial(attend, count, with_lse=True) for count in tokens],
        "mm_rope": [functools.partial(rotate, count) for count in tokens],
    }


def vetted_cases() -> Iterator[Case]:
    """The configurations of frame_attention that the tuner tries first, for the two models' head sizes on sm_90."""
    from lumos_kernels import RowLimits
    from lumos_kernels.frame_attention.contract import Inputs, Outputs
    from lumos_kernels.frame_attention.triton import tune

    tiles = Budget(registers=255, shared=227 * 1024, tensor_cores=True, copy_engine=True)
    others = {"_delta_kernel": Budget(registers=96, shared=2048)}
    kernels = {
        "forward": {"_forward_kernel": tiles},
        "dkdv": {**others, "_key_kernel": tiles, "_query_kernel": tiles},
        "dq": {**others, "_key_kernel": tiles, "_query_kernel": tiles},
        "fused": {**others, "_key_kernel": tiles, "_round_kernel": Budget(registers=32)},
    }
    with mock.patch.object(tune, "forward", lambda inputs: Outputs(torch.empty_like(inputs.q), torch.empty(32, 300))):
        for head_dim in (64, 128):
            q, k, v = torch.empty(300, 48, head_dim, dtype=torch.bfloat16).split([32, 8, 8], 1)
            limits = RowLimits(*(torch.zeros(300, dtype=torch.int32) for _ in range(4)))
            data = tune.Data(Inputs(q, k, v, limits, 0.125), torch.empty(q.shape, dtype=q.dtype))
            for kernel, found in tune.vetted("sm_90", head_dim).items():
                run = tune.runner(kernel, data)
                for config in found:
                    yield Case(f"{kernel} D={head_dim} {config}", run(config), kernels[kernel])


def wrong_cases() -> Iterator[Case]:
    """A launch that is outside of three budgets on sm_90: what a budget finds is tried on it.

    A forward of 128 x 128 with 4 warps at D = 64 needs more registers than there are, and ptxas serialises its wgmma.
    """
    from lumos_kernels import RowLimits
    from lumos_kernels.frame_attention.contract import Inputs
    from lumos_kernels.frame_attention.triton import configs, forward_with

    def call() -> None:
        q, k, v = torch.empty(300, 48, 64, dtype=torch.bfloat16).split([32, 8, 8], 1)
        limits = RowLimits(*(torch.zeros(300, dtype=torch.int32) for _ in range(4)))
        config = configs.Config(block_m=128, block_n=128, num_warps=4, num_stages=2, descriptors=True)
        options = configs.options

        def incomplete(*args) -> dict:
            return {name: value for name, value in options(*args).items() if name != "enable_fp_fusion"}

        with mock.patch.object(configs, "options", incomplete):
            forward_with(config, Inputs(q, k, v, limits, 0.125))

    yield Case("wrong", call, {"_forward_kernel": Budget(registers=255, shared=227 * 1024)})


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    mm_rope_cases,
    tube_masked_loss_cases,
    masked_sample_cases,
    frame_attention_cases,
)
