"""Two aims on an H100: what an implementation reaches before the docs claim its speed ("gate"), and what it is for
("goal").

Each is a ratio of two things measured in one run, a share of a ceiling, or an amount of memory; docs/benchmarks.md has
the table. evaluate() reads them off a result of the suite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu.results import cases, data

HBM_GB_S = 3000.0  # what an H100's memory reaches: the floor of mm_rope is stated against it
BOTH = "/forward", "/forward+backward"


@dataclass(frozen=True)
class Gate:
    """One aim for an op.

    case: without the pass, e.g. "mm_rope/1B-256p-7f/bf16". what: "forward", "backward" (the difference of the two
        passes) or "both" (forward and backward together).
    rival: contestant whose time over ours is the value; None for the kinds below.
    kind: "time" (how many times as long the rival takes), "rate" (our rate over the rival's), "bandwidth" (share of
        HBM_GB_S) or "gigabytes" (of extra memory, fewer is better).
    required: must be measured before anything is claimed; the others count where measured.
    """

    case: str
    what: str
    kind: str
    gate: float
    goal: float
    rival: str | None = None
    required: bool = False

    @property
    def op(self) -> str:
        return self.case.split("/")[0]

    @property
    def name(self) -> str:
        against = {"bandwidth": f"share of {HBM_GB_S / 1000:.1f} TB/s", "gigabytes": "extra GB"}.get(self.kind)
        return f"{self.case} {self.what}: {against or f'{self.kind} against {self.rival}'}"


def _rope(rival: str, gate: float, goal: float, required: bool = False) -> tuple[Gate, ...]:
    return tuple(
        Gate("mm_rope/1B-256p-7f/bf16", what, "time", gate, goal, rival, required) for what in ("forward", "backward")
    )


GATES = (
    Gate("mm_rope/1B-256p-7f/bf16", "forward", "bandwidth", 0.75, 0.92, required=True),
    Gate("mm_rope/1B-256p-7f/bf16", "backward", "bandwidth", 0.75, 0.92, required=True),
    *_rope("official style", 8.0, 15.0, required=True),
    *_rope("Liger chain", 2.0, 3.0),
    Gate("frame_attention/3B-256p-7f/bf16", "forward", "time", 1.15, 1.65, "flex_attention", required=True),
    Gate("frame_attention/1B-256p-7f/bf16", "forward", "time", 1.15, 1.5, "flex_attention", required=True),
    Gate("frame_attention/3B-256p-7f/bf16", "backward", "time", 1.15, 1.9, "flex_attention", required=True),
    Gate("frame_attention/3B-256p-7f/bf16", "forward", "rate", 0.8, 1.0, "cuDNN causal"),
    Gate("frame_attention/3B-256p-7f/bf16", "forward", "rate", 0.8, 0.95, "flash-attn-4 causal"),
    Gate("frame_attention/3B-384p-7f/bf16", "forward", "time", 1.15, 1.65, "flex_attention"),
    Gate("frame_attention/3B-384p-7f/bf16", "backward", "time", 1.15, 1.9, "flex_attention"),
    Gate("tube_masked_loss/1B-384p-7f/bf16", "both", "time", 1.0, 1.5, "chunked cross entropy", required=True),
    Gate("tube_masked_loss/1B-384p-7f/bf16", "both", "time", 1.5, 3.3, "Liger"),
    Gate("tube_masked_loss/1B-384p-7f/bf16", "both", "time", 0.8, 1.0, "QuACK"),
    Gate("tube_masked_loss/1B-384p-7f/bf16", "both", "time", 0.8, 1.0, "torch linear_cross_entropy"),
    Gate("tube_masked_loss/1B-384p-7f/bf16", "both", "gigabytes", 1.2, 0.6, required=True),
    Gate("masked_sample/1B-256p-1f/bf16", "forward", "time", 1.0, 2.0, "chunked softmax", required=True),
)


def evaluate(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every gate for every GPU implementation that the result has figures of, then the whole model's.

    {"op", "impl", "name", "case", "contestant", "value", "gate", "goal", "required", "status", "reason"}, where status
    is "goal", "reached", "missed" or "not measured". case is the longest pass that the value needs.
    """
    records = cases(result)
    found = []
    for gate in GATES:
        for impl in _implementations(records, gate.op) or [None]:
            found.append(_judge(gate, impl, records))
    return found + list(_whole_model(result))


def _implementations(records: Sequence[Mapping[str, Any]], op: str) -> list[str]:
    """Return the GPU implementations as users call them. A name with a comma is ours with a backward forced on it."""
    names = [row["contestant"] for case in records if case["op"] == op for row in case["rows"]]
    ours = [name.removeprefix("lumos ") for name in dict.fromkeys(names) if name.startswith("lumos ")]
    return [impl for impl in ours if impl not in ("reference", "native") and "," not in impl]


def _judge(gate: Gate, impl: str | None, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    passes = BOTH if gate.what == "backward" else BOTH[:1] if gate.what == "forward" else BOTH[1:]
    keys = [gate.case + suffix for suffix in passes]
    entry = {"op": gate.op, "impl": impl, "name": gate.name, "case": keys[-1], "contestant": f"lumos {impl}"}
    entry |= {"gate": gate.gate, "goal": gate.goal, "required": gate.required, "value": None, "reason": ""}
    rows, work = [], []
    for key in keys:
        names = (f"lumos {impl}", *([gate.rival] if gate.rival else []))
        met, reason = _met(key, names, records)
        if reason:
            return {**entry, "status": "not measured", "reason": reason}
        rows += met[0]
        work.append(met[1])
    value = _value(gate, rows, work)
    if value is None:
        return {**entry, "status": "not measured", "reason": "the figures do not give one"}
    return {**entry, "value": value, "status": grade(value, gate.gate, gate.goal)}


def _met(key: str, names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> tuple[tuple[list[Any], int], str]:
    """Return the rows of a record of the case in which all the names have figures, and its work; or why none has."""
    reason = f"{key}: {names[-1]}: no row"
    for record in records:
        by_name = {row["contestant"]: row for row in record["rows"] if record["case"] == key}
        bad = [name for name in names if name not in by_name or by_name[name]["status"] != "ok"]
        if not bad and by_name:
            return ([by_name[name] for name in names], record["work"]["amount"]), ""
        reason = next(
            (f"{key}: {n}: {by_name[n]['status']}, {by_name[n]['reason']}" for n in bad if n in by_name), reason
        )
    return ([], 0), reason


def grade(value: float, gate: float, goal: float) -> str:
    """Return "goal", "reached" or "missed". Fewer is better where the goal lies below the gate."""
    sign = 1 if goal >= gate else -1
    return "goal" if sign * value >= sign * goal else "reached" if sign * value >= sign * gate else "missed"


def _value(gate: Gate, rows: list[Mapping[str, Any]], work: list[int]) -> float | None:
    if gate.kind == "gigabytes":
        extra = rows[0]["peak_extra_bytes"]
        return None if extra is None else extra / 1e9
    if gate.kind == "rate":
        return rows[0]["rate"] / rows[1]["rate"]
    if gate.kind == "bandwidth":
        seconds, amount = rows[0]["median_s"], work[0]
        if gate.what == "backward":
            seconds, amount = rows[1]["median_s"] - seconds, work[1] - amount
        return amount / seconds / 1e9 / HBM_GB_S if seconds > 0 else None
    if gate.what == "backward":
        ours, theirs = (rows[i + 2]["median_s"] - rows[i]["median_s"] for i in (0, 1))
        return theirs / ours if ours > 0 else None
    return rows[1]["ratio"] / rows[0]["ratio"]  # both against the best of ours, round by round


def _whole_model(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the model's aims. They are reported and prove nothing."""
    large, launched = data(result, "step, larger").get("ours", {}), data(result, "launches")
    long = data(result, "longest")
    tokens = long["tokens"] if (long.get("step") or {}).get("seconds") else None
    syncs = (data(result, "kernels of a step").get("host_syncs") or {}).get("count")
    third = next(iter((data(result, "generation").get("frames") or [])[2:]), None)
    figures = (
        ("training step, 1B, 7 frames of 384p: seconds", large.get("seconds"), 0.85, 0.85),
        ("training step, 1B, 7 frames of 384p: share of the peak (MFU)", large.get("mfu"), 0.45, 0.45),
        ("a step that fits: tokens", tokens, 90000, 90000),
        ("kernel launches a layer, forward", launched.get("forward_per_layer"), 15, 15),
        ("host syncs a step", syncs, 0, 0),
        ("generation, 1B, third frame of 256p, 50 steps, guidance: seconds", third, 12.0 / 7, 12.0 / 7),
    )
    for name, value, gate, goal in figures:
        fewer = not name.endswith(("(MFU)", "tokens"))
        status = (
            "not measured" if value is None else "goal" if (value <= goal if fewer else value >= goal) else "missed"
        )
        entry = {"op": "model", "impl": None, "name": name, "case": None, "contestant": None, "reason": ""}
        yield {**entry, "value": value, "gate": gate, "goal": goal, "required": False, "status": status}
