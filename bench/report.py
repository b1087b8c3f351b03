"""Writes what was measured: JSON for programs, Markdown to read, PNG to look at."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.environment import file_stem
from bench.measure import Row
from bench.registry import CEILING, DTYPE_NAMES, OURS, Case, ops

SCHEMA = 1
COLOURS = {OURS: "#1b7f5c", "rival": "#8a94a6", CEILING: "#d9a441"}
HEADER = ("contestant", "median", "min", "IQR", "vs ours", "rate", "of ceiling", "extra memory", "error")


def case_record(case: Case, rows: list[Row]) -> dict[str, Any]:
    """One case with its rows as plain values. Units: seconds, bytes, GB/s or GFLOP/s as "rate_unit" says."""
    work = ops()[case.op].work(case)
    return {
        "case": case.key,
        "op": case.op,
        "model": asdict(case.model),
        "tokens": case.video.tokens,
        "dtype": DTYPE_NAMES[case.dtype],
        "pass": "forward+backward" if case.backward else "forward",
        "work": {"amount": work.amount, "unit": work.unit},
        "rate_unit": f"G{work.unit}/s",
        "rows": [asdict(row) for row in rows],
    }


def write(out: Path, environment: dict[str, Any], settings: dict[str, Any], cases: list[dict[str, Any]]) -> list[Path]:
    """Writes <device>_<date>_<sha>.json, .md and .png into the folder `out` and returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    result = {"schema": SCHEMA, "environment": environment, "settings": settings, "cases": cases}
    json_file, md_file, png_file = (out / f"{file_stem(environment)}.{suffix}" for suffix in ("json", "md", "png"))
    json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    md_file.write_text(markdown(result), encoding="utf-8")
    plot(result, png_file)
    return [json_file, md_file, png_file]


def markdown(result: dict[str, Any]) -> str:
    """The whole result: the environment, what the columns mean, a table a case."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    dirty = " with uncommitted changes" if environment["dirty"] else ""
    lines = [
        f"# {environment['device_name']}, {environment['date'][:10]}",
        "",
        f"{environment['device']}: {environment['cores']} cores ({environment['cpu']}), {environment['threads']} "
        f"threads, {environment['torch_cpu_capability']}; {environment['system']}; {versions}; "
        f"commit {environment['commit']}{dirty}; load average at the start {environment['load_average']:.2f}.",
        "",
        "Contestants alternate round by round on the same inputs. Every figure belongs to a result that was compared "
        "with the reference first: `error` is the relative L2 error of its worst output or gradient. `vs ours` is the "
        "median over the rounds of its time divided by ours (the first row's). Rates count useful work only. `of "
        "ceiling` is the share of the machine's rate, measured in the same rounds. `extra memory` is the peak beyond "
        "the inputs.",
        "",
    ]
    for case in result["cases"]:
        lines += [f"## {case['case']}", "", *case_table(case), ""]
    for title, cases in sweeps(result["cases"]).items():
        lines += [f"## {title}: how time grows with tokens", "", *_sweep_table(cases), ""]
    return "\n".join(lines)


def sweeps(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Cases that differ in the number of tokens alone, by rising tokens, where there are three or more."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        key = f"{case['op']}/{case['model']['name']}/{case['dtype']}/{case['pass']}"
        groups.setdefault(key, []).append(case)
    ordered = {key: sorted(group, key=lambda case: case["tokens"]) for key, group in groups.items()}
    return {key: group for key, group in ordered.items() if len({case["tokens"] for case in group}) > 2}


def _times_by_contestant(cases: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Median seconds of each contestant, case by case; ceilings have a size of their own and are left out."""
    times = [{row["contestant"]: row["median_s"] for row in case["rows"] if row["role"] != CEILING} for case in cases]
    names = dict.fromkeys(name for case in times for name in case)
    return {name: [case.get(name) for case in times] for name in names}


def _sweep_table(cases: list[dict[str, Any]]) -> list[str]:
    rows = [["contestant", *(f"{case['tokens']:,}" for case in cases)], ["---"] + ["---:"] * len(cases)]
    for name, times in _times_by_contestant(cases).items():
        rows.append([name, *("-" if time is None else _milliseconds(time) for time in times)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _milliseconds(seconds: float) -> str:
    """Three digits, and all before the point."""
    value = seconds * 1e3
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def case_table(case: dict[str, Any]) -> list[str]:
    """A case's rows as Markdown lines."""
    rows = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1)]
    rows += [_cells(row, case["rate_unit"]) for row in case["rows"]]
    notes = [f"{row['contestant']}: {row['status']}, {row['reason']}" for row in case["rows"] if row["reason"]]
    return ["| " + " | ".join(row) + " |" for row in rows] + [line for note in notes for line in ("", note)]


def _cells(row: dict[str, Any], unit: str) -> list[str]:
    def cell(name: str, text: str, scale: float = 1.0) -> str:
        return "-" if row[name] is None else text.format(row[name] * scale)

    name = f"**{row['contestant']}**" if row["role"] == OURS else row["contestant"]
    note = "one sample" if row["samples"] == 1 else row["status"]
    return [
        name if note == "ok" else f"{name} ({note})",
        cell("median_s", "{:.3f} ms", 1e3),
        cell("min_s", "{:.3f} ms", 1e3),
        cell("iqr_s", "{:.3f} ms", 1e3),
        cell("ratio", "{:.2f}x"),
        cell("rate", "{:.1f} " + unit),
        cell("of_ceiling", "{:.0f} %", 100),
        cell("peak_extra_bytes", "{:.1f} MB", 1e-6),
        cell("error", "{:.1e}"),
    ]


def plot(result: dict[str, Any], path: Path) -> None:
    """A panel of bars a case: milliseconds of each contestant that got a figure. Then a panel of lines a sweep."""
    from matplotlib.figure import Figure

    cases, lines = result["cases"], sweeps(result["cases"])
    heights = [1.0 + 0.32 * len(case["rows"]) for case in cases] + [4.0] * len(lines)
    figure = Figure(figsize=(9, max(2.0, sum(heights))), layout="constrained")
    axes = figure.subplots(max(1, len(heights)), 1, squeeze=False, height_ratios=heights or None)[:, 0]
    for axis, case in zip(axes, cases, strict=False):
        _bars(axis, case)
    for axis, (title, group) in zip(axes[len(cases) :], lines.items(), strict=False):
        _lines(axis, title, group)
    environment = result["environment"]
    figure.suptitle(f"{environment['device_name']}, {environment['threads']} threads, {environment['date'][:10]}")
    figure.savefig(path, dpi=100)


def _bars(axis: Any, case: dict[str, Any]) -> None:
    rows = [row for row in case["rows"] if row["median_s"] is not None]
    labels = [_milliseconds(row["median_s"]) + (f", {row['ratio']:.2f}x" if row["ratio"] else "") for row in rows]
    bars = axis.barh(
        [row["contestant"] for row in rows],
        [row["median_s"] * 1e3 for row in rows],
        color=[COLOURS[row["role"]] for row in rows],
    )
    axis.bar_label(bars, labels=labels, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.tick_params(labelsize=8)
    axis.set_title(case["case"], fontsize=9, loc="left")
    axis.set_xlabel("ms", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _lines(axis: Any, title: str, cases: list[dict[str, Any]]) -> None:
    tokens = [case["tokens"] for case in cases]
    for name, times in _times_by_contestant(cases).items():
        points = [(count, time * 1e3) for count, time in zip(tokens, times, strict=True) if time is not None]
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms", xticks=tokens, xticklabels=tokens)
    axis.minorticks_off()
    axis.tick_params(labelsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
