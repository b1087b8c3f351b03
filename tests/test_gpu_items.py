"""The items of the GPU suite on a CPU: tests, compilations, the tuner's table, cases, figures."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from bench import measure, registry
from bench.gpu import compile_ahead, fused, gates, machine, notes, ops, results, tests, tuner, whole_model
from bench.gpu.worker import Run
from bench.registry import Contestant
from lumos_kernels import self_check

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


def test_tests_that_are_done_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "done").write_text("a\nb")
    items = [SimpleNamespace(nodeid=name) for name in "abc"]
    monkeypatch.setenv("LUMOS_GPU_TESTS", json.dumps({"done": str(tmp_path / "done")}))
    notes.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["c"]


@pytest.mark.parametrize(
    ("status", "problem"),
    [("timeout", "tests/gpu: no time was left"), ("failed (exit 4)", "tests/gpu: pytest failed (exit 4): said")],
)
def test_tests_without_time_or_without_an_outcome_are_a_problem(session, monkeypatch, status, problem):
    monkeypatch.setattr(tests, "run_bounded", lambda command, seconds, log, **env: log.write_text("said") and status)
    assert session.go(["tests/gpu"], 20.0, 2) == [problem]
    monkeypatch.setattr(tests, "run_bounded", lambda *_, **__: "failed (exit 5)")
    assert session.go(["tests/gpu"], 20.0, 2) == [], "nothing was selected"


def test_what_xdist_did_not_get_to_is_run_again(session, monkeypatch):
    passed = [{"test": "a", "outcome": "started", "pair": None}, {"test": "a", "outcome": "passed"}]
    statuses = ["failed (exit 3)", "ok"]

    def bounded(command, seconds, log, **_):
        if len(statuses) == 2:
            session.file.write_text("".join(json.dumps(line) + "\n" for line in passed))
        return statuses.pop(0)

    monkeypatch.setattr(tests, "run_bounded", bounded)
    assert session.go(["tests/gpu"], 20.0, 2) == []
    assert statuses == [], "an internal error of pytest's is not its end"


def test_what_had_too_little_memory_is_forgotten(session):
    reasons = {"a": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB", "b": "AssertionError: dq"}
    lines = [{"test": name, "outcome": "started", "pair": None} for name in reasons]
    lines += [{"test": name, "outcome": "failed", "reason": reason} for name, reason in reasons.items()]
    session.file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    assert session.forget(tests.MEMORY) == 1
    assert [(test["test"], test["outcome"]) for test in session.outcomes()] == [("b", "failed")]
    assert session.forget(tests.MEMORY) == 0


# What is compiled, compared, tuned


def test_the_prediction_counts_the_compilations():
    assert compile_ahead.predict({"cpu_s": 24.0, "longest_s": 1.0}) == 2.0
    assert compile_ahead.predict({"cpu_s": 24.0, "longest_s": 5.0}) == 5.0
    assert compile_ahead.predicted_call(100.0)["prepare"] > compile_ahead.predicted_call(20.0)["prepare"]


def test_every_kernel_of_attention_is_launched_in_several_configurations(monkeypatch):
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    launched = {}
    for subject in compile_ahead.tuned_subjects():
        _, kernel, head_dim, _ = subject.name.split(" ", 3)
        kernels = {}

        def note(self, *_, kernels=kernels, **given):
            kernels[self.fn.__name__] = given

        monkeypatch.setattr(JITFunction, "run", note)
        subject.call()
        launched.setdefault((kernel, head_dim), []).append(kernels)
        config = subject.call.args[-1]
        assert (config.block_m, config.block_n, config.num_warps) in [
            tuple(given.get(name) for name in ("BLOCK_M", "BLOCK_N", "num_warps")) for given in kernels.values()
        ]
    own = {"forward": "_forward_kernel", "dkdv": "_key_kernel", "dq": "_query_kernel", "fused": "_key_kernel"}
    assert set(launched) == {(kernel, head_dim) for kernel in own for head_dim in ("D=64", "D=128")}
    for (kernel, _), calls in launched.items():
        assert 2 <= len(calls) <= compile_ahead.CANDIDATES
        assert all(own[kernel] in names for names in calls)
        assert all(("_query_kernel" in names) == (kernel in ("dkdv", "dq")) for names in calls)


def test_the_self_checks_examples_are_launched_although_they_lie_on_the_cpu(monkeypatch):
    from lumos_kernels.mm_rope import triton

    monkeypatch.setattr(triton, "forward", mock.Mock(side_effect=RuntimeError("launched")))
    subjects = [one for one in compile_ahead.self_check_subjects() if "mm_rope triton D=64" in one.name]
    assert len(subjects) >= 3
    with pytest.raises(RuntimeError, match="launched"):
        subjects[0].call()


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
    commands = []

    def bounded(command, seconds, log):
        commands.append(command)
        table.write_text(written)
        return "timeout"

    monkeypatch.setattr(tuner, "run_bounded", bounded)
    run = Run(tmp_path / "record.json", tmp_path / "out", tmp_path, dry_run=False)
    (tmp_path / "out").mkdir()
    for written, kept in (right + "# tuned\n",) * 2, ("CONFIGS: dict = {", right + "# tuned\n"):
        run.items, run.running = {"tune": {"data": {}}}, {"name": "tune"}
        monkeypatch.setattr(results, "table_digest", lambda: "digest")
        tuner.find(run)
        assert table.read_text() == (tmp_path / "out" / "tuned.py").read_text() == kept
        assert run.data["status"] == "timeout"
        assert ("restored" in run.data) == (written != kept)
    assert commands[0][-6:] == ["--out", str(table), "--candidates", "5", "--head-dims", "64,128"]


def test_every_kind_of_backward_is_checked_at_both_head_sizes(tmp_path, monkeypatch):
    made = []

    def verdict(op, impl, problem):
        made.append((op.name, impl, problem.head_dim))

    def stored(op, impl, problem, kind):
        return self_check.Verdict(kind == "deterministic", "" if kind == "deterministic" else "wrong")

    monkeypatch.setattr(self_check, "verdict", verdict)
    monkeypatch.setattr(self_check, "stored", stored)
    monkeypatch.setattr(machine, "own_implementations", lambda: [("frame_attention", "triton")])
    run = Run(tmp_path / "record.json", tmp_path, tmp_path, dry_run=False)
    run.device, run.items, run.running = "cpu", {"self-check": {"data": {}}}, {"name": "self-check"}
    machine.check(run)
    assert made == [("frame_attention", "triton", 64), ("frame_attention", "triton", 128)]
    assert {name: found["passed"] for name, found in run.data["verdicts"].items()} == {
        f"frame_attention triton bfloat16 {head_dim} {kind}": kind == "deterministic"
        for head_dim in (64, 128)
        for kind in ("deterministic", "fused")
    }


def test_clocks_are_those_of_the_item(tmp_path):
    lines = "1000, 2600, 300.5, 40, 1000\\n1980, 2600, [N/A], 60, 9000\\n"
    query = [sys.executable, "-c", f"import time; print('{lines}', end='', flush=True); time.sleep(30)"]
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
