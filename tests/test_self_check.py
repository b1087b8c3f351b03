"""The self-check behind "auto" on a GPU, here on a CPU that pretends to be one: verdicts, their store, no verdicts."""

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pretend_gpu
import pytest
import torch
from pretend_gpu import ON_GPU, TITLE, WORDS

from lumos_kernels import battery, cache, dispatch, self_check


class Pretend:
    """The op under test, and what happened to it."""

    def __init__(self, op, monkeypatch):
        self.op, self.monkeypatch, self.checks = op, monkeypatch, 0
        examine = battery.examine

        def counted(subject, **options):
            self.checks += 1
            return examine(subject, **options)

        monkeypatch.setattr(battery, "examine", counted)

    def fast(self, forward):
        self.monkeypatch.setattr(sys.modules["pretend_op.fast"], "forward", forward)

    def choose(self, impl="auto"):
        return self.op.choose(impl, ON_GPU).__name__.removeprefix("pretend_op.")

    def forget(self):
        """Forgets what a process remembers: the next choice is that of a new process."""
        self.monkeypatch.setattr(self_check, "_process", self_check._Process())
        self_check.file_name.cache_clear()
        dispatch._choose.cache_clear()

    def kept(self):
        """The verdicts on disk."""
        return cache.read(self_check.file_name(0)).get("verdicts", {})


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("LUMOS_IMPL", "LUMOS_SELF_CHECK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch.ops()))
    for name, module in pretend_gpu.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(self_check, "machine", lambda gpu: pretend_gpu.MACHINE)
    monkeypatch.setattr(self_check, "device_of", lambda problem: torch.device("cpu"))
    pretend = Pretend(pretend_gpu.register(), monkeypatch)
    pretend.forget()
    yield pretend
    pretend.forget()


def test_auto_takes_an_implementation_that_passes(pretend):
    assert pretend.choose() == "fast"
    assert pretend.kept()[TITLE]["passed"] is True
    assert pretend.checks == 1


def test_a_verdict_serves_the_process_and_later_ones(pretend):
    for _ in range(3):
        assert pretend.choose() == "fast"
        dispatch._choose.cache_clear()
    pretend.forget()
    assert pretend.choose() == "fast"
    assert pretend.checks == 1


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


def leaking(x):
    """Every row gets a part of the last one, too little for the tolerance of its own value."""
    return x * x + (x[-1:] * 1e-9)


runs = 0


def restless(x):
    """The last rows differ from run to run in their last bit."""
    global runs
    runs += 1
    y = x * x
    noise = (runs % 2 * 1.2e-7) * y.detach()
    noise[:8] = 0
    return y + noise


@pytest.mark.parametrize(
    ("forward", "error"),
    [
        (lambda x: x * x + 1e-3, "some: y: 48 of 48 elements out of tolerance, the worst by 0.001 where"),
        (lambda x: torch.where(torch.arange(16)[:, None] == 9, torch.nan, x * x), "some: y: 3 of 48 elements out of"),
        (WrongGradient.apply, "some: dx: 48 of 48 elements out of tolerance"),
        (leaking, "some: later rows: y: "),
        (restless, "some: second run: y: "),
    ],
    ids=["value", "NaN", "gradient", "leak", "nondeterministic"],
)
def test_a_wrong_implementation_is_named_once_with_its_error(pretend, caplog, forward, error):
    pretend.fast(forward)
    for _ in range(2):
        assert pretend.choose() == "reference"
        dispatch._choose.cache_clear()
    announced, warning = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert announced.startswith(f"{WORDS} is compared with its reference, once on this machine")
    assert warning.startswith(f"{WORDS} failed its self-check: {error}")
    assert warning.endswith("`python -m lumos_kernels.check --op pretend --impl fast --dtype float32` shows more")
    assert error in pretend.kept()[TITLE]["error"]
    pretend.forget()
    assert pretend.choose() == "reference"
    assert pretend.checks == 1
    assert pretend.choose("fast") == "fast"


def test_an_error_of_the_implementation_counts_for_the_process_alone(pretend, caplog):
    def no_compiler(x):
        raise RuntimeError("Failed to find C compiler")

    pretend.fast(no_compiler)
    for _ in range(2):
        assert pretend.choose() == "reference"
        dispatch._choose.cache_clear()
    assert pretend.checks == 1
    assert "RuntimeError: Failed to find C compiler" in caplog.text
    assert pretend.kept() == {}
    pretend.forget()
    pretend.fast(pretend_gpu.square)
    assert pretend.choose() == "fast"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=str,
)
def test_out_of_memory_is_no_verdict(pretend, monkeypatch, error):
    def exhausted(x):
        raise error

    clock = [0.0]
    monkeypatch.setattr(self_check, "monotonic", lambda: clock[0])
    pretend.fast(exhausted)
    for now, checks in ((0.0, 1), (59.0, 1), (61.0, 2), (180.0, 2), (182.0, 3)):
        clock[0] = now
        assert pretend.choose() == "reference"
        assert pretend.checks == checks
    assert pretend.kept() == {}
    pretend.fast(pretend_gpu.square)
    clock[0] = 1000.0
    assert pretend.choose() == "fast"


def test_an_interruption_is_no_verdict(pretend, monkeypatch):
    def interrupted(self, timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretend.choose()
    assert pretend.kept() == {}
    assert pretend.choose() == "fast"


def test_a_lost_device_is_an_error_now_and_a_verdict_later(pretend, monkeypatch):
    def illegal(x):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    pretend.fast(illegal)
    monkeypatch.setattr(self_check, "device_is_lost", lambda device: True)
    with pytest.raises(RuntimeError, match=r"a CUDA error stopped .*illegal memory access"):
        pretend.choose()
    pretend.forget()
    assert pretend.choose() == "reference"
    assert pretend.checks == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe garbage",
        b"[1, 2]",
        b'{"verdicts": 7}',
        json.dumps({"verdicts": {TITLE: "passed"}}).encode(),
        json.dumps({"verdicts": {TITLE: {"passed": "yes"}}}).encode(),
        json.dumps({"verdicts": {TITLE: {"passed": True}}})[:-5].encode(),
    ],
)
def test_a_broken_store_is_made_again(pretend, content):
    file = cache.folder() / self_check.file_name(0)
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    assert pretend.choose() == "fast"
    assert pretend.checks == 1
    assert pretend.kept()[TITLE]["passed"] is True


def test_a_folder_that_cannot_be_written_costs_a_check_in_each_process(pretend, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert pretend.choose() == "fast"
    assert pretend.choose() == "fast"
    assert pretend.checks == 1
    assert "cannot be written" in caplog.text
    pretend.forget()
    assert pretend.choose() == "fast"
    assert pretend.checks == 2


def test_processes_that_start_together_check_once(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "LUMOS_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for name in ("LUMOS_IMPL", "LUMOS_SELF_CHECK"):
        environment.pop(name, None)
    command = [sys.executable, pretend_gpu.__file__]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = sorted(process.communicate()[0].split() for process in processes)
    assert outputs == [["fast", "0"], ["fast", "1"]]


def test_another_machine_or_version_has_verdicts_of_its_own(pretend, monkeypatch):
    assert pretend.choose() == "fast"
    names = {self_check.file_name(0)}
    for changed in ("gpu", "driver", "torch", "code"):
        facts = {**pretend_gpu.MACHINE, changed: "other"}
        monkeypatch.setattr(self_check, "machine", lambda gpu, facts=facts: facts)
        pretend.forget()
        names.add(self_check.file_name(0))
        assert pretend.choose() == "fast"
    assert len(names) == 5
    assert pretend.checks == 5


def test_the_users_settings_neither_matter_nor_change(pretend):
    def state():
        return (
            torch.get_rng_state().tolist(),
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.allow_tf32,
            torch.are_deterministic_algorithms_enabled(),
        )

    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            before = state()
            assert pretend.choose() == "fast"
            assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert pretend.checks == 1


def test_where_nothing_can_be_run_the_stored_verdict_counts(pretend, monkeypatch):
    monkeypatch.setattr(self_check, "_is_recorded", lambda problem: True)
    with pytest.raises(
        self_check.NoVerdictError, match=r"`python -m lumos_kernels.check --op pretend --impl fast --dtype float32`"
    ):
        pretend.choose()
    monkeypatch.setattr(self_check, "_is_recorded", lambda problem: False)
    assert pretend.choose() == "fast"
    pretend.forget()
    monkeypatch.setattr(self_check, "_is_recorded", lambda problem: True)
    assert pretend.choose() == "fast"
    assert pretend.checks == 1


def test_a_backward_pass_does_not_wait_for_itself(pretend):
    """On a GPU the thread of a backward pass would have to serve the check that it waits for."""
    chosen = []

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            chosen.append(pretend.choose())
            return grad

    InBackward.apply(torch.ones(1, requires_grad=True)).backward()
    assert chosen == ["reference"]
    assert pretend.checks == 0
    assert pretend.choose() == "fast"


def test_self_check_0_trusts(pretend, monkeypatch):
    pretend.fast(lambda x: x)
    monkeypatch.setenv("LUMOS_SELF_CHECK", "0")
    assert pretend.choose() == "fast"
    assert pretend.checks == 0
    monkeypatch.delenv("LUMOS_SELF_CHECK")
    assert pretend.choose() == "reference"
    monkeypatch.setenv("LUMOS_SELF_CHECK", "off")
    with pytest.raises(ValueError, match=r"LUMOS_SELF_CHECK must be 0 .* or 1; got 'off'"):
        pretend.choose()


def test_the_table_tells_the_verdict(pretend):
    def row():
        problem_row = [dispatch._standing(pretend.op, impl, ON_GPU) for impl in ("fast", "reference")]
        assert problem_row[1] == ("auto", "")
        return problem_row[0]

    assert row() == ("auto", "checked against the reference at first use")
    pretend.choose()
    assert row() == ("auto", "passed its self-check")
    pretend.forget()
    (cache.folder() / self_check.file_name(0)).unlink()
    pretend.fast(lambda x: x)
    pretend.choose()
    status, reason = row()
    assert status == "ready"
    assert reason.startswith("failed its self-check: some: y: ")


def test_every_kind_of_backward_gets_a_verdict_later_too(pretend, monkeypatch):
    """The check of the second kind runs out of memory first. The verdict on the first one does not hide that."""
    monkeypatch.setattr(
        sys.modules["pretend_op.examples"], "KINDS", {"fast": ("deterministic", "fused")}, raising=False
    )
    examine, exhausted = battery.examine, True

    def short_of_memory(subject, **options):
        if subject.kind == "fused" and exhausted:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return examine(subject, **options)

    monkeypatch.setattr(battery, "examine", short_of_memory)
    assert pretend.choose() == "fast"
    assert not self_check.allows(pretend.op, "fast", ON_GPU, "fused")
    pretend.forget()
    exhausted = False
    assert pretend.choose() == "fast"
    assert self_check.allows(pretend.op, "fast", ON_GPU, "fused")


def test_an_error_that_the_caller_had_queued_is_the_callers(pretend, monkeypatch):
    """The check waits for the caller's work, outside of the lock, and passes its error on as it is."""

    def synchronize():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda gpu: SimpleNamespace(synchronize=synchronize))
    with pytest.raises(RuntimeError, match=r"^CUDA error: device-side assert triggered$"):
        pretend.choose()
    assert pretend.checks == 0
    assert pretend.kept() == {}


def test_auto_never_takes_what_runs_on_request_alone(pretend, monkeypatch):
    op = dispatch.register("pretend", "pretend_op", pretend.op.implementations, {"fast": "it drops a gradient"})
    assert op.choose("auto", ON_GPU).__name__ == "pretend_op.reference"
    assert op.choose("fast", ON_GPU).__name__ == "pretend_op.fast"
    assert dispatch._standing(op, "fast", ON_GPU) == ("ready", "it drops a gradient")
    assert pretend.checks == 0
