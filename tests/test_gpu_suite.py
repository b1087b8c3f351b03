"""The GPU suite on a CPU: what becomes of parts that fail, hang or die, what is kept, and a dry run of the parts."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_suite, measure, registry, timing
from bench.gpu import cases, gates, parts, suite, summary, tests, whole_model
from bench.gpu.suite import Part, Recorder, Suite, read_json, run_bounded, write_json
from bench.registry import Contestant
from lumos_kernels import dispatch


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
    assert run_bounded(python("print('before', flush=True); import time; time.sleep(60)"), 1.5, log) == "timeout"
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


# The runner


@pytest.fixture
def run_parts(tmp_path, monkeypatch):
    """Runs stand-ins for parts: name -> (what it writes, its status), and says which ones were started."""

    def run(behaviour, seconds=100.0, resume=False, grace=0.0):
        started = []

        def bounded(command, limit, log, **environment):
            name = command[command.index("--part") + 1]
            started.append((name, float(command[command.index("--seconds") + 1])))
            written, status = behaviour[name]
            if written is not None:
                write_json(tmp_path / "work" / f"{name}.json", written)
            log.write_text(f"log of {name}")
            return status

        monkeypatch.setattr(suite, "run_bounded", bounded)
        one = Suite(tmp_path / "out", tmp_path / "work", seconds, dry_run=True)
        result = one.run([Part(name, 50.0) for name in behaviour], resume=resume)
        return result, started

    return run


def test_what_a_part_wrote_is_kept_whatever_became_of_it(run_parts, tmp_path):
    behaviour = {
        "environment": ({"environment": None}, "ok"),
        "tests": ({"tests": [{"test": "a", "pair": ["mm_rope", "triton"], "outcome": "passed"}]}, "timeout"),
        "ceilings": (None, "failed (exit -11)"),
        "ops": ({"cases": []}, "ok"),
    }
    result, started = run_parts(behaviour)
    assert [name for name, _ in started] == list(behaviour)
    assert {name: part["status"] for name, part in result["parts"].items()} == {n: s for n, (_, s) in behaviour.items()}
    assert result["parts"]["tests"]["data"]["tests"][0]["outcome"] == "passed"
    assert result["parts"]["ceilings"]["data"] is None
    assert result["parts"]["ceilings"]["log"] == "log of ceilings"
    assert read_json(tmp_path / "out" / "suite.json") == json.loads(json.dumps(result))
    text = (tmp_path / "out" / "suite.md").read_text()
    assert "| ceilings | failed (exit -11) |" in text
    assert "| tests | timeout |" in text
    assert "dry run" in text


def test_resume_runs_what_is_not_finished(run_parts):
    run_parts({"tests": ({"a": 1}, "ok"), "ops": ({"b": 1}, "timeout"), "model": (None, "failed (exit 1)")})
    result, started = run_parts({"tests": (None, "x"), "ops": ({"b": 2}, "ok"), "model": ({}, "ok")}, resume=True)
    assert [name for name, _ in started] == ["ops", "model"]
    assert result["parts"]["tests"] == {"status": "ok", "wall_s": 0.0, "log": "log of tests", "data": {"a": 1}}
    assert result["parts"]["ops"]["data"] == {"b": 2}
    result, started = run_parts({"tests": (None, "x"), "ops": (None, "x")}, resume=True)
    assert started == []
    assert result["parts"]["ops"]["status"] == "ok"
    result, started = run_parts({"tests": ({"a": 2}, "ok")})
    assert [name for name, _ in started] == ["tests"]
    assert set(result["parts"]) == {"tests"}, "a new run starts afresh"


def test_resume_refuses_other_code(run_parts, monkeypatch):
    run_parts({"tests": ({"a": 1}, "ok")})
    monkeypatch.setattr(suite, "code_digest", lambda: "other")
    with pytest.raises(ValueError, match="parts of other code"):
        run_parts({"tests": ({"a": 1}, "ok")}, resume=True)
    _, started = run_parts({"tests": ({"a": 1}, "ok")})
    assert len(started) == 1


def test_the_time_of_a_part_scales_and_ends_with_the_budget(run_parts):
    result, started = run_parts({"tests": ({}, "ok")}, seconds=2 * suite.PLANNED_SECONDS)
    assert started[0][1] == pytest.approx(100.0, abs=0.1)
    result, started = run_parts({"ops": ({}, "ok")}, seconds=1.0)
    assert started == []
    assert result["parts"]["ops"]["status"] == "not started"


def test_the_parts_fit_nine_minutes_and_are_all_there():
    assert sum(part.seconds for part in parts.PARTS) <= suite.PLANNED_SECONDS + 30  # most end before their time
    assert {part.name for part in parts.PARTS} == set(parts.FUNCTIONS)
    assert [part.name for part in parts.PARTS][:3] == ["environment", "build", "tests"]


def test_a_file_is_replaced_whole(tmp_path):
    record = Recorder(tmp_path / "a.json")
    record["x"] = 1
    record["y"] = [2]
    assert read_json(tmp_path / "a.json") == {"x": 1, "y": [2]}
    (tmp_path / "a.json").write_text("{")
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "absent.json") is None


# Tests that take the process down


def outcomes(*lines):
    return "".join(json.dumps(line) + "\n" for line in lines)


def started(name):
    return {"test": name, "outcome": "started", "pair": ["mm_rope", "triton"]}


@pytest.fixture
def group(tmp_path):
    class FakeRun:
        folder, dry_run = tmp_path, True

    return tests.Group(FakeRun, "mm_rope")


def test_tests_go_on_behind_the_one_that_ended_the_process(group, monkeypatch):
    scripts = [
        (
            outcomes(started("a"), {"test": "a", "outcome": "passed"}, {"test": "a", "seconds": 1.0}, started("b")),
            "failed (exit -6)",
        ),
        (
            outcomes(started("c"), {"test": "c", "outcome": "failed", "lost": True, "reason": "illegal memory access"}),
            "failed (exit 1)",
        ),
        (
            outcomes(
                started("d"),
                {"test": "d", "outcome": "failed", "lost": False, "reason": "wrong"},
                started("e"),
                {"test": "e", "outcome": "passed"},
            )
            + '{"cut',
            "failed (exit 1)",
        ),
    ]
    seen = []

    def bounded(command, seconds, log, LUMOS_GPU_TESTS):
        settings = json.loads(LUMOS_GPU_TESTS)
        seen.append(Path(settings["done"]).read_text().split())
        text, status = scripts[len(seen) - 1]
        with open(settings["outcomes"], "a") as file:
            file.write(text)
        return status

    monkeypatch.setattr(tests, "run_bounded", bounded)
    group.go("not large", 100.0)
    assert seen == [[], ["a", "b"], ["a", "b", "c"]]
    assert [(test["test"], test["outcome"]) for test in group.outcomes()] == [
        ("a", "passed"),
        ("b", "ended the process"),
        ("c", "failed"),
        ("d", "failed"),
        ("e", "passed"),
    ]
    assert group.problems == []


def test_a_run_that_never_starts_a_test_is_a_problem(group, monkeypatch):
    monkeypatch.setattr(tests, "run_bounded", lambda *args, **settings: "failed (exit 4)")
    group.go("not large", 10.0)
    assert "pytest failed (exit 4)" in group.problems[0]
    group.problems.clear()
    monkeypatch.setattr(tests, "run_bounded", lambda *args, **settings: "failed (exit 5)")  # nothing was selected
    group.go("large", 10.0)
    assert group.problems == []
    monkeypatch.setattr(tests, "run_bounded", lambda *args, **settings: "timeout")
    group.go("large", 10.0)
    assert group.problems == ["large: no time was left"]


def test_a_file_of_kernel_tests_is_read_by_its_report(tmp_path, monkeypatch):
    class FakeRun:
        folder = tmp_path

    file = tests.KERNEL_FILES / "test_tube_masked_loss_triton.py"
    assert file.exists()
    kernels = tests.KernelFile(FakeRun, file)
    assert kernels.op == "tube_masked_loss"
    report = """<testsuites><testsuite><testcase name="a" time="1.5"/>
        <testcase name="b"><failure message="no">E assert</failure></testcase>
        <testcase name="c"><skipped message="why"/></testcase></testsuite></testsuites>"""

    def bounded(command, seconds, log):
        kernels.report.write_text(report)
        return "failed (exit 1)"

    monkeypatch.setattr(tests, "run_bounded", bounded)
    assert kernels.outcomes() == []
    kernels.go("not large", 10.0)
    found = kernels.outcomes()
    assert [(test["outcome"], test["pair"]) for test in found] == [
        (outcome, ["tube_masked_loss", "triton"]) for outcome in ("passed", "failed", "skipped")
    ]
    assert "E assert" in found[1]["reason"]
    assert kernels.problems == []
    monkeypatch.setattr(tests, "run_bounded", lambda *arguments: "timeout")
    kernels.go("not large", 10.0)
    assert kernels.problems[0].startswith("test_tube_masked_loss_triton.py: pytest timeout")


def test_every_file_of_kernel_tests_is_run_for_its_op(tmp_path):
    class FakeRun:
        folder = tmp_path

    files = tests.kernel_files()
    assert {file.name for file in tests.KERNEL_FILES.glob("test_*.py")} == {
        *(file.name for file in files),
        "test_interpreter_bf16.py",
    }
    assert {tests.KernelFile(FakeRun, file).op for file in files} == {
        "frame_attention",
        "masked_sample",
        "mm_rope",
        "tube_masked_loss",
    }


# Contestants that take the process down


def test_ops_go_on_without_the_contestant_that_ended_the_process(tmp_path, monkeypatch):
    calls = []

    def bounded(command, seconds, log, **environment):
        keys = [word for word in command if "/" in word and word.count("/") == 3 and not word.startswith("/")]
        excluded = [word.removeprefix("--exclude=") for word in command if word.startswith("--exclude=")]
        calls.append((keys, excluded))
        log.write_text("illegal memory access")
        done = [{"case": key, "rows": []} for key in keys]
        if len(calls) == 1:
            write_json(tmp_path / "ops_cases.json", {"cases": done[:1], "running": [keys[1], "bad rival"]})
            return "failed (exit -6)"
        write_json(tmp_path / "ops_cases.json", {"cases": done, "running": None})
        return "ok"

    monkeypatch.setattr(parts, "run_bounded", bounded)
    run = parts.Run(Recorder(tmp_path / "ops.json"), tmp_path, 100.0, dry_run=True)
    parts.ops(run)
    (first, _), (second, excluded) = calls
    assert second == first[1:]
    assert excluded == ["bad rival"]
    data = read_json(tmp_path / "ops.json")
    assert [case["case"] for case in data["cases"]] == first
    assert data["crashed"][0]["contestant"] == "bad rival"
    assert data["not_measured"] == []


def test_a_case_whose_reference_ends_the_process_is_left_out(tmp_path, monkeypatch):
    calls = []

    def bounded(command, seconds, log, **environment):
        keys = [word for word in command if word.count("/") == 3 and not word.startswith("/")]
        calls.append(keys)
        log.write_text("")
        write_json(tmp_path / "ops_cases.json", {"cases": [], "running": [keys[0], "reference"]})
        return "failed (exit -6)"

    monkeypatch.setattr(parts, "run_bounded", bounded)
    run = parts.Run(Recorder(tmp_path / "ops.json"), tmp_path, 100.0, dry_run=True)
    parts.ops(run)
    assert [len(keys) for keys in calls] == list(range(len(calls[0]), 0, -1))


def test_a_tuner_is_called_by_its_hook_and_its_table_kept(tmp_path, monkeypatch):
    package = tmp_path / "op_package"
    (package / "fast").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "fast" / "__init__.py").touch()
    (package / "fast" / "tune.py").touch()
    (package / "plain.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    able = dispatch.Op("op", "op_package", {"fast": dispatch.runs_anywhere, "plain": dispatch.runs_anywhere})
    monkeypatch.setattr(parts.dispatch, "ops", lambda: {"op": able})
    commands = []

    def bounded(command, seconds, log):
        commands.append(command[2:])
        if "--out" in command:
            Path(command[command.index("--out") + 1]).write_text("CONFIGS = {}")
        log.write_text("tried 3")
        return "ok"

    monkeypatch.setattr(parts, "run_bounded", bounded)
    for dry_run, table in ((True, ""), (False, "CONFIGS = {}")):
        run = parts.Run(Recorder(tmp_path / "tune.json"), tmp_path, 70.0, dry_run)
        parts.tune(run)
        assert run.record["tuners"] == {"op fast": {"status": "ok", "table": table, "log": "tried 3"}}
    assert commands[0] == ["op_package.fast.tune", "--dry-run"]
    assert commands[1][:3] == ["op_package.fast.tune", "--minutes", "1.00"]


def test_a_case_has_rows_for_those_who_are_missing_excluded_or_broken(monkeypatch):
    def broken(inputs):
        raise RuntimeError("CUDA out of memory")

    bench = registry.ops()["mm_rope"]
    rivals = [
        *bench.rivals,
        Contestant("absent", broken, requires=("no_such_library",)),
        Contestant("broken", broken),
        Contestant("crashing", broken),
    ]
    changed = type(bench)(**{**vars(bench), "rivals": rivals})
    monkeypatch.setattr(registry, "ops", lambda: {"mm_rope": changed})
    from bench import report

    monkeypatch.setattr(measure, "ops", registry.ops)
    monkeypatch.setattr(report, "ops", registry.ops)
    case = next(case for case in bench.cases if case.key == "mm_rope/tiny-smoke/bf16/forward")
    record = cases.measure_one(case, "cpu", 0.0, ["crashing"], lambda name: None)
    rows = {row["contestant"]: row for row in record["rows"]}
    assert rows["absent"]["status"] == "missing"
    assert "no_such_library" in rows["absent"]["reason"]
    assert (rows["broken"]["status"], rows["broken"]["reason"]) == ("failed", "RuntimeError: CUDA out of memory")
    assert (rows["crashing"]["status"], rows["crashing"]["reason"]) == ("failed", "it ended the process")
    assert rows["eager"]["status"] == "ok"
    json.dumps(record)


def test_the_gpu_clock_times_the_calls_alone_and_with_a_cold_cache(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = sum(us for us, _ in happened)
            happened.append((1, "event"))

        def elapsed_time(self, end):
            return (end.at - self.at) / 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append((800, "sleep")))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append((0, "wait")))
    clock = object.__new__(timing.CudaClock)
    clock.cache = type("Cache", (), {"zero_": lambda self: happened.append((100, "flush"))})()
    took = clock(lambda: happened.append((44, "call")), 3)
    assert took == pytest.approx(3 * 45e-6)  # 44 us of the call and 1 of its first event
    assert [name for _, name in happened] == ["flush", "sleep", "event", "call", "event"] * 3 + ["wait"]


def test_a_measurement_ends_with_the_time_that_passes_not_with_the_time_that_it_reports():
    def clock(call, repeats):
        time.sleep(0.02)  # flushing, sleeping, waiting
        return 1e-6 * repeats

    start = time.monotonic()
    timing.interleave({"a": lambda: None, "b": lambda: None}, seconds=0.2, clock=clock)
    assert time.monotonic() - start < 2


def test_a_contestant_that_hangs_ends_the_process_by_name(tmp_path):
    out = tmp_path / "cases.json"
    hang = f"""
import time
from bench import registry
from bench.gpu import cases
from bench.registry import Contestant
bench = registry.ops()["mm_rope"]
rivals = [*bench.rivals, Contestant("hanging", lambda inputs: time.sleep(60))]
changed = type(bench)(**{{**vars(bench), "rivals": rivals}})
real = registry.ops
registry.ops = lambda: {{**real(), "mm_rope": changed}}
cases.main(["mm_rope/tiny-smoke/bf16/forward", "--out", {str(out)!r}, "--device", "cpu", "--patience", "2"])
"""
    assert run_bounded(python(hang), 60, tmp_path / "log") == f"failed (exit -{int(signal.SIGALRM)})"
    assert read_json(out)["running"] == ["mm_rope/tiny-smoke/bf16/forward", "hanging"]


# The whole model


def test_a_document_has_the_tokens_of_the_published_batches():
    config = whole_model.model_config(dry_run=False)
    for grid, frame in ((whole_model.FRAMES_256P, 1828), (whole_model.FRAMES_384P, 4084)):
        ids = whole_model.document(config, grid, 7)
        assert ids.shape == (1, 266 + 7 * frame + 2)
        from lumos_kernels import FrameLayout

        assert FrameLayout.from_tokens(ids, check=True).num_frames == 7


def test_a_step_agrees_with_the_official_way():
    step = whole_model.Step(whole_model.model_config(True, num_hidden_layers=1), (4, 8), 2, "cpu")
    losses = whole_model._losses(step)
    assert losses["agree"], losses
    assert 0 < losses["ours"] < 100
    step()
    assert step.flops > 0


def test_out_of_memory_is_a_finding():
    def call():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    assert whole_model.attempt(call) == {"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 40 GiB"}
    assert whole_model.attempt(lambda: {"seconds": 1.0}) == {"seconds": 1.0}


def test_the_models_gates_read_the_figures():
    ours = {"seconds": 0.8, "mfu": 0.47, "tokens": 28856}
    data = {
        "model": {
            "steps": {"13064 tokens": {"ours": {"tokens": 13064, "seconds": 9.0}}, "28856 tokens": {"ours": ours}}
        }
        | {"longest": [{"tokens": 57000, "seconds": 2.0}, {"tokens": 90116, "failed": "out of memory"}]},
        "launches": {"forward_per_layer": 16.0, "host_syncs": {"count": 0}},
    }
    found = {gate["name"]: gate for gate in gates.evaluate({"parts": {name: {"data": d} for name, d in data.items()}})}
    statuses = [gate["status"] for gate in found.values() if gate["op"] == "model"]
    assert statuses == ["goal", "goal", "missed", "missed", "goal", "not measured"]


# The command


def test_unknown_parts_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_suite.main(["--out", str(tmp_path), "--parts", "tests,everything"])
    assert "no part everything; there are environment, build, tests" in capsys.readouterr().err


def test_a_dry_run_of_two_parts(tmp_path, capsys):
    assert (
        gpu_suite.main(["--dry-run", "--out", str(tmp_path), "--parts", "environment,ceilings", "--minutes", "4"]) == 0
    )
    result = read_json(tmp_path / "suite.json")
    assert result["environment"]["device"] == "cpu"
    assert result["parts"]["ceilings"]["data"]["matmul"]["TFLOP/s"] > 0
    assert capsys.readouterr().out.startswith("# GPU suite")


@pytest.mark.slow
def test_a_dry_run_of_everything(tmp_path):
    assert gpu_suite.main(["--dry-run", "--out", str(tmp_path), "--minutes", "12"]) == 0
    result = read_json(tmp_path / "suite.json")
    assert set(result["parts"]) == set(parts.FUNCTIONS)
    data = {name: part["data"] for name, part in result["parts"].items()}
    assert not [test for test in data["tests"]["tests"] if test["outcome"] not in ("passed", "skipped")]
    assert sum(test["outcome"] == "passed" for test in data["tests"]["tests"]) > 50
    assert data["sanitizer"]["runs"][0]["status"] == "clean"
    assert {row["status"] for case in data["ops"]["cases"] for row in case["rows"]} <= {"ok", "missing"}
    assert data["model"]["steps"]
    assert data["launches"]["forward_per_layer"] > 0
    assert data["profile"]["profiles"][0]["kernels"]
    assert not any(not verdict["reasons"] for verdict in result["verdicts"])
    assert "What may be entered" in summary.markdown(result)
