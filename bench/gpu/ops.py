"""Cases of the benchmark registry as items: ours against what starts at once, then against each JIT rival alone.

A case is checked against the reference before it is timed. What raises becomes a row with the reason. A rival that
compiles at its first call (Contestant.jit) has an item of its own, with ours beside it, so that it costs
no other rival its figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bench import measure, registry, report
from bench.gpu.fused import attention_deterministic, attention_fused
from bench.registry import OURS, RIVAL, Case, Contestant

if TYPE_CHECKING:
    from bench.gpu.worker import Run

# By value: the cases that gates name first.
CASES = (
    "frame_attention/1B-256p-7f/bf16/forward+backward",
    "frame_attention/3B-256p-7f/bf16/forward+backward",
    "mm_rope/1B-256p-7f/bf16/forward+backward",
    "tube_masked_loss/1B-384p-7f/bf16/forward+backward",
    "masked_sample/1B-256p-1f/bf16/forward",
    "frame_attention/1B-256p-7f/bf16/forward",
    "frame_attention/3B-256p-7f/bf16/forward",
    "mm_rope/1B-256p-7f/bf16/forward",
)
LONG_CASES = (
    "frame_attention/1B-384p-7f/bf16/forward+backward",
    "frame_attention/3B-384p-7f/bf16/forward+backward",
    "frame_attention/3B-384p-7f/bf16/forward",
)
# Where JIT rivals are timed: the gates' shapes. Rivals that no pair names come after those that one names.
JIT_CASES = (
    "frame_attention/3B-256p-7f/bf16/forward+backward",
    "frame_attention/3B-256p-7f/bf16/forward",
    "tube_masked_loss/1B-384p-7f/bf16/forward+backward",
    "frame_attention/1B-256p-7f/bf16/forward",
    "mm_rope/1B-256p-7f/bf16/forward+backward",
    "mm_rope/1B-256p-7f/bf16/forward",
)
JIT_ORDER = (
    "flex_attention",
    "Liger",
    "Liger chain",
    "flash-attn-4 per frame",
    "cudnn.flex_attention",
    "QuACK",
    "flash-attn-4 causal",
)
JIT_SECONDS = 86.0  # of all of them together
SMOKE_CASES = ("frame_attention/tiny-smoke/bf16/forward+backward", "mm_rope/tiny-smoke/bf16/forward")
SMOKE_JIT = (("mm_rope/tiny-smoke/bf16/forward", "official style"),)  # a stand-in: none compiles in seconds on a CPU


def is_jit(contestant: Contestant) -> bool:
    """Return whether it compiles at its first call."""
    return contestant.jit


def backward_variants(case: Case, device: str) -> list[Contestant]:
    """Return ours with each backward pass forced, for attention with gradients: the tuned table chooses one of them."""
    if case.op != "frame_attention" or not case.backward:
        return []
    found = []
    for contestant in registry.ops()[case.op].contestants(case, device):
        impl = contestant.name.removeprefix("lumos ")
        if contestant.role != OURS or impl in ("reference", "flash"):
            continue

        def with_fused(inputs: registry.Inputs, impl: str = impl) -> tuple:
            return attention_fused(inputs.q, inputs.k, inputs.v, inputs.limits, impl)[:1]

        def with_deterministic(inputs: registry.Inputs, impl: str = impl) -> tuple:
            return (attention_deterministic(inputs.q, inputs.k, inputs.v, inputs.limits, impl),)

        found.append(Contestant(f"{contestant.name}, fused backward", with_fused, OURS))
        found.append(Contestant(f"{contestant.name}, deterministic backward", with_deterministic, OURS))
    return found


def contestants(case: Case, device: str) -> list[Contestant]:
    """Return ours and those who start at once. Our reference takes part where nothing else of ours does."""
    able = registry.ops()[case.op].contestants(case, device)
    ours = [one for one in able if one.role == OURS]
    if len(ours) > 1:
        ours = [one for one in ours if one.name not in ("lumos reference", "lumos flash")]
    others = [one for one in able if one.role != OURS and not is_jit(one)]
    return [*ours, *backward_variants(case, device), *others]


def jit_contestants(case: Case, device: str, rival: str) -> list[Contestant]:
    """Return ours, the yardstick that sets the tolerance, and the rival."""
    bench = registry.ops()[case.op]
    able = contestants(case, device)
    kept = [one for one in able if one.role == OURS or one.name == bench.yardstick]
    return kept + [one for one in bench.contestants(case, device) if one.name == rival]


def measured(run: Run, case: Case, fighting: Sequence[Contestant], missing: dict[str, str]) -> None:
    """Record the case; "at" says meanwhile who is running."""

    def announce(name: str) -> None:
        run["at"] = name

    rows = measure.measure_case(
        case,
        run.device,
        0.02 if run.dry_run else 1.0,
        with_memory=not run.dry_run,  # on a CPU each peak takes a process of its own
        contestants=list(fighting),
        tolerant=True,
        announce=announce,
    )
    rows += [measure.Row(name, RIVAL, "missing", reason) for name, reason in missing.items()]
    run.data.pop("at", None)
    run["record"] = report.case_record(case, rows)


def case_finder(key: str) -> Callable[[Run], None]:
    """Return what an item does for a case: ours against those who start at once."""

    def find(run: Run) -> None:
        case = registry.find(key)
        bench = registry.ops()[case.op]
        eager = {rival.name for rival in bench.rivals if not is_jit(rival)}
        missing = {name: why for name, why in bench.missing(case, run.device).items() if name in eager}
        measured(run, case, contestants(case, run.device), missing)

    return find


def jit_finder(key: str, rival: str) -> Callable[[Run], None]:
    """Return what an item does for a JIT rival: ours against it alone, or why it is missing."""

    def find(run: Run) -> None:
        case = registry.find(key)
        why = registry.ops()[case.op].missing(case, run.device).get(rival)
        if why is not None:
            row = measure.Row(rival, RIVAL, "missing", why)
            run["record"] = report.case_record(case, [row])
            return
        measured(run, case, jit_contestants(case, run.device, rival), {})

    return find


def jit_pairs(device: str, keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return (case, JIT rival) by value: the named rivals at every case, then the others."""

    def place(pair: tuple[str, str]) -> tuple[int, int]:
        key, rival = pair
        return (JIT_ORDER.index(rival) if rival in JIT_ORDER else len(JIT_ORDER), keys.index(key))

    pairs = []
    for key in keys:
        case = registry.find(key)
        rivals = [one for one in registry.ops()[case.op].rivals if is_jit(one) and one.available(case, device)]
        pairs += [(key, rival.name) for rival in rivals]
    return sorted(pairs, key=place)
