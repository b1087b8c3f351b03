"""Which GPU implementations a result proves, and that every entry of dispatch.PROVEN has such a result.

    python -m bench.gpu.proof DIR/suite.json

copies a result of the suite to bench/results/ and prints the entries that it supports, to be written into
lumos_kernels/dispatch.py and committed together with the files. tests/test_proof.py refuses an entry whose file is not
there, does not say so, or was made with other code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.environment import ROOT, file_stem
from bench.gpu import gates, summary
from bench.gpu.suite import SCHEMA, read_json, write_json
from bench.gpu.tests import digest

RESULTS = ROOT / "bench" / "results"
PASSED = ("passed", "skipped")


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For every implementation that was tested: {"op", "impl", "arch", "digest", "tests", "sanitizer", "reasons"}.

    No reasons: it is proven. They are read off the raw outcomes and figures, never off an earlier verdict.
    """
    tested = _data(result, "tests")
    arch = _data(result, "environment").get("arch")
    judged = gates.evaluate(result)
    found = []
    for pair, code in (tested.get("digests") or {}).items():
        op, impl = pair.split(" ")
        outcomes = [test for test in tested.get("tests", []) if test.get("pair") == [op, impl]]
        runs = [run for run in _data(result, "sanitizer").get("runs", []) if (run["op"], run["impl"]) == (op, impl)]
        reasons = [] if arch else ["the result names no GPU architecture"]
        if result["settings"]["dry_run"]:
            reasons.append("it was a dry run")
        reasons += _test_reasons(outcomes, tested.get("incomplete", {}).get(op, []))
        reasons += [f"{run['tool']}: {run['status']}" for run in runs if run["status"] == "errors"]
        reasons += _gate_reasons([gate for gate in judged if (gate["op"], gate["impl"]) == (op, impl)])
        counts = {kind: sum(test["outcome"] == kind for test in outcomes) for kind in ("passed", "skipped", "failed")}
        clean = sum(run["status"] == "clean" for run in runs)
        found.append({"op": op, "impl": impl, "arch": arch, "digest": code, "tests": counts})
        found[-1] |= {"sanitizer": f"{clean} of {len(runs)} clean", "reasons": reasons}
    return found


def _data(result: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    return (result["parts"].get(part) or {}).get("data") or {}


def _test_reasons(outcomes: Sequence[Mapping[str, Any]], incomplete: Sequence[str]) -> list[str]:
    bad = [f"{test['test']}: {test['outcome']}" for test in outcomes if test["outcome"] not in PASSED]
    if not any(test["outcome"] == "passed" for test in outcomes):
        bad.append("no test of it passed")
    return bad + [f"tests: {problem}" for problem in incomplete]


def _gate_reasons(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    bad = [f"{gate['name']}: {gate['value']:.2f}, gate {gate['gate']}" for gate in judged if gate["status"] == "missed"]
    unknown = [gate for gate in judged if gate["required"] and gate["status"] == "not measured"]
    bad += [f"{gate['name']}: not measured ({gate['reason']})" for gate in unknown]
    return bad if judged else ["no gate of it was measured"]


def refusal(op: str, impl: str, arch: str, file: str, results: Path = RESULTS) -> str | None:
    """Why the file does not prove that "auto" may take the implementation on the architecture; None where it does."""
    result = read_json(results / file)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or "parts" not in result:
        return f"bench/results/{file} is no result of the GPU suite"
    verdict = next((v for v in verdicts(result) if (v["op"], v["impl"]) == (op, impl)), None)
    if verdict is None:
        return f"{file} has no tests of {op} {impl}"
    if verdict["arch"] != arch:
        return f"{file} was measured on {verdict['arch']}, not {arch}"
    if verdict["reasons"]:
        return f"{file} does not prove {op} {impl}: {'; '.join(verdict['reasons'])}"
    if verdict["digest"] != digest(op, impl):
        return f"the code of {op} {impl} changed since {file}: run the suite again, or take the entry out"
    return None


def adopt(file: Path, results: Path = RESULTS) -> tuple[str, list[dict[str, Any]]]:
    """Copies a result into bench/results under its own name. Returns the name and the verdicts.

    Raises ValueError where the file is no result of the suite on a GPU.
    """
    result = read_json(file)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not result.get("environment"):
        raise ValueError(f"{file} must be a suite.json of `python -m bench.gpu_suite` with its environment part")
    if result["settings"]["dry_run"]:
        raise ValueError(f"{file} comes from a dry run, which measures nothing")
    name = f"{file_stem(result['environment'])}_suite.json"
    write_json(results / name, result)
    (results / name).with_suffix(".md").write_text(summary.markdown(result), encoding="utf-8")
    return name, verdicts(result)


def entries(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Lines for dispatch.PROVEN."""
    return [f'("{v["op"]}", "{v["impl"]}"): {{"{v["arch"]}": "{name}"}},' for v in found if not v["reasons"]]


def conclusion(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """The entries that a result supports, and why there are no others."""
    refused = [f"not {v['op']} {v['impl']}: {reason}" for v in found for reason in v["reasons"]]
    return [*(entries(found, name) or ["(none)"]), *refused]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.proof", description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path, help="suite.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are committed")
    options = parser.parse_args(arguments)
    try:
        name, found = adopt(options.result, options.results)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.results / name}: commit it, its .md, and these entries of PROVEN in lumos_kernels/dispatch.py:")
    print("\n".join(conclusion(found, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
