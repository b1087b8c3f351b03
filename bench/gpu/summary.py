"""The suite's result to read: what passed, what was reached, what the docs may claim. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.gpu.results import cases, data, first_call


def markdown(result: Mapping[str, Any]) -> str:
    """Return the whole result as Markdown."""
    environment = next((call["environment"] for call in result["calls"].values() if call["environment"]), None)
    title = f"{environment['device_name']}, {environment['date'][:10]}" if environment else "unknown machine"
    lines = [f"# GPU suite: {title}", ""]
    if first_call(result)["settings"]["dry_run"]:
        lines += ["A dry run on a CPU at small sizes: no figure of it means anything.", ""]
    for number, call in result["calls"].items():
        lines += _call(number, call)
    lines += _verdicts(result["verdicts"]) + _gates(result["gates"])
    lines += _ceilings(data(result, "ceilings")) + _checks(data(result, "correctness"))
    lines += _tests(data(result, "tests")) + _sanitizer(data(result, "sanitizer"))
    lines += _steps(result) + _kernels(data(result, "kernels of a step")) + _rest(result)
    for record in cases(result):
        lines += [f"## {record['case']}", "", *_case(record), ""]
    return "\n".join(lines) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells] + [""]


def _number(value: float | None, scale: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _call(number: str, call: Mapping[str, Any]) -> list[str]:
    environment, settings = call["environment"], call["settings"]
    lines = [f"## Call {number}", ""]
    if environment:
        versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
        changed = " (changed)" if environment["dirty"] else ""
        lines += [f"{environment['device_name']}; {versions}; commit {environment['commit']}{changed}; "]
    lines[-1] += (
        f"{settings['spent_s']} of {settings['seconds']:g} s in {settings['processes']} processes of the suite."
    )
    rows = [
        (
            name,
            item["status"] + (f": {item['log'][-160:]}".replace("\n", " ") if item.get("log") else ""),
            item["seconds"],
            _clock(item),
            _number(item.get("device_peak_bytes"), 1e-9),
            _number(item.get("host_peak_bytes"), 1e-9),
        )
        for name, item in call["items"].items()
    ]
    header = ("item", "status", "s", "SM MHz", "GPU GB", "host GB")
    return [*lines, "", *table(header, rows)]


def _clock(item: Mapping[str, Any]) -> str:
    clocks = (item.get("clocks") or {}).get("sm_mhz")
    return "-" if clocks is None else f"{clocks[1]:.0f} ({clocks[0]:.0f} to {clocks[2]:.0f})"


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not verdicts:
        return []
    rows = [
        (
            *(v[name] for name in ("op", "impl", "arch", "tests", "sanitizer")),
            "; ".join(v["advice"]) or "-",
            "; ".join(v["reasons"])[:600] or "**may be entered**",
        )
        for v in verdicts
    ]
    header = ("op", "impl", "arch", "tests", "sanitizer", "advice", "verdict")
    return ["## What may be entered in dispatch.PROVEN", "", *table(header, rows)]


def _gates(gates: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (
            gate["name"],
            gate["impl"] or "-",
            "-" if gate["value"] is None else f"{gate['value']:.3g}",
            f"{gate['gate']:.3g}",
            f"{gate['goal']:.3g}",
            gate["status"] + (f" ({gate['reason'][:120]})" if gate["reason"] else ""),
        )
        for gate in gates
    ]
    return ["## Gates and goals", "", *table(("what", "impl", "value", "gate", "goal", "status"), rows)]


def _ceilings(found: Mapping[str, Any]) -> list[str]:
    if "matmul" not in found:
        return []
    return [f"Ceilings: copy {found['copy']['GB/s']:.0f} GB/s, matmul {found['matmul']['TFLOP/s']:.0f} TFLOP/s.", ""]


def _checks(found: Mapping[str, Any]) -> list[str]:
    checks = found.get("checks")
    if not checks:
        return []
    rows = [(c["op"], c["impl"], c["size"], c["test"], c["outcome"], c["reason"][:300]) for c in checks]
    return ["## Compared with fp64", "", *table(("op", "impl", "size", "test", "outcome", "reason"), rows)]


def _tests(found: Mapping[str, Any]) -> list[str]:
    tests = found.get("tests")
    if tests is None:
        return []
    counts = Counter((" ".join(test["pair"]), test["outcome"]) for test in tests if test["pair"])
    lines = ["## Tests", "", *table(("implementation", "outcome", "tests"), ((*key, n) for key, n in counts.items()))]
    for test in tests:
        if test["outcome"] not in ("passed", "skipped"):
            lines += [f"**{test['test']}** {test['outcome']}", "", "```", test.get("reason", "")[-800:], "```", ""]
    return lines + [f"Not run: {problem}\n" for problem in found.get("incomplete", [])]


def _sanitizer(found: Mapping[str, Any]) -> list[str]:
    runs = found.get("runs")
    if not runs:
        return []
    rows = ((run["op"], run["impl"], run["tool"], run["status"], run["errors"]) for run in runs)
    return ["## compute-sanitizer", "", *table(("op", "impl", "tool", "status", "errors"), rows)]


def _steps(result: Mapping[str, Any]) -> list[str]:
    found = [(data(result, name), side) for name in ("step, smaller", "step, larger") for side in SIDES]
    found += [(data(result, "official step"), "official"), (data(result, "longest"), "step")]
    rows = [_step(side, sides[side], sides.get("tokens")) for sides, side in found if side in sides]
    lines = ["## Training step", "", *table(("batch", "side", "ms", "TFLOP/s", "MFU", "peak GB"), rows)] if rows else []
    counts = next((sides[side]["counts"] for sides, side in found if "counts" in sides.get(side, {})), None)
    lines += [f"FLOPs of a step: {counts}.", ""] if counts else []
    losses = data(result, "losses")
    return lines + ([f"Losses at {losses['tokens']} tokens: {losses['losses']}.", ""] if "losses" in losses else [])


SIDES = ("ours", "ours, forward and backward")


def _step(side: str, found: Mapping[str, Any], tokens: int | None) -> tuple[str, ...]:
    batch = f"{found.get('tokens', tokens)} tokens"
    if "failed" in found:
        return batch, side, found["failed"][:80], "-", "-", "-"
    mfu = "-" if found["mfu"] is None else f"{found['mfu']:.1%}"
    cells = _number(found["seconds"], 1e3), _number(found["TFLOP/s"]), mfu, _number(found["peak_bytes"], 1e-9)
    return batch, side, *cells


def _kernels(found: Mapping[str, Any]) -> list[str]:
    if "kernels" not in found:
        return []
    total = sum(row["us"] for row in found["kernels"]) or 1.0
    rows = [
        (row["name"][:90], row["calls"], _number(row["us"]), f"{row['us'] / total:.1%}") for row in found["kernels"]
    ]
    title = f"## Kernels of a step of {found['tokens']} tokens"
    return [title, "", *table(("kernel", "calls", "us", "share"), rows[:25])]


def _rest(result: Mapping[str, Any]) -> list[str]:
    lines = []
    launched, step = data(result, "launches"), data(result, "kernels of a step")
    if "forward_per_layer" in launched:
        lines += [
            f"Launches a layer: {launched['forward_per_layer']} forward, {launched['step_per_layer']} with backward.",
            "",
        ]
    if step.get("host_syncs"):
        lines += [f"Host syncs a step: {step['host_syncs'].get('count')}.", ""]
    for name in ("generation", "graphs"):
        found = data(result, name)
        if found.get("frames"):
            seconds = ", ".join(f"{value:.2f}" for value in found["frames"])
            equal = (
                f", frames equal to those without graphs: {found['frames_equal']}" if "frames_equal" in found else ""
            )
            lines += [f"{name}: seconds of each frame {seconds} ({found.get('result')}){equal}.", ""]
    for title, verdict in (data(result, "self-check").get("verdicts") or {}).items():
        lines += [f"Self-check, {title}: {verdict}.", ""]
    tuned = data(result, "tune")
    if "status" in tuned:
        lines += [f"Tuner: {tuned['status']}, table {tuned.get('after')}.", ""]
    return lines


def _case(record: Mapping[str, Any]) -> list[str]:
    """Return a case's rows. vs ours: how many times as long as the first of ours, round by round."""
    rows = [
        (
            row["contestant"]
            if row["status"] == "ok"
            else f"{row['contestant']} ({row['status']}: {row['reason'][:200]})",
            _number(row["median_s"], 1e3, 3),
            _number(row["iqr_s"], 1e3, 3),
            _number(row["ratio"], 1.0, 2),
            _number(row["rate"]),
            _number(row["of_ceiling"], 100.0, 0),
            _number(row["peak_extra_bytes"], 1e-6),
            "-" if row["error"] is None else f"{row['error']:.1e}",
        )
        for row in record["rows"]
    ]
    header = ("contestant", "ms", "IQR", "vs ours", record["rate_unit"], "% of ceiling", "extra MB", "error")
    return table(header, rows)
