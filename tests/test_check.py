"""`python -m lumos_kernels.check` and `python -m lumos_kernels.env`: what they print, and what a broken kernel does."""

import pytest
import torch

from lumos import cli
from lumos_kernels import battery, cache, check, dispatch, env, library, self_check
from lumos_kernels.masked_sample import native as sample_native
from lumos_kernels.masked_sample.contract import Outputs
from lumos_kernels.mm_rope import native as rope_native
from lumos_kernels.mm_rope.contract import Gradients
from lumos_kernels.tube_masked_loss import reference as loss_reference

native = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path))
    self_check.file_name.cache_clear()
    yield
    self_check.file_name.cache_clear()


def rows(output):
    """The table's rows as dictionaries."""
    header, *lines = [line.split() for line in output.splitlines()]
    return [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]


@native
def test_a_right_implementation_passes(capsys, one_thread):
    assert check.main(["--quick", "--op", "mm_rope", "--impl", "native"]) == 0
    output = capsys.readouterr().out
    found = rows(output)
    assert {(row["dtype"], row["head"]) for row in found} == {
        (dtype, head) for dtype in ("bfloat16", "float32") for head in ("64", "128")
    }
    for row in found:
        assert (row["op"], row["impl"], row["device"], row["result"]) == ("mm_rope", "native", "cpu", "ok")
        assert row["perturbation"] == row["gradients"] == row["determinism"] == "ok"
        assert 0 < float(row["ours"]) <= float(row["bound"])
        assert float(row["eager"]) > 0
        assert float(row["ms"]) > 0
    assert output.endswith("4 examined, all right\n")


@native
def test_a_broken_forward_is_reported_by_op_and_implementation(capsys, monkeypatch, one_thread):
    forward = sample_native.forward

    def broken(inputs):
        classes, confidence = forward(inputs)
        return Outputs(classes, confidence * 1.01)

    monkeypatch.setattr(sample_native, "forward", broken)
    assert check.main(["--quick", "--op", "masked_sample", "--op", "mm_rope", "--impl", "native"]) == 1
    output = capsys.readouterr().out
    assert {row["op"]: row["result"] for row in rows(output)} == {"masked_sample": "FAIL", "mm_rope": "ok"}
    assert "FAIL masked_sample native bfloat16: guided, ragged slice: log confidence: " in output


@native
def test_a_broken_gradient_is_reported(capsys, monkeypatch, one_thread):
    backward = rope_native.backward

    def broken(inputs, grad):
        found = backward(inputs, grad)
        return Gradients(found.q, 1.02 * found.k, found.q_norm, found.k_norm)

    monkeypatch.setattr(rope_native, "backward", broken)
    assert check.main(["--quick", "--op", "mm_rope", "--impl", "native"]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL ")]
    assert failures
    assert all(": dk: " in line for line in failures)


def test_an_exception_is_a_failure(capsys, monkeypatch, one_thread):
    def broken(inputs, loss, wanted):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(loss_reference, "forward", broken)
    assert check.main(["--quick", "--op", "tube_masked_loss", "--impl", "reference"]) == 1
    assert (
        "FAIL tube_masked_loss reference float32: RuntimeError: no kernel image is available" in capsys.readouterr().out
    )


def test_nothing_to_run_is_status_2_with_the_reason(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("Triton's kernels run here")
    assert check.main(["--quick", "--op", "mm_rope", "--impl", "triton"]) == 2
    captured = capsys.readouterr()
    assert "not run: mm_rope triton: " in captured.out
    assert "nothing could be examined" in captured.err


def test_on_a_gpu_the_verdicts_are_kept(monkeypatch):
    """The CPU's device stands for a GPU, as far as the command is concerned."""
    monkeypatch.setattr(self_check, "machine", lambda gpu: {"gpu": "Pretend"})
    monkeypatch.setattr(check, "is_gpu", lambda device: True)
    op = dispatch.ops()["mm_rope"]
    subject = battery.Subject(op, "reference", torch.float32, 32, "deterministic", torch.device("cpu"))
    finding = check.run(subject, thorough=False)
    assert finding.passed

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler")

    with monkeypatch.context() as patch:
        patch.setattr(battery, "examine", no_compiler)
        assert check.run(subject._replace(impl="native"), thorough=False).failures == [
            "RuntimeError: Failed to find C compiler"
        ]
    assert list(cache.read(self_check.file_name(None))["verdicts"]) == ["mm_rope reference float32 32 deterministic"]
    monkeypatch.setattr(self_check, "_process", self_check._Process())
    assert self_check.stored(op, "reference", dispatch.Problem("cpu", torch.float32, 32)) == self_check.Verdict(True)


def test_the_plan_examines_every_kind_of_backward():
    op, selection = dispatch.ops()["frame_attention"], check.Selection()
    found = list(selection.subjects(op, "triton"))
    assert {subject.kind for subject in found} == {"deterministic", "fused"}
    assert {subject.head_dim for subject in found} == {32, 64, 96, 128}
    assert {subject.kind for subject in selection.subjects(op, "native")} == {"deterministic"}


def test_the_commands_of_lumos(capsys, monkeypatch, one_thread):
    assert cli.main(["check", "--quick", "--op", "mm_rope", "--impl", "reference"]) == 0
    assert "all right" in capsys.readouterr().out
    monkeypatch.setenv("LUMOS_IMPL", "reference")
    assert cli.main(["env"]) == 0
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}"[:10] in output
    assert "LUMOS_IMPL:    reference" in output
    for name in dispatch.ops():
        assert name in output


def test_env_prints_the_verdicts_of_each_gpu(monkeypatch):
    monkeypatch.setattr(self_check, "machine", lambda gpu: {"gpu": f"Pretend {gpu}"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    self_check.keep(1, {"mm_rope triton": self_check.Verdict(False, "dq is wrong")})
    [line] = env.verdicts()
    assert line.startswith("GPU 1: mm_rope triton: FAILED: dq is wrong (20")
