"""Compiles the Triton kernels for GPUs that are not there, and reports what ptxas made of them.

    python tests/compile_triton.py            prints the resources of every case on every architecture
    python tests/compile_triton.py --json     the same as JSON lines, for test_triton_compile.py

A case is a call of an implementation's host function with CPU tensors. Its launches are intercepted and compiled by
Triton's own run-time path, so a case sees the very specialization (dtypes, alignment, constexprs, options) that a GPU
would get, and needs no second copy of a kernel's signature. To add an op, add its cases to CASES.

Runs in a process of its own, without TRITON_INTERPRET: the interpreter's kernels cannot be compiled. Nothing here runs
a kernel: what compiles within its budget is not yet proven right or fast on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90, 100)
MATMULS = {80: "HMMA", 90: "HGMMA", 100: "UTC"}  # first letters of the matrix instructions
THREAD_REGISTERS = 65536  # of an SM


@dataclass(frozen=True)
class Budget:
    """The most a kernel may use, on every architecture, and what its machine code must and must not contain."""

    registers: int
    shared: int | dict[int, int] = 0  # bytes, or bytes by architecture
    spills: int = 0  # STL and LDL instructions
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


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    case: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    mnemonics: dict[str, int]  # memory and matrix instructions of interest
    failures: list[str]  # what is outside the budget

    @property
    def resident_warps(self) -> int:
        """Warps an SM holds, as far as registers decide (they are given out in units of 8 a thread)."""
        threads = THREAD_REGISTERS // (-(-self.registers // 8) * 8)
        return min(threads // 32 // self.num_warps * self.num_warps, 64)


class AbsentGpu:
    """Stands for Triton's driver: knows its target, cannot launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(call: Callable[[], object], arch: int) -> list:
    """The kernels that `call` would launch, compiled for `arch`."""
    kernels = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernels.append(original(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    driver.set_active(AbsentGpu(arch))
    JITFunction.run = compile_only
    try:
        call()
    finally:
        JITFunction.run = original
    return kernels


@functools.cache
def _cuobjdump() -> str:
    """The disassembler in Triton's wheel; one of those lies there for each generation of GPU."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_cuobjdump(), option, file.name], check=True, capture_output=True, text=True).stdout


_COUNTED = re.compile(r"(LD[GS]|ST[GS]|LDGSTS|HGMMA|HMMA|UTC\w*MMA|UTMALDG|UTMASTG|BAR)\b")


def resources(case: Case, kernel, arch: int) -> Resources:
    registers = int(re.search(r"REG:(\d+)", _dump(kernel.asm["cubin"], "-res-usage")).group(1))
    lines = _dump(kernel.asm["cubin"], "-sass").splitlines()
    opcodes = [
        match.group(1) for line in lines if (match := re.search(r"^\s+/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]+)", line))
    ]
    mnemonics: dict[str, int] = {}
    for opcode in filter(_COUNTED.match, opcodes):
        # Cache and scope suffixes vary between versions and mean nothing here: LDG.E.128.CONSTANT is LDG.E.128.
        short = re.sub(r"\.(CONSTANT|SYS|STRONG|GPU|EF|EL|NA|LU)\b", "", opcode)
        mnemonics[short] = mnemonics.get(short, 0) + 1
    found = Resources(
        case=case.name,
        kernel=kernel.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
        shared=kernel.metadata.shared,
        instructions=len(opcodes),
        mnemonics=mnemonics,
        failures=[],
    )
    if not opcodes:
        found.failures.append("the disassembly holds no instruction that this harness can read")
    found.failures.extend(_outside(case.budgets[kernel.name], found, kernel.asm["ptx"]))
    return found


def _outside(budget: Budget, found: Resources, ptx: str) -> Iterator[str]:
    for what in ("registers", "spills", "shared"):
        have, allowed = getattr(found, what), getattr(budget, what)
        allowed = allowed[found.arch] if isinstance(allowed, dict) else allowed
        if have > allowed:
            yield f"{have} {what}, budget {allowed}"
    # What does not fit in tensor memory compiles to an empty kernel: it is found here.
    if budget.tensor_cores and not any(name.startswith(MATMULS[found.arch]) for name in found.mnemonics):
        yield f"no {MATMULS[found.arch]} instruction"
    if budget.copy_engine and found.arch >= 90:
        if not any(name.startswith("UTMALDG") for name in found.mnemonics):
            yield "no UTMALDG instruction"
        if found.mnemonics.get("LDG.E.128", 0):
            yield f"{found.mnemonics['LDG.E.128']} LDG.E.128 beside the copy engine"
    for mnemonic, least in budget.at_least.items():
        if found.mnemonics.get(mnemonic, 0) < least:
            yield f"{found.mnemonics.get(mnemonic, 0)} {mnemonic}, at least {least} expected"
    for mnemonic, most in budget.at_most.items():
        if found.mnemonics.get(mnemonic, 0) > most:
            yield f"{found.mnemonics[mnemonic]} {mnemonic}, at most {most} expected"
    for text in budget.ptx_without:
        if text in ptx:
            yield f"PTX holds {text!r}"


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
    sums = Budget(registers=64, shared=1024, at_least={"LDG.E.128": 1})
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
    fp32 = Budget(registers=255, shared=shared, spills=8)  # on the FMA units: right, not fast
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

    def attend(tokens: int, fused: bool) -> None:
        q, k, v, _ = of(tokens)
        limits = RowLimits(*(torch.empty(tokens, dtype=torch.int32) for _ in range(4)))
        with mock.patch.object(configs, "fuses_backward", return_value=fused):
            inputs = attention_contract.Inputs(q, k, v, limits, 0.125)
            outputs = attention.forward(inputs)
            grad = attention_contract.OutputGradients(outputs.o, None)
            attention.backward(inputs, outputs, grad, deterministic=False)

    def rotate(tokens: int) -> None:
        q, k, *_ = of(tokens)
        norm = rope_contract.Norm(torch.empty(1, 64), torch.empty(1, 64))
        positions = torch.empty(3, tokens, dtype=torch.int32)
        inputs = rope_contract.Inputs(q, k, positions, norm, norm, torch.empty(32), 1e-5)
        rope.backward(inputs, rope.forward(inputs))

    tokens = (2, 32, 33, 300, 2_000, 7_000, 12_796, 13_000, 28_900, 89_848)
    return {
        "frame_attention": [functools.partial(attend, count, False) for count in tokens],
        "frame_attention fused": [functools.partial(attend, count, True) for count in tokens],
        "mm_rope": [functools.partial(rotate, count) for count in tokens],
    }


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    mm_rope_cases,
    tube_masked_loss_cases,
    masked_sample_cases,
    frame_attention_cases,
)


def all_resources(archs: Iterable[int]) -> Iterator[Resources]:
    seen = set()
    for case in itertools.chain.from_iterable(cases() for cases in CASES):
        for arch in archs:
            kernels = compiled_launches(case.call, arch)
            launched, expected = [kernel.name for kernel in kernels], list(case.budgets)
            if launched != expected:
                raise AssertionError(f"{case.name} launches {launched}, not {expected}")
            for kernel in kernels:
                if kernel.hash not in seen:  # two cases may share a second stage
                    seen.add(kernel.hash)
                    yield resources(case, kernel, arch)


def variants(calls: Iterable[Callable[[], object]], arch: int) -> dict[str, int]:
    """How often a GPU would compile each kernel that the calls launch; nothing is compiled here."""
    seen: dict[str, set] = {}

    def note(self, key, *args) -> None:
        seen.setdefault(self.fn.__name__, set()).add(key)

    with mock.patch.object(JITFunction, "_do_compile", note):
        for call in calls:
            compiled_launches(call, arch)
    return {kernel: len(keys) for kernel, keys in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object per compiled kernel")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHS, help="all three where not given")
    parser.add_argument("--variants", action="store_true", help="how often each kernel is compiled for many lengths")
    options = parser.parse_args()
    if options.variants:
        for name, calls in lengths().items():
            print(json.dumps({"op": name, **variants(calls, (options.arch or ARCHS)[0])}))
        return
    for found in all_resources(options.arch or ARCHS):
        if options.json:
            print(json.dumps(dataclasses.asdict(found)), flush=True)
            continue
        mnemonics = " ".join(f"{name}x{times}" for name, times in sorted(found.mnemonics.items()))
        print(
            f"{found.case:36} {found.kernel:22} sm_{found.arch:<4} registers {found.registers:3}"
            f" warps {found.resident_warps:2} spills {found.spills:2} shared {found.shared:5}"
            f" code {found.instructions:5} {mnemonics}"
        )
        for failure in found.failures:
            print(f"    outside its budget: {failure}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
