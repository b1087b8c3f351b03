"""The GPU suite on a CPU: what becomes of items that fail, hang or die, what is kept, and a dry run of both calls."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_suite
from bench.gpu import compile_ahead, machine, ops, results, stages, suite, worker
from bench.gpu.processes import read_json, run_bounded, start, write_json
from bench.gpu.suite import Call, Stage
from bench.gpu.worker import Item, Run


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
    write_json(tmp_path / "a.json", {"x": Path("y")})
    assert read_json(tmp_path / "a.json") == {"x": "y"}, "what JSON cannot hold costs nothing else"


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


def test_shares_grow_by_what_is_left_over_and_the_last_items_go_without(run_items):
    limits = {}

    def note(run):
        limits[run.running["name"]] = run.left()

    def endless(run):
        time.sleep(60)

    run_items({"a": (5, note), "b": (3, note), "c": (4, note)}, seconds=10)
    assert limits["a"] == pytest.approx(5, abs=1), "its share, though all together are more than the time"
    assert limits["b"] == pytest.approx(6, abs=1), "its own 3, and 3 that are left beyond the share of c"
    assert limits["c"] == pytest.approx(10, abs=1)
    _, found = run_items({"a": (5, endless), "b": (3, note)}, seconds=0.5)
    assert [item["status"] for item in found["items"].values()] == ["overrun", "not started"]


def test_a_lost_device_ends_the_process_behind_its_item(run_items, monkeypatch):
    monkeypatch.setattr(worker, "_device_is_lost", lambda: True)
    with pytest.raises(SystemExit):
        run_items({"bad": (1, lambda run: None), "next": (1, lambda run: None)})


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


def test_a_summary_that_fails_costs_no_finding(run_call, tmp_path, monkeypatch):
    monkeypatch.setattr(suite.gates, "evaluate", lambda result: result["absent"])
    result, _ = run_call(f"save(a={OK})")
    assert items_of(result) == items_of(read_json(tmp_path / "out" / "suite.json")) == {"a": "ok"}
    assert "KeyError: 'absent'" in (tmp_path / "out" / "suite.md").read_text()


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
    alone, _ = run_call(f"save(tests={OK})", number=2, before=tmp_path / "absent")
    assert list(alone["calls"]) == ["2"]
    assert "absent" in alone["calls"]["2"]["settings"]["alone"]
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


# The command


def test_the_call_must_be_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path)])
    write_json(tmp_path / "suite.json", {"schema": results.SCHEMA, "code": "other", "calls": {"1": {}}})
    with pytest.raises(SystemExit):
        gpu_suite.main(["--call", "2", "--out", str(tmp_path / "out"), "--with", str(tmp_path)])
    assert "is of other code" in capsys.readouterr().err


def test_a_dry_run_of_both_calls(tmp_path, capsys, monkeypatch):
    pytest.importorskip("triton")
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
    assert {row["op"] for row in results.data(result, "self-check")["backends"]} >= {"mm_rope", "frame_attention"}
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
