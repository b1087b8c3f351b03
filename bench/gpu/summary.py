"""The suite's result to read: what passed, what was reached, what may be chosen automatically."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import report


def markdown(result: Mapping[str, Any]) -> str:
    environment = result["environment"]
    title = f"{environment['device_name']}, {environment['date'][:10]}" if environment else "unknown machine"
    lines = [f"# GPU suite: {title}", ""]
    if result["settings"]["dry_run"]:
        lines += ["A dry run on a CPU at small sizes: no figure of it means anything.", ""]
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        lines += [f"{versions}; commit {environment['commit']}{' (changed)' if environment['dirty'] else ''}.", ""]
    lines += table(("part", "status", "seconds"), ((n, p["status"], p["wall_s"]) for n, p in result["parts"].items()))
    lines += _verdicts(result["verdicts"]) + _gates(result["gates"])
    data = {name: part["data"] or {} for name, part in result["parts"].items()}
    lines += _tests(data.get("tests", {})) + _sanitizer(data.get("sanitizer", {}))
    lines += _ceilings(data.get("ceilings", {})) + _model(data.get("model", {}))
    lines += _rest(data)
    for case in data.get("ops", {}).get("cases") or []:
        lines += ["", f"## {case['case']}", "", *report.case_table(case)]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells] + [""]


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not verdicts:
        return []
    rows = [
        (
            v["op"],
            v["impl"],
            v["arch"],
            v["tests"],
            v["sanitizer"],
            "; ".join(v["reasons"])[:600] or "**may be entered**",
        )
        for v in verdicts
    ]
    header = ("op", "impl", "arch", "tests", "sanitizer", "verdict")
    return ["## What may be entered in dispatch.PROVEN", "", *table(header, rows)]


def _gates(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            gate["name"],
            gate["impl"] or "-",
            "-" if gate["value"] is None else f"{gate['value']:.3g}",
            gate["gate"],
            gate["goal"],
            gate["status"] + (f" ({gate['reason'][:120]})" if gate["reason"] else ""),
        )
        for gate in gates
    ]
    return ["## Gates and goals", "", *table(("what", "impl", "value", "gate", "goal", "status"), rows)]


def _tests(data: Mapping[str, Any]) -> list[str]:
    tests = data.get("tests")
    if tests is None:
        return []
    counts = Counter((" ".join(test["pair"]), test["outcome"]) for test in tests if test["pair"])
    lines = ["## Tests", "", *table(("implementation", "outcome", "tests"), ((*key, n) for key, n in counts.items()))]
    for test in tests:
        if test["outcome"] not in ("passed", "skipped"):
            lines += [f"**{test['test']}** {test['outcome']}", "", "```", test.get("reason", "")[-800:], "```", ""]
    return lines + [f"{op}: {problem}\n" for op, problems in data.get("incomplete", {}).items() for problem in problems]


def _sanitizer(data: Mapping[str, Any]) -> list[str]:
    runs = data.get("runs")
    if not runs:
        return []
    rows = ((run["op"], run["impl"], run["tool"], run["status"], run["errors"]) for run in runs)
    return ["## compute-sanitizer", "", *table(("op", "impl", "tool", "status", "errors"), rows)]


def _ceilings(data: Mapping[str, Any]) -> list[str]:
    if "matmul" not in data:
        return []
    return [f"Ceilings: copy {data['copy']['GB/s']:.0f} GB/s, matmul {data['matmul']['TFLOP/s']:.0f} TFLOP/s.", ""]


def _model(data: Mapping[str, Any]) -> list[str]:
    rows = [
        (size, who, *_step_cells(found))
        for size, sides in (data.get("steps") or {}).items()
        for who, found in sides.items()
        if who != "losses"
    ]
    rows += [
        (f"{run['tokens']} tokens", "ours" + ", layers recomputed" * run["checkpointed"], *_step_cells(run))
        for run in data.get("longest") or []
    ]
    losses = [
        f"{size}: losses {sides['losses']}" for size, sides in (data.get("steps") or {}).items() if "losses" in sides
    ]
    header = ("batch", "side", "ms", "MFU", "peak GB")
    return (["## Training step", "", *table(header, rows), *losses, ""]) if rows else []


def _step_cells(found: Mapping[str, Any]) -> tuple[str, str, str]:
    if "failed" in found:
        return found["failed"][:80], "-", "-"
    mfu, peak = found["mfu"], found["peak_bytes"]
    cells = f"{found['seconds'] * 1e3:.1f}", "-" if mfu is None else f"{mfu:.1%}"
    return *cells, "-" if peak is None else f"{peak / 1e9:.1f}"


def _rest(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    launched = data.get("launches", {})
    if "forward_per_layer" in launched:
        syncs = (launched.get("host_syncs") or {}).get("count", "not counted")
        lines += [
            f"Launches a layer: {launched['forward_per_layer']} forward, {launched['step_per_layer']} with backward;"
        ]
        lines += [f"host syncs a step: {syncs}.", ""]
    for frames, found in (data.get("generate", {}).get("frames") or {}).items():
        lines += [f"Generation, {frames} frames: {found.get('failed') or format(found['seconds'], '.2f') + ' s'}.", ""]
    for name, found in (data.get("tune", {}).get("tuners") or {}).items():
        lines += [f"Tuner of {name}: {found['status']}.", ""]
    missing = data.get("environment", {}).get("missing_rivals") or {}
    return lines + [f"Missing rival, {name}: {reason}.\n" for name, reason in missing.items()]
