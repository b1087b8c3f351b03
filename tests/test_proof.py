"""dispatch.PROVEN is backed by committed results: entries, verdicts, digests of code and table, gates."""

import copy
import json
import re
import subprocess
import textwrap

import pytest

from bench import registry
from bench.gpu import gates, proof, results, summary
from lumos_kernels import dispatch


def test_every_entry_of_proven_has_a_committed_result_that_proves_it():
    for (op, impl), files in dispatch.PROVEN.items():
        assert impl in dispatch.ops()[op].implementations
        for arch, file in files.items():
            assert proof.refusal(op, impl, arch, file) is None
            tracked = subprocess.run(["git", "ls-files", "--error-unmatch", f"bench/results/{file}"], cwd=proof.ROOT)
            assert tracked.returncode == 0 or not (proof.ROOT / ".git").exists()


def row(name, seconds, ratio, **others):
    blank = {"status": "ok", "reason": "", "role": "rival", "median_s": seconds, "ratio": ratio}
    blank |= {"rate": 1 / seconds, "samples": 3} | dict.fromkeys(("min_s", "iqr_s", "of_ceiling", "error"))
    return {"contestant": name, **blank, "peak_extra_bytes": 10**8, **others}


def case(key, work, *rows):
    return {
        "case": key,
        "op": key.split("/")[0],
        "work": {"amount": work, "unit": "B"},
        "rate_unit": "GB/s",
        "rows": list(rows),
    }


ROPE = "mm_rope/1B-256p-7f/bf16"


def item(**data):
    return {"status": "ok", "seconds": 1.0, "table": "t1", "data": data}


@pytest.fixture
def result():
    """Return the result of two calls in which mm_rope's Triton implementation is right and reaches its gates."""
    records = [
        # 131 MB in 50 us forward and 197 MB in 80 us backward: 2.6 and 2.5 TB/s
        case(f"{ROPE}/forward", 131e6, row("lumos triton", 50e-6, 1.0), row("official style", 500e-6, 10.0)),
        case(f"{ROPE}/forward+backward", 328e6, row("lumos triton", 130e-6, 1.0), row("official style", 1500e-6, 11.5)),
    ]
    outcome = {"pair": ["mm_rope", "triton"], "seconds": 1.0, "reason": ""}
    check = {"test": "fp64", "op": "mm_rope", "impl": "triton", "size": "1B", "outcome": "passed", "reason": ""}
    memcheck = {"op": "mm_rope", "impl": "triton", "tool": "memcheck", "status": "clean", "errors": 0}
    one = {"correctness": item(checks=[check])} | {f"case {r['case']}": item(record=r) for r in records}
    two = {
        "machine": item(arch="sm_90"),
        "tests": item(
            digests={"mm_rope triton": results.digest("mm_rope", "triton")},
            tests=[{"test": "a", "outcome": "passed", **outcome}, {"test": "b", "outcome": "skipped", **outcome}],
            incomplete=[],
        ),
        "sanitizer": item(runs=[memcheck, {**memcheck, "tool": "racecheck"}]),
    }
    environment = {"device": "cuda", "device_name": "NVIDIA H100", "date": "2026-11-22", "commit": "a" * 40}
    environment |= {"dirty": False, "versions": {"torch": "2.11.0"}}
    settings = {"seconds": 300.0, "spent_s": 280.0, "dry_run": False, "processes": 2}
    calls = {
        number: {"environment": environment, "settings": dict(settings), "items": items}
        for number, items in (("1", one), ("2", two))
    }
    return {"schema": results.SCHEMA, "code": "c", "calls": calls}


def write(result, folder, name="h100_suite.json"):
    (folder / name).write_text(json.dumps(result))
    return name


def test_a_right_and_fast_implementation_is_proven(result, tmp_path):
    assert proof.refusal("mm_rope", "triton", "sm_90", write(result, tmp_path), tmp_path) is None
    [verdict] = proof.verdicts(result)
    assert verdict["reasons"] == verdict["advice"] == []
    assert verdict["tests"] == {"passed": 1, "skipped": 1, "failed": 0}
    assert verdict["table"] == "t1"
    assert proof.entries([verdict], "x.json") == ['("mm_rope", "triton"): {"sm_90": "x.json"},']


def of(result, name):
    """Return the data of an item, to be spoiled."""
    return results.data(result, name)


def _fail(result):
    of(result, "tests")["tests"][0]["outcome"] = "failed"


def _end(result):
    of(result, "tests")["tests"][0]["outcome"] = "ended the process"


def _skip_all(result):
    of(result, "tests")["tests"][0]["outcome"] = "skipped"


def _run_out_of_time(result):
    of(result, "tests")["incomplete"] = ["tests/gpu -m large: no time was left"]


def _differ_from_fp64(result):
    of(result, "correctness")["checks"][0]["outcome"] = "failed"


def _access_beyond(result):
    of(result, "sanitizer")["runs"][0]["status"] = "errors"


def _slow(result):
    for record in results.cases(result):
        record["rows"][1]["ratio"] = 7.0


def _below_the_bandwidth(result):
    results.cases(result)[0]["rows"][0]["median_s"] = 70e-6


def _wrong_figures(result):
    results.cases(result)[0]["rows"][0].update(status="wrong", reason="relative error 1")


def _no_cases(result):
    result["calls"]["1"]["items"].clear()


def _dry(result):
    result["calls"]["1"]["settings"]["dry_run"] = True


def _other_code(result):
    of(result, "tests")["digests"]["mm_rope triton"] = "0" * 16


def _other_table(result):
    result["calls"]["2"]["items"]["tests"]["table"] = "t2"


def _other_arch(result):
    of(result, "machine")["arch"] = "sm_80"


def _untested(result):
    of(result, "tests")["digests"] = {}


def _believe_the_stored_verdict(result):
    """The stored verdict counts for nothing: a failed test is a failed test."""
    result["verdicts"] = proof.verdicts(result)
    _fail(result)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_fail, "a: failed"),
        (_end, "a: ended the process"),
        (_skip_all, "no test of it passed"),
        (_run_out_of_time, "no time was left"),
        (_differ_from_fp64, "fp64, 1B: failed"),
        (_access_beyond, "memcheck: errors"),
        (_slow, "official style: 7.00, gate 8"),
        (_below_the_bandwidth, r"share of 3.0 TB/s: 0.62, gate 0.75"),
        (_wrong_figures, "not measured .*wrong, relative error 1"),
        (_no_cases, "not measured|no gate"),
        (_dry, "dry run"),
        (_other_code, "changed since"),
        (_other_table, "other tuned configurations"),
        (_other_arch, "measured on sm_80, not sm_90"),
        (_untested, "no tests of mm_rope triton"),
        (_believe_the_stored_verdict, "a: failed"),
    ],
)
def test_what_does_not_prove(result, tmp_path, spoil, why):
    spoil(result)
    reason = proof.refusal("mm_rope", "triton", "sm_90", write(result, tmp_path), tmp_path)
    assert reason is not None
    assert re.search(why, reason), reason


def test_a_file_that_is_absent_or_something_else_proves_nothing(tmp_path):
    for content in (None, "{", "[]", '{"schema": 1}'):
        if content is not None:
            (tmp_path / "x.json").write_text(content)
        assert "no result of the GPU suite" in proof.refusal("mm_rope", "triton", "sm_90", "x.json", tmp_path)


def test_a_race_alone_is_advice(result, tmp_path):
    of(result, "sanitizer")["runs"][1]["status"] = "errors"
    [verdict] = proof.verdicts(result)
    assert (verdict["advice"], verdict["reasons"]) == (["racecheck: errors"], [])
    assert "racecheck: errors" in summary.markdown({**result, "gates": [], "verdicts": [verdict]})


def test_the_command_joins_and_copies_the_results_and_prints_the_entries(result, tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()

    def files(result):
        for number, call in result["calls"].items():
            write({**result, "calls": {number: call}}, tmp_path, f"{number}.json")
        return [str(tmp_path / "1.json"), str(tmp_path / "2.json"), "--results", str(folder)]

    assert proof.main(files(result)) == 0
    printed = capsys.readouterr().out
    name = "nvidia-h100_2026-11-22_aaaaaaaa_suite.json"
    assert f'("mm_rope", "triton"): {{"sm_90": "{name}"}},' in printed
    assert json.loads((folder / name).read_text())["calls"] == result["calls"]
    assert "GPU suite: NVIDIA H100" in (folder / name.replace(".json", ".md")).read_text()

    spoilt = copy.deepcopy(result)
    _fail(spoilt)
    proof.main(files(spoilt))
    printed = capsys.readouterr().out
    assert "(none)" in printed
    assert "not mm_rope triton: a: failed" in printed

    _dry(spoilt)
    with pytest.raises(SystemExit):
        proof.main(files(spoilt))
    with pytest.raises(ValueError, match="different code"):
        results.merged([result, {**result, "code": "other"}])
    with pytest.raises(ValueError, match="call 1 is in two"):
        results.merged([result, result])


def test_the_digest_ignores_comments_docstrings_and_layout_alone():
    source = textwrap.dedent('''
        """Module."""
        import math  # why

        # a comment
        def f(x):
            """Docstring
            of two lines."""
            if x:
                y = "# no comment"
            return y
    ''')
    same = textwrap.dedent('''
        import math
        def f( x ):
            """Another."""

            if x:
                y = "# no comment"  # now there is one
            return y
    ''')
    assert results.bare(source) == results.bare(same)
    for old, new in (
        ("return y", "return -y"),
        ("# no comment", "# no"),
        ("    return y", "        return y"),
        ("import math", "import cmath"),
    ):
        assert old in same
        assert results.bare(same.replace(old, new)) != results.bare(source)


def test_the_digest_covers_every_file_but_the_table(tmp_path, monkeypatch):
    package = tmp_path / "lumos_kernels" / "op"
    (package / "fast").mkdir(parents=True)
    for name in ("__init__", "forward", "tuned"):
        (package / "fast" / f"{name}.py").write_text("a = 1\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    first = results.digest("op", "fast")
    (package / "fast" / "tuned.py").write_text("a = 2\n")
    assert results.digest("op", "fast") == first
    (package / "fast" / "forward.py").write_text("a = 2\n")
    second = results.digest("op", "fast")
    (package / "fast" / "backward.py").write_text("a = 2\n")
    assert len({first, second, results.digest("op", "fast")}) == 3


def test_digests_find_the_package_of_every_op():
    for name, op in dispatch.ops().items():
        assert op.package == f"lumos_kernels.{name}"
        assert results.digest(name, "reference")


def test_a_rival_of_a_later_call_meets_ours_in_a_record_of_its_own(result):
    rival = case(f"{ROPE}/forward", 131e6, row("lumos triton", 50e-6, 1.0), row("Liger chain", 150e-6, 3.0))
    result["calls"]["2"]["items"]["jit"] = item(record=rival)
    by_name = {gate["name"]: gate for gate in gates.evaluate(result) if gate["op"] == "mm_rope"}
    assert by_name[f"{ROPE} forward: time against Liger chain"]["value"] == 3.0
    assert by_name[f"{ROPE} forward: time against official style"]["value"] == 10.0
    rival["rows"].append(row("lumos triton, fused backward", 1e-6, 0.1))
    assert {gate["impl"] for gate in gates.evaluate(result) if gate["op"] == "mm_rope"} == {"triton"}


def test_backward_is_the_difference_of_the_passes(result):
    by_name = {gate["name"]: gate for gate in gates.evaluate(result) if gate["op"] == "mm_rope"}
    assert by_name[f"{ROPE} backward: time against official style"]["value"] == pytest.approx(1000 / 80)
    assert by_name[f"{ROPE} backward: share of 3.0 TB/s"]["value"] == pytest.approx(197e6 / 80e-6 / 3e12)
    assert by_name[f"{ROPE} forward: share of 3.0 TB/s"]["status"] == "reached"
    assert by_name[f"{ROPE} forward: time against Liger chain"]["status"] == "not measured"


@pytest.mark.parametrize(
    ("value", "gate", "goal", "grade"),
    [
        (1.2, 1.15, 1.65, "reached"),
        (1.1, 1.15, 1.65, "missed"),
        (2.0, 1.15, 1.65, "goal"),
        (1.0, 1.2, 0.6, "reached"),
        (0.5, 1.2, 0.6, "goal"),
        (1.3, 1.2, 0.6, "missed"),
        (0.8, 0.8, 0.8, "goal"),
    ],
)
def test_grades(value, gate, goal, grade):
    assert gates.grade(value, gate, goal) == grade


def test_every_gate_names_a_case_and_a_rival_that_exist():
    known = {case.key: registry.ops()[case.op] for case in registry.select((), "*")}
    for gate in gates.GATES:
        if gate.op not in registry.ops():  # no benchmark yet: its gate stays "not measured", which proves nothing
            continue
        for suffix in (
            gates.BOTH if gate.what == "backward" else gates.BOTH[:1] if gate.what == "forward" else gates.BOTH[1:]
        ):
            bench = known[gate.case + suffix]
            assert gate.rival is None or gate.rival in [rival.name for rival in bench.rivals], gate.name
