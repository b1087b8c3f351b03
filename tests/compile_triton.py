"""Compiles the Triton kernels for GPUs that are not there, and reports what ptxas made of them.

    python tests/compile_triton.py            prints the resources of every case on every architecture
    python tests/compile_triton.py --json     the same as JSON lines, for test_triton_compile.py

A case (triton_cases.py) is a call of an implementation's host function with CPU tensors. Its launches are intercepted
and compiled by Triton's own run-time path, so a case sees the very specialization (dtypes, alignment, constexprs,
options) that a GPU would get, and needs no second copy of a kernel's signature. To add an op, add its cases to CASES.

Another Triton serves where PYTHONPATH begins with a folder that holds one. Every Triton since 3.6 brings ptxas and
cuobjdump for all architectures in its wheel, so nothing of the CUDA toolkit is needed.

Runs in a process of its own, without TRITON_INTERPRET: the interpreter's kernels cannot be compiled. Nothing here runs
a kernel: what compiles within its budget is not yet proven right or fast on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_cases import CASES, Budget, Case, lengths, vetted_cases, wrong_cases

ARCHS = (80, 90, 100)
MATMULS = {80: "HMMA", 90: "HGMMA", 100: "UTC"}  # first letters of the matrix instructions
THREAD_REGISTERS = 65536  # of an SM

# Messages of ptxas about wgmma instructions. Most name a loss, e.g. C7511: "Potential Performance Loss: wgmma.mma_async
# instructions are serialized due to insufficient register resources". C7519 only says that ptxas put in a fence.
_WGMMA_MESSAGE = re.compile(r"\((C75\d\d)\)(.*)")
_HARMLESS = "warpgroup.arrive is injected"


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    triton: str  # its version
    case: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    mnemonics: dict[str, int]  # memory and matrix instructions of interest
    messages: list[str]  # C75xx of ptxas that name a performance loss
    waits: int  # WARPGROUP.DEPBAR instructions: the warps wait there for wgmma instructions
    failures: list[str]  # what is outside the budget

    @property
    def waits_per_matmul(self) -> float:
        """WARPGROUP.DEPBAR per HGMMA, 0 without any."""
        matmuls = sum(times for name, times in self.mnemonics.items() if name.startswith("HGMMA"))
        return self.waits / matmuls if matmuls else 0.0

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


@dataclass(frozen=True)
class Launch:
    """One intercepted launch."""

    kernel: object  # as Triton compiled it
    options: dict[str, object]  # what the host function gave by name
    log: str  # of ptxas


_logs: dict[str, str] = {}  # by the hash of a kernel: Triton compiles it once a process


def compiled_launches(call: Callable[[], object], arch: int) -> list[Launch]:
    """The kernels that `call` would launch, compiled for `arch`."""
    launches = []
    original = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = original(self, *args, grid=grid, warmup=True, **options)
        if kernel is not None:
            launches.append(Launch(kernel, options, _logs.setdefault(kernel.hash, log.getvalue())))
        return kernel

    driver.set_active(AbsentGpu(arch))
    JITFunction.run = compile_only
    # Triton prints the log of ptxas only when it runs it, so nothing may come from its cache.
    with mock.patch.multiple(triton.knobs.nvidia, dump_ptxas_log=True):
        try:
            with mock.patch.multiple(triton.knobs.compilation, always_compile=True):
                call()
        finally:
            JITFunction.run = original
    return launches


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


def resources(case: Case, launch: Launch, arch: int) -> Resources:
    kernel = launch.kernel
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
        triton=triton.__version__,
        case=case.name,
        kernel=kernel.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=registers,
        spills=sum(opcode.startswith(("STL", "LDL")) for opcode in opcodes),
        shared=kernel.metadata.shared,
        instructions=len(opcodes),
        mnemonics=mnemonics,
        messages=sorted(code for code, text in _WGMMA_MESSAGE.findall(launch.log) if _HARMLESS not in text),
        waits=sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes),
        failures=[],
    )
    if "registers" not in launch.log:
        found.failures.append("the log of ptxas holds nothing that this harness can read")
    if "enable_fp_fusion" not in launch.options:
        found.failures.append("launched without enable_fp_fusion: its default differs between versions of Triton")
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
    if len(found.messages) > budget.messages:
        yield f"ptxas says {' '.join(found.messages)}, budget {budget.messages} such messages"
    if found.waits_per_matmul > budget.waits_per_matmul:
        yield f"{found.waits_per_matmul:.2f} WARPGROUP.DEPBAR per HGMMA, budget {budget.waits_per_matmul}"
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


def all_resources(
    archs: Iterable[int], cases: Iterable[Callable[[], Iterator[Case]]], only: str = ""
) -> Iterator[Resources]:
    seen = set()
    every = itertools.chain.from_iterable(some() for some in cases)
    for case in (case for case in every if case.name.startswith(only)):
        for arch in archs:
            launches = compiled_launches(case.call, arch)
            launched, expected = [launch.kernel.name for launch in launches], list(case.budgets)
            if launched != expected:
                raise AssertionError(f"{case.name} launches {launched}, not {expected}")
            for launch in launches:
                if launch.kernel.hash not in seen:  # two cases may share a second stage
                    seen.add(launch.kernel.hash)
                    yield resources(case, launch, arch)


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
    parser.add_argument("--only", default="", help="cases whose names begin so")
    parser.add_argument("--wrong", action="store_true", help="the launch that is outside its budgets, instead of all")
    parser.add_argument(
        "--vetted", action="store_true", help="what frame_attention's tuner tries first, instead of all"
    )
    parser.add_argument("--variants", action="store_true", help="how often each kernel is compiled for many lengths")
    options = parser.parse_args()
    if options.variants:
        for name, calls in lengths().items():
            print(json.dumps({"op": name, **variants(calls, (options.arch or ARCHS)[0])}))
        return
    cases = [wrong_cases] if options.wrong else [vetted_cases] if options.vetted else CASES
    for found in all_resources(options.arch or ARCHS, cases, options.only):
        if options.json:
            print(json.dumps(dataclasses.asdict(found)), flush=True)
            continue
        mnemonics = " ".join(f"{name}x{times}" for name, times in sorted(found.mnemonics.items()))
        print(
            f"{found.case:36} {found.kernel:22} sm_{found.arch:<4} registers {found.registers:3}"
            f" warps {found.resident_warps:2} spills {found.spills:2} shared {found.shared:5}"
            f" code {found.instructions:5} waits {found.waits_per_matmul:.2f} {' '.join(found.messages)} {mnemonics}"
        )
        for failure in found.failures:
            print(f"    outside its budget: {failure}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
