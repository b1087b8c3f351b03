"""Decides which GPU implementations a result proves: every entry of dispatch.PROVEN needs such a result.

    python -m bench.gpu.proof DIR/suite.json [DIR2/suite.json]

joins the results of both calls, copies them to bench/results/ and prints the entries that they support, to be written
into lumos_kernels/dispatch.py and committed together with the files. An entry lets the docs print what the result
measured; it decides nothing at run time. tests/test_proof.py refuses an entry whose file is not there, does not say so,
or was made with other code. Tables of tuned configurations are data: a result names the one it ran with.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import gates, results, summary
from bench.gpu.processes import ROOT, write_json, write_text
from bench.gpu.results import data, digest

RESULTS = ROOT / "bench" / "results"
PASSED = ("passed", "skipped")
DECISIVE = "memcheck"  # the other tools may report false hazards where kernels wait on mbarriers


def verdicts(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for every implementation that was tested what its tests, sanitizers and gates say of it.

    {"op", "impl", "arch", "digest", "table", "tests", "sanitizer", "advice", "reasons"}. No reasons: it is proven. They
    are read off the raw outcomes and figures, never off an earlier verdict. advice: what refuses nothing.
    """
    tested, judged = data(result, "tests"), gates.evaluate(result)
    arch = data(result, "machine").get("arch")
    found = []
    for pair, code in (tested.get("digests") or {}).items():
        op, impl = pair.split(" ")
        outcomes = [test for test in tested.get("tests", []) if test.get("pair") == [op, impl]]
        runs = [run for run in data(result, "sanitizer").get("runs", []) if (run["op"], run["impl"]) == (op, impl)]
        checks = [c for c in data(result, "correctness").get("checks", []) if (c["op"], c["impl"]) == (op, impl)]
        reasons = [] if arch else ["the result names no GPU architecture"]
        if any(call["settings"]["dry_run"] for call in result["calls"].values()):
            reasons.append("it was a dry run")
        reasons += _test_reasons(outcomes, tested.get("incomplete", []))
        reasons += [
            f"{check['test']}, {check['size']}: {check['outcome']}" for check in checks if check["outcome"] != "passed"
        ]
        reasons += [f"{run['tool']}: {run['status']}" for run in runs if run["tool"] == DECISIVE and _is_bad(run)]
        reasons += _table_reasons(result)
        reasons += _gate_reasons([gate for gate in judged if (gate["op"], gate["impl"]) == (op, impl)])
        counts = {kind: sum(test["outcome"] == kind for test in outcomes) for kind in ("passed", "skipped", "failed")}
        advice = [f"{run['tool']}: {run['status']}" for run in runs if run["tool"] != DECISIVE and _is_bad(run)]
        clean = sum(run["status"] == "clean" for run in runs)
        found.append({"op": op, "impl": impl, "arch": arch, "digest": code, "table": table(result), "tests": counts})
        found[-1] |= {"sanitizer": f"{clean} of {len(runs)} clean", "advice": advice, "reasons": reasons}
    return found


def _is_bad(run: Mapping[str, Any]) -> bool:
    return run["status"] in ("errors", "failed")


def table(result: Mapping[str, Any]) -> str | None:
    """Return the digest of the table with which the tests ran."""
    return next((item.get("table") for name, item in results.items(result) if name == "tests"), None)


def _table_reasons(result: Mapping[str, Any]) -> list[str]:
    """Tests and figures must be of one table: a tuner may choose a kernel that nothing tested."""
    measured = {item.get("table") for _, item in results.items(result) if "record" in (item.get("data") or {})}
    other = measured - {table(result)}
    return ["cases were measured with other tuned configurations than the tests'"] if other else []


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


def refusal(op: str, impl: str, arch: str, file: str, folder: Path = RESULTS) -> str | None:
    """Return why the file does not back claims about the implementation on the architecture, None where it does."""
    try:
        result = results.read(folder / file)
    except ValueError:
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


def adopt(files: Sequence[Path], folder: Path = RESULTS) -> tuple[str, list[dict[str, Any]]]:
    """Copy the joined results into bench/results under a name of their own. Return the name and the verdicts.

    Raise ValueError where a file is no result of the suite on a GPU, or two do not belong together.
    """
    from bench.environment import file_stem

    result = results.merged([results.read(file) for file in files])
    for call in result["calls"].values():
        if call["settings"]["dry_run"]:
            raise ValueError("a dry run measures nothing")
        if not call["environment"]:
            raise ValueError('a call without its item "machine" does not say where it ran')
    found = verdicts(result)
    result |= {"gates": gates.evaluate(result), "verdicts": found}
    name = f"{file_stem(results.first_call(result)['environment'])}_suite.json"
    write_json(folder / name, result)
    write_text((folder / name).with_suffix(".md"), summary.markdown(result))
    return name, found


def entries(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return lines for dispatch.PROVEN."""
    return [f'("{v["op"]}", "{v["impl"]}"): {{"{v["arch"]}": "{name}"}},' for v in found if not v["reasons"]]


def conclusion(found: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Return the entries that a result supports, and why there are no others."""
    refused = [f"not {v['op']} {v['impl']}: {reason}" for v in found for reason in v["reasons"]]
    return [*(entries(found, name) or ["(none)"]), *refused]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.proof", description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="suite.json of one call or of each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are committed")
    options = parser.parse_args(arguments)
    try:
        name, found = adopt(options.files, options.results)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.results / name}: commit it, its .md, and these entries of PROVEN in lumos_kernels/dispatch.py:")
    print("\n".join(conclusion(found, name)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
