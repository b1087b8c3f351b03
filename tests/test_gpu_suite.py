"""The GPU suite on a CPU: what becomes of items that fail, hang or die, what is kept, and a dry run of both calls."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_suite, measure, registry, timing
from bench.gpu import (
    compile_ahead,
    gates,
    machine,
    ops,
    results,
    stages,
    suite,
    tests,
    tuner,
    whole_model,
    worker,
)
from bench.gpu.processes import read_json, run_bounded, start, write_json
from bench.gpu.suite import Call, Stage
from bench.gpu.worker import Item, Run
from bench.registry import Contestant


def python(code):
    return [sys.executable, "-c", code]


# Processes


def test_a_process_is_ok_failed_or_out_of_time(tmp_path):
    log = tmp_path / "log"
    assert run_bounded(python("print('said')"), 30, log) == "ok"
    assert log.read_text() == "said\n"
    assert run_bounded(python("raise SystemExit(3)"), 30, log) == "failed (exit 3)"
    assert run_bounded(python("import os; os.kill(os.getpid(), 11)"), 30, log) == "failed (exit -11)"
    start = time.monotonic()
    assert run_bounded(python("print('before', flush=True); import time; time.sleep(60)"), 0.7, log) == "timeout"
    assert time.monotonic() - start < 20
    assert log.read_text() == "before\n"


def test_what_a_process_left_running_is_ended(tmp_path):
    pid = tmp_path / "pid"
    leave = (
        "import subprocess, sys, pathlib; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    )
    leave += f"pathlib.Path({str(pid)!r}).write_text(str(p.pid))"
    assert run_bounded(python(leave), 30, tmp_path / "log") == "ok"
    status = Path("/proc") / pid.read_text() / "status"
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("the child is still running")


def test_a_file_is_replaced_whole(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    (tmp_path / "a.json").write_text("{")
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "absent.json") is None


def test_what_starts_the_processes_imports_no_torch():
    done = subprocess.run(
        python("import sys, bench.gpu_suite; print('torch' in sys.modules)"), capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


# Items of a process


@pytest.fixture
def run_items(tmp_path, monkeypatch):
    """Runs stand-ins for items: name -> (share, function). Returns the Run and what is on file."""

    monkeypatch.setattr(worker, "SHORTEST", 0.1)

    def go(behaviour, seconds=10.0):
        run = Run(tmp_path / "record.json", tmp_path, tmp_path, dry_run=True)
        items = [Item(name, share, find) for name, (share, find) in behaviour.items()]
        with machine.Clocks(dry_run=True) as clocks:
            worker.run_items(run, items, seconds, clocks)
        return run, read_json(run.record)

    return go


def test_items_are_kept_whatever_became_of_them(run_items):
    def right(run):
        run["value"] = 1

    def wrong(run):
        run["before"] = 2
        raise ValueError("broken")

    def endless(run):
        run["before"] = 3
        while True:
            time.sleep(5)

    behaviour = {"right": (2, right), "wrong": (2, wrong), "endless": (1, endless), "last": (3, right)}
    _, found = run_items(behaviour, seconds=4)
    assert {name: item["status"] for name, item in found["items"].items()} == {
        "right": "ok",
        "wrong": "failed",
        "endless": "overrun",
        "last": "ok",
    }
    assert found["items"]["wrong"]["log"] == "ValueError: broken"
    assert found["items"]["wrong"]["data"] == {"before": 2}
    assert found["items"]["endless"]["data"] == {"before": 3}
    assert found["running"] is None
    assert found["items"]["last"]["host_peak_bytes"] > 1e6
    assert found["items"]["last"]["table"] == results.table_digest()


def test_an_item_that_tolerates_failures_is_interrupted_all_the_same(run_items):
    def tolerant(run):
        while True:
            try:
                time.sleep(5)
            except Exception:
                run["swallowed"] = True

    _, found = run_items({"tolerant": (0.2, tolerant)}, seconds=0.3)
    assert found["items"]["tolerant"]["status"] == "overrun"
    assert found["items"]["tolerant"]["data"] == {}


def test_shares_shrink_to_the_time_and_grow_by_what_is_left_over(run_items):
    limits = {}

    def note(run):
        limits[run.running["name"]] = run.left()

    run_items({"a": (60, note), "b": (30, note), "c": (10, note)}, seconds=10)
    assert limits["a"] == pytest.approx(6, abs=1)
    assert limits["b"] == pytest.approx(9, abs=1), "its own 3 and the 6 that a left over"
    assert limits["c"] == pytest.approx(10, abs=1)
    _, found = run_items({"a": (1, note)}, seconds=0)
    assert found["items"]["a"]["status"] == "not started"


def test_a_lost_device_ends_the_process_behind_its_item(run_items, monkeypatch):
    monkeypatch.setattr(worker, "_device_is_lost", lambda: True)
    with pytest.raises(SystemExit):
        run_items({"bad": (1, lambda run: None), "next": (1, lambda run: None)})


def test_clocks_are_those_of_the_item(tmp_path):
    lines = "1000, 2600, 300.5, 40, 1000\\n1980, 2600, [N/A], 60, 9000\\n"
    query = python(f"import time; print('{lines}', end='', flush=True); time.sleep(30)")
    with machine.Clocks(query=query) as clocks:
        start = time.monotonic()
        while len(clocks.samples) < 2 and time.monotonic() < start + 20:
            time.sleep(0.02)
        found = clocks.since(start)
    assert found["sm_mhz"] == [1000, 1490, 1980]
    assert found["watt"] == [300.5, 300.5, 300.5]
    assert found["used_mib"][2] == 9000
    with machine.Clocks(query=["no-such-tool"]) as clocks:
        assert clocks.since(0.0) is None


# A call: processes that are restarted, results that are kept


@pytest.fixture
def run_call(tmp_path, monkeypatch):
    """Runs a call whose processes are stand-ins: scripts that write what the worker would write."""

    def go(*scripts, seconds=20.0, **options):
        monkeypatch.setattr(suite, "CALLS", {1: (Stage("prepare", 100.0),), 2: (Stage("prove", 100.0),)})
        monkeypatch.setattr(suite, "GRACE", 0.3)
        commands, todo = [], list(scripts)
        monkeypatch.setattr(suite, "SHORTEST", 0.3)

        def started(command, log, **environment):
            commands.append(command)
            record = command[command.index("--record") + 1]
            code = f"record = {record!r}\n" + PRELUDE + todo.pop(0)
            return start(python(code), log, **environment)

        monkeypatch.setattr(suite, "start", started)
        one = Call(options.pop("number", 1), tmp_path / "out", seconds, dry_run=True, **options)
        return one.run(), commands

    return go


PRELUDE = """
import json, os, sys, time
def save(running=None, **items):
    found = {name: {"seconds": 1.0, "data": {}, **item} for name, item in items.items()}
    text = json.dumps({"items": found, "running": running})
    open(record + ".new", "w").write(text)
    os.replace(record + ".new", record)
def running(name, limit=30):
    return {"name": name, "begun": time.time(), "limit_s": limit}
"""
OK = '{"status": "ok", "data": {"x": 1}}'


def items_of(result, number="1"):
    return {name: item["status"] for name, item in result["calls"][number]["items"].items()}


def test_the_process_goes_on_behind_the_item_that_ended_it(run_call, tmp_path):
    result, commands = run_call(
        f"save(a={OK}, b={{'status': 'running', 'data': {{'y': 2}}}}, running=running('b'))\n"
        "print('illegal memory access')\nos._exit(3)",
        f"save(c={OK})",
    )
    assert items_of(result) == {"a": "ok", "b": "ended the process", "c": "ok"}
    lost = result["calls"]["1"]["items"]["b"]
    assert lost["data"] == {"y": 2}, "what it had found is kept"
    assert "illegal memory access" in lost["log"]
    assert [word for word in commands[1] if word.startswith("--done")] == ["--done=a", "--done=b"]
    assert result["calls"]["1"]["settings"]["processes"] == 2
    assert read_json(tmp_path / "out" / "suite.json") == json.loads(json.dumps(result))
    text = (tmp_path / "out" / "suite.md").read_text()
    assert "| b | ended the process" in text
    assert "dry run" in text
    assert "illegal memory access" in (tmp_path / "out" / "log.txt").read_text()


def test_an_item_that_hangs_is_ended_and_left(run_call):
    result, _ = run_call("save(running=running('a', 0.2))\ntime.sleep(60)", f"save(b={OK})")
    assert items_of(result) == {"a": "overrun", "b": "ok"}


def test_the_call_ends_in_time(run_call):
    begin = time.monotonic()
    result, commands = run_call("save(running=running('a', 100))\ntime.sleep(60)", seconds=1.0)
    assert time.monotonic() - begin < 15
    assert items_of(result) == {"a": "overrun"}
    assert len(commands) == 1


def test_a_process_that_never_starts_an_item_is_not_started_again(run_call):
    result, commands = run_call("raise SystemExit('no torch')")
    assert len(commands) == 1
    assert items_of(result) == {"prepare: start": "ended the process"}
    assert "no torch" in result["calls"]["1"]["items"]["prepare: start"]["log"]


def test_results_are_on_file_while_an_item_runs(run_call, tmp_path, monkeypatch):
    seen = []
    write = suite.write_json

    def spy(file, value):
        seen.append(items_of(value))
        write(file, value)

    monkeypatch.setattr(suite, "write_json", spy)
    run_call(f"save(a={OK}, running=running('b'))\ntime.sleep(1)\nsave(a={OK}, b={OK})")
    assert {"a": "ok"} in seen
    assert seen[-1] == {"a": "ok", "b": "ok"}


def test_call_two_takes_the_results_of_call_one_on_the_same_code_alone(run_call, tmp_path, monkeypatch):
    first, _ = run_call(f"save(tune={OK})", commit="abc")
    (tmp_path / "one").mkdir()
    write_json(tmp_path / "one" / "suite.json", first)
    both, _ = run_call(f"save(tests={OK})", number=2, before=tmp_path / "one")
    assert list(both["calls"]) == ["1", "2"]
    assert results.data(both, "tune") == results.data(both, "tests") == {"x": 1}
    with pytest.raises(ValueError, match="holds call 1 already"):
        Call(1, tmp_path / "out", before=tmp_path / "one", dry_run=True)
    with pytest.raises(ValueError, match=r"must be a suite\.json"):
        Call(2, tmp_path / "out", before=tmp_path / "absent", dry_run=True)
    monkeypatch.setattr(results, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match="is of other code"):
        Call(2, tmp_path / "out", before=tmp_path / "one", dry_run=True)


def test_call_two_measures_with_the_table_that_call_one_tuned(tmp_path, monkeypatch):
    table = tmp_path / "tree" / "tuned.py"
    monkeypatch.setattr(results, "TUNED", table)
    one = tmp_path / "one"
    for folder in (table.parent, one):
        folder.mkdir()
    table.write_text("CONFIGS = 0")
    (one / "tuned.py").write_text("CONFIGS = 1")
    calls = {"1": {"environment": None, "settings": {}, "items": {}}}
    write_json(one / "suite.json", {"schema": results.SCHEMA, "code": results.code_digest(), "calls": calls})
    Call(2, tmp_path / "out", before=one, dry_run=True)
    assert table.read_text() == "CONFIGS = 0", "a dry run changes nothing"
    Call(2, tmp_path / "out", before=one)
    assert table.read_text() == "CONFIGS = 1"


def test_the_digest_of_the_code_leaves_out_the_tuned_table(tmp_path, monkeypatch):
    package = tmp_path / "lumos_kernels" / "op"
    (package / "fast").mkdir(parents=True)
    for file in ("forward.py", results.TABLE):
        (package / "fast" / file).write_text("a = 1\n")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    before = results.code_digest(), results.digest("op", "fast"), results.table_digest(package / "fast" / results.TABLE)
    (package / "fast" / results.TABLE).write_text("a = 2\n")
    after = results.code_digest(), results.digest("op", "fast"), results.table_digest(package / "fast" / results.TABLE)
    assert after[:2] == before[:2]
    assert after[2] != before[2]
    (package / "fast" / "forward.py").write_text("a = 2\n")
    assert results.code_digest() != before[0]
    assert results.digest("op", "fast") != before[1]


def test_shares_of_the_items_fit_their_processes():
    for call in suite.CALLS.values():
        assert sum(stage.seconds for stage in call) <= suite.SECONDS - 5
        for stage in call:
            items = stages.ITEMS[stage.name](False)
            spare = compile_ahead.START_SECONDS - 1
            assert sum(item.seconds for item in items) <= stage.seconds - spare, stage.name
            assert len({item.name for item in items}) == len(items)
    names = {
        call: [item.name for stage in suite.CALLS[call] for item in stages.ITEMS[stage.name](False)] for call in (1, 2)
    }
    assert not {name for name in names[1] if name.startswith("jit")}, "call 1 imports nothing foreign"
    assert names[1].index("tune") < names[1].index(f"case {ops.CASES[0]}"), "what is tuned is measured"
    assert names[2][-1] == "longest"
    assert sum("longest" in name for name in names[1] + names[2]) == 1


# Tests that take their process down

SYNTHETIC = """
import time, pytest
lost = False
@pytest.fixture(autouse=True)
def in_a_process_with_a_device():
    assert not lost
@pytest.mark.parametrize("op, impl", [("mm_rope", "triton")])
@pytest.mark.parametrize("number", range(4))
def test_right(op, impl, number):
    pass
def test_lost():
    global lost
    lost = True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_hangs():
    time.sleep(60)
def test_wrong():
    assert False
def test_skipped():
    pytest.skip("why")
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session over a folder of tests without torch, and a way to read the outcomes by name."""
    (tmp_path / "test_all.py").write_text(SYNTHETIC)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    monkeypatch.setattr(tests, "PATIENCE", 0.7)
    run = Run(tmp_path / "record.json", tmp_path, tmp_path, dry_run=False)
    run.items, run.running, run.end = {"tests": {"data": {}}}, {"name": "tests"}, time.monotonic() + 60
    return tests.Session(run, {})


ENDS = {"test_lost": "failed", "test_hangs": "ended the process", "test_wrong": "failed", "test_skipped": "skipped"}


def test_tests_go_on_behind_the_one_that_ended_the_process(session, tmp_path):
    problems = session.go([str(tmp_path), "--rootdir", str(tmp_path)], 40.0, 1)
    assert problems == []
    found = {test["test"].split("::")[1]: test for test in session.outcomes()}
    right = [name for name in found if name.startswith("test_right")]
    assert {name: test["outcome"] for name, test in found.items()} == {**ENDS, **dict.fromkeys(right, "passed")}
    assert len(right) == 4
    assert found["test_lost"]["lost"]
    assert found[right[0]]["pair"] == ["mm_rope", "triton"]
    assert "why" in found["test_skipped"]["reason"]
    assert session.run.data["tests"] == session.outcomes()


def test_without_xdist_pytest_is_started_again_behind_such_a_test(session, monkeypatch):
    started = {"outcome": "started", "pair": ["mm_rope", "triton"]}
    runs = [
        [{"test": "a", **started}, {"test": "a", "outcome": "passed"}, {"test": "b", **started}],
        [{"test": "c", **started}, {"test": "c", "outcome": "failed", "lost": True}],
        [{"test": "d", **started}, {"test": "d", "outcome": "failed", "lost": False}],
    ]
    seen = []

    def bounded(command, seconds, log, LUMOS_GPU_TESTS, **_):
        given = json.loads(LUMOS_GPU_TESTS)
        seen.append(Path(given["done"]).read_text().split())
        with open(given["outcomes"], "a") as file:
            file.write("".join(f"\n{json.dumps(line)}\n" for line in runs[len(seen) - 1]) + '{"cut')
        return "failed (exit 1)"

    monkeypatch.setattr(tests, "run_bounded", bounded)
    assert session.go(["tests/gpu"], 40.0, 0) == []
    assert seen == [[], ["a", "b"], ["a", "b", "c"]]
    assert [test["outcome"] for test in session.outcomes()] == ["passed", "ended the process", "failed", "failed"]


@pytest.mark.parametrize(
    ("status", "problem"),
    [("timeout", "tests/gpu: no time was left"), ("failed (exit 4)", "tests/gpu: pytest failed (exit 4): said")],
)
def test_tests_without_time_or_without_an_outcome_are_a_problem(session, monkeypatch, status, problem):
    monkeypatch.setattr(tests, "run_bounded", lambda command, seconds, log, **env: log.write_text("said") and status)
    assert session.go(["tests/gpu"], 20.0, 2) == [problem]
    monkeypatch.setattr(tests, "run_bounded", lambda *_, **__: "failed (exit 5)")
    assert session.go(["tests/gpu"], 20.0, 2) == [], "nothing was selected"


# What is compiled, compared, tuned


def test_the_prediction_counts_the_compilations():
    assert compile_ahead.predict({"cpu_s": 24.0, "longest_s": 1.0}) == 2.0
    assert compile_ahead.predict({"cpu_s": 24.0, "longest_s": 5.0}) == 5.0
    assert compile_ahead.predicted_call(100.0)["prepare"] > compile_ahead.predicted_call(20.0)["prepare"]


def test_every_kernel_of_attention_is_compiled_in_several_configurations():
    names = [subject.name for subject in compile_ahead.subjects()]
    for kernel in ("forward", "dkdv", "dq", "fused"):
        for head_dim in (64, 128):
            assert 2 <= sum(name.startswith(f"frame_attention {kernel} D={head_dim} (") for name in names) <= 5


def test_a_kernel_that_does_not_compile_is_a_finding(monkeypatch):
    def refused():
        raise RuntimeError("ptxas: out of registers")

    monkeypatch.setattr(compile_ahead, "_all_subjects", lambda: [compile_ahead.Subject("bad", refused)])
    assert compile_ahead.compile_one(0)["failed"] == "ptxas: out of registers"


def test_the_tuner_writes_the_table_in_place_and_a_broken_one_is_restored(tmp_path, monkeypatch):
    table = tmp_path / "tree" / "tuned.py"
    table.parent.mkdir()
    right = "CONFIGS: dict = {}\nFUSED_BACKWARD: set = set()\n"
    table.write_text(right)
    monkeypatch.setattr(results, "TUNED", table)
    monkeypatch.setattr(tuner, "SOURCE", tmp_path / "tune.py")
    commands = []

    def bounded(command, seconds, log):
        commands.append(command)
        table.write_text(written)
        return "timeout"

    monkeypatch.setattr(tuner, "run_bounded", bounded)
    run = Run(tmp_path / "record.json", tmp_path / "out", tmp_path, dry_run=False)
    (tmp_path / "out").mkdir()
    for source, written, kept in (
        ("", right + "# tuned\n", right + "# tuned\n"),
        ('"--candidates" "--head-dims"', "CONFIGS: dict = {", right + "# tuned\n"),
    ):
        tuner.SOURCE.write_text(source)
        run.items, run.running = {"tune": {"data": {}}}, {"name": "tune"}
        monkeypatch.setattr(results, "table_digest", lambda: "digest")
        tuner.find(run)
        assert table.read_text() == (tmp_path / "out" / "tuned.py").read_text() == kept
        assert run.data["status"] == "timeout"
        assert ("restored" in run.data) == (written != kept)
    assert str(table) in commands[0]
    assert "--candidates" not in commands[0]
    assert commands[1][-4:] == ["--candidates", "5", "--head-dims", "64,128"]


# Cases


def broken(inputs):
    raise RuntimeError("CUDA out of memory")


@pytest.fixture
def mm_rope_with(monkeypatch):
    """Adds rivals to mm_rope's benchmark."""
    bench = registry.ops()["mm_rope"]

    def add(*rivals):
        changed = type(bench)(**{**vars(bench), "rivals": [*bench.rivals, *rivals]})
        from bench import report

        for module in (registry, measure, report):
            monkeypatch.setattr(module, "ops", lambda: {"mm_rope": changed})

    return add


def record_of(find, tmp_path):
    run = Run(tmp_path / "record.json", tmp_path, tmp_path, dry_run=True)
    run.items, run.running = {"case": {"data": {}}}, {"name": "case"}
    find(run)
    return run.data["record"]


KEY = "mm_rope/tiny-smoke/bf16/forward"


def test_a_case_has_rows_for_those_who_are_missing_or_broken(mm_rope_with, tmp_path):
    mm_rope_with(Contestant("absent", broken, requires=("no_such_library",)), Contestant("broken", broken))
    record = record_of(ops.case_finder(KEY), tmp_path)
    rows = {row["contestant"]: row for row in record["rows"]}
    assert rows["absent"]["status"] == "missing"
    assert "no_such_library" in rows["absent"]["reason"]
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: CUDA out of memory")
    assert rows["eager"]["status"] == "ok"
    json.dumps(record)


def test_jit_rivals_have_items_of_their_own(mm_rope_with, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "is_jit", lambda contestant: contestant.name.startswith("jit"))
    eager = next(rival for rival in registry.ops()["mm_rope"].rivals if rival.name == "eager")
    mm_rope_with(Contestant("jit absent", broken, requires=("no_such_library",)), Contestant("jit", eager.run))
    case = registry.find(KEY)
    assert "jit" not in [one.name for one in ops.contestants(case, "cpu")]
    assert ops.jit_pairs("cpu", [KEY]) == [(KEY, "jit absent"), (KEY, "jit")]
    rows = {row["contestant"]: row["status"] for row in record_of(ops.jit_finder(KEY, "jit"), tmp_path)["rows"]}
    assert rows == dict.fromkeys(["lumos native", "eager", "jit"], "ok") | dict.fromkeys(rows, "ok")
    assert "official style" not in rows, "ours, the yardstick and the rival alone"
    [row] = record_of(ops.jit_finder(KEY, "jit absent"), tmp_path)["rows"]
    assert row["status"] == "missing"
    assert [row["contestant"] for row in record_of(ops.case_finder(KEY), tmp_path)["rows"]].count("jit") == 0


def test_both_backward_passes_are_contestants(monkeypatch):
    case = registry.find("frame_attention/tiny-smoke/bf16/forward+backward")
    names = [one.name for one in ops.contestants(case, "cpu")]
    ours = [name for name in names if "backward" in name]
    assert len(ours) == 2
    assert {name.split(", ")[1] for name in ours} == {"fused backward", "deterministic backward"}
    bench = registry.ops()["frame_attention"]
    found = measure.check(bench, case, [one for one in ops.contestants(case, "cpu") if one.role != "ceiling"], "cpu")
    assert all(error <= limit for error, limit in found.values())
    forward = registry.find("frame_attention/tiny-smoke/bf16/forward")
    assert not ops.backward_variants(forward, "cpu")


def test_the_fused_backward_is_the_fused_one(monkeypatch):
    """By the implementation's own name for it, and before there is one by the table's choice."""
    from bench.gpu import fused
    from lumos_kernels.frame_attention import reference

    called = []
    right = reference.backward
    monkeypatch.setattr(
        reference,
        "backward_fused",
        lambda *args: called.append("fused") or right(*args, deterministic=False),
        raising=False,
    )
    case = registry.find("frame_attention/tiny-smoke/bf16/forward+backward")
    inputs = registry.ops()["frame_attention"].build(case, "cpu", torch.float32)
    o, _ = fused.attention_fused(inputs.q, inputs.k, inputs.v, inputs.limits, "reference")
    o.backward(inputs.upstream[0])
    assert called == ["fused"]


# Clocks of the GPU


class FakeGpu:
    """Counts the microseconds of the device and of the host."""

    def __init__(self, monkeypatch, host_us=0):
        self.now, self.log, self.host, self.host_us = 0.0, [], 0.0, host_us
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now
                gpu.log.append("event")

            def synchronize(self):
                gpu.log.append("wait")

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.work(f"sleep {cycles}", cycles / 2000))
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)
        monkeypatch.setattr(
            torch, "empty", lambda *_, **__: type("Cache", (), {"zero_": lambda _: self.work("flush", 100)})()
        )

    def work(self, what, us):
        self.now += us
        self.log.append(what)

    def call(self):
        self.work("call", 44)
        self.host += self.host_us * 1e-6


def test_the_gpu_clock_times_the_call_alone_behind_a_cold_cache_and_a_head_start(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    clock = timing.CudaClock()
    assert clock.cycle == pytest.approx(0.5e-9)
    gpu.log.clear()
    assert clock(gpu.call, 3) == pytest.approx(3 * 44e-6)
    assert gpu.log == ["flush", f"sleep {timing.HEAD_START_CYCLES}", "event", "call", "event", "wait"] * 3


@pytest.mark.parametrize(("host_us", "sleeps"), [(1000, [1]), (3000, [1, 2]), (7000, [1, 2, 4]), (500_000, [1])])
def test_the_head_start_covers_the_hosts_time(monkeypatch, host_us, sleeps):
    gpu = FakeGpu(monkeypatch, host_us)
    clock = timing.CudaClock()
    gpu.log.clear()
    clock(gpu.call, 1)
    assert [word for word in gpu.log if word.startswith("sleep")] == [
        f"sleep {factor * timing.HEAD_START_CYCLES}" for factor in sleeps
    ]


def test_a_measurement_ends_with_the_time_that_passes_not_with_the_time_that_it_reports():
    def clock(call, repeats):
        time.sleep(0.02)  # flushing, sleeping, waiting
        return 1e-6 * repeats

    start = time.monotonic()
    timing.interleave({"a": lambda: None, "b": lambda: None}, seconds=0.2, clock=clock)
    assert time.monotonic() - start < 2


# The whole model


def test_a_document_has_the_tokens_of_the_published_batches():
    config = whole_model.model_config(dry_run=False)
    for grid, frame in ((whole_model.FRAMES_256P, 1828), (whole_model.FRAMES_384P, 4084)):
        ids = whole_model.document(config, grid, 7)
        assert ids.shape == (1, 266 + 7 * frame + 2)
        from lumos_kernels import FrameLayout

        assert FrameLayout.from_tokens(ids, check=True).num_frames == 7


def test_out_of_memory_is_a_finding():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    assert whole_model.attempt(call) == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 40 GiB"}
    assert whole_model.attempt(lambda: {"seconds": 1.0}) == {"seconds": 1.0}


def test_the_models_gates_read_the_figures():
    found = {
        "step, larger": {"ours": {"tokens": 28856, "seconds": 0.8, "mfu": 0.47}},
        "longest": {"tokens": 90116, "step": {"failed": "out of memory"}},
        "kernels of a step": {"host_syncs": {"count": 0}},
        "launches": {"forward_per_layer": 16.0},
        "generation": {"frames": [1.9, 1.7, 1.6]},
    }
    items = {name: {"status": "ok", "data": data} for name, data in found.items()}
    judged = gates.evaluate({"calls": {"1": {"items": items}}})
    statuses = [gate["status"] for gate in judged if gate["op"] == "model"]
    assert statuses == ["goal", "goal", "not measured", "missed", "goal", "goal"]


# The command


def test_the_call_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu_suite.main(["--call", "2", "--out", str(tmp_path), "--with", str(tmp_path)])
    assert "must be a suite.json" in capsys.readouterr().err


def test_a_dry_run_of_both_calls(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    one, two = tmp_path / "1", tmp_path / "2"
    assert gpu_suite.main(["--call", "1", "--dry-run", "--out", str(one)]) == 0
    assert gpu_suite.main(["--call", "2", "--dry-run", "--out", str(two), "--with", str(one)]) == 0
    result = read_json(two / "suite.json")
    for call in ("1", "2"):
        wanted = [item.name for stage in suite.CALLS[int(call)] for item in stages.ITEMS[stage.name](True)]
        assert items_of(result, call) == dict.fromkeys(wanted, "ok")
        assert result["calls"][call]["settings"]["processes"] == 2
        assert result["calls"][call]["environment"]["device"] == "cpu"
    assert len(list(one.iterdir())) <= 8
    assert results.data(result, "compiled")["done"] == len(compile_ahead.SKETCH)
    assert list((tmp_path / "cache").rglob("*.cubin")), "what other processes compiled is there for all"
    assert results.data(result, "ceilings")["matmul"]["TFLOP/s"] > 0
    assert {check["outcome"] for check in results.data(result, "correctness")["checks"]} == {"passed"}
    assert {row["status"] for record in results.cases(result) for row in record["rows"]} <= {"ok", "missing"}
    assert results.data(result, "step, larger")["ours"]["seconds"] > 0
    assert results.data(result, "losses")["losses"]["agree"]
    assert results.data(result, "longest")["phases"].keys() == {"forward", "backward", "optimizer"}
    assert results.data(result, "graphs")["frames_equal"] == [True] * 3
    tested = results.data(result, "tests")
    assert {test["outcome"] for test in tested["tests"]} == {"passed", "skipped"}
    assert tested["incomplete"] == []
    assert results.data(result, "sanitizer")["runs"][0]["status"] == "clean"
    assert result["verdicts"]
    assert all("it was a dry run" in verdict["reasons"] for verdict in result["verdicts"])
    assert capsys.readouterr().out.startswith("# GPU suite")
