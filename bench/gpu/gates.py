"""Where an implementation becomes the automatic choice on an H100 ("gate"), and what it is aimed at ("goal").

Each is a ratio of two things measured in one run, a share of a ceiling, or an amount of memory; docs/benchmarks.md has
the table. evaluate() reads them off a result of the suite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    required: must be measured before the implementation can be the automatic choice; the others count where measured.
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
    """Every gate for every GPU implementation that the result has figures of, then the whole model's.

    {"op", "impl", "name", "case", "contestant", "value", "gate", "goal", "required", "status", "reason"}, where status
    is "goal", "reached", "missed" or "not measured". case is the longest pass that the value needs.
    """
    records = {case["case"]: case for case in (_data(result, "ops").get("cases") or [])}
    found = []
    for gate in GATES:
        for impl in _implementations(records, gate.op) or [None]:
            found.append(_judge(gate, impl, records))
    return found + list(_whole_model(result))


def _data(result: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return (result["parts"].get(part) or {}).get("data") or {}


def _implementations(records: Mapping[str, Any], op: str) -> list[str]:
    names = [row["contestant"] for case in records.values() if case["op"] == op for row in case["rows"]]
    ours = [name.removeprefix("lumos ") for name in dict.fromkeys(names) if name.startswith("lumos ")]
    return [impl for impl in ours if impl not in ("reference", "native")]


def _judge(gate: Gate, impl: str | None, records: Mapping[str, Any]) -> dict[str, Any]:
    passes = BOTH if gate.what == "backward" else BOTH[:1] if gate.what == "forward" else BOTH[1:]
    cases = [gate.case + suffix for suffix in passes]
    entry = {"op": gate.op, "impl": impl, "name": gate.name, "case": cases[-1], "contestant": f"lumos {impl}"}
    entry |= {"gate": gate.gate, "goal": gate.goal, "required": gate.required, "value": None, "reason": ""}
    rows = []
    for case in cases:
        by_name = {row["contestant"]: row for row in records.get(case, {"rows": []})["rows"]}
        for name in (f"lumos {impl}", *([gate.rival] if gate.rival else [])):
            row = by_name.get(name)
            if row is None or row["status"] != "ok":
                why = f"{row['status']}, {row['reason']}" if row else "no row"
                return {**entry, "status": "not measured", "reason": f"{case}: {name}: {why}"}
            rows.append(row)
    value = _value(gate, rows, records[cases[-1]]["work"]["amount"], records)
    if value is None:
        return {**entry, "status": "not measured", "reason": "the figures do not give one"}
    return {**entry, "value": value, "status": grade(value, gate.gate, gate.goal)}


def grade(value: float, gate: float, goal: float) -> str:
    """Fewer is better where the goal lies below the gate."""
    sign = 1 if goal >= gate else -1
    return "goal" if sign * value >= sign * goal else "reached" if sign * value >= sign * gate else "missed"


def _value(gate: Gate, rows: list[Mapping[str, Any]], work: int, records: Mapping[str, Any]) -> float | None:
    if gate.kind == "gigabytes":
        extra = rows[0]["peak_extra_bytes"]
        return None if extra is None else extra / 1e9
    if gate.kind == "rate":
        return rows[0]["rate"] / rows[1]["rate"]
    if gate.kind == "bandwidth":
        seconds = rows[0]["median_s"]
        if gate.what == "backward":
            seconds, work = rows[1]["median_s"] - seconds, work - records[gate.case + BOTH[0]]["work"]["amount"]
        return work / seconds / 1e9 / HBM_GB_S if seconds > 0 else None
    if gate.what == "backward":
        ours, theirs = (rows[i + 2]["median_s"] - rows[i]["median_s"] for i in (0, 1))
        return theirs / ours if ours > 0 else None
    return rows[1]["ratio"] / rows[0]["ratio"]  # both against the best of ours, round by round


def _whole_model(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The model's aims: they decide nothing in dispatch, and are reported."""
    steps, launched = _data(result, "model").get("steps", {}), _data(result, "launches")
    largest = next(
        (sides.get("ours", {}) for sides in steps.values() if sides.get("ours", {}).get("tokens", 0) > 28000), {}
    )
    longest = [run for run in _data(result, "model").get("longest", []) if run.get("seconds")]
    seven = _data(result, "generate").get("frames", {}).get("7", {})
    syncs = (launched.get("host_syncs") or {}).get("count")
    figures = (
        ("training step, 1B, 7 frames of 384p: seconds", largest.get("seconds"), 0.85, 0.85),
        ("training step, 1B, 7 frames of 384p: share of the peak (MFU)", largest.get("mfu"), 0.45, 0.45),
        ("longest step that fits: tokens", max((run["tokens"] for run in longest), default=None), 90000, 90000),
        ("kernel launches a layer, forward", launched.get("forward_per_layer"), 15, 15),
        ("host syncs a step", syncs, 0, 0),
        ("generation, 1B, 7 frames of 256p, 50 steps, guidance: seconds", seven.get("seconds"), 12.0, 12.0),
    )
    for name, value, gate, goal in figures:
        fewer = not name.endswith(("(MFU)", "tokens"))
        status = (
            "not measured" if value is None else "goal" if (value <= goal if fewer else value >= goal) else "missed"
        )
        entry = {"op": "model", "impl": None, "name": name, "case": None, "contestant": None, "reason": ""}
        yield {**entry, "value": value, "gate": gate, "goal": goal, "required": False, "status": status}
