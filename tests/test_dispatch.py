"""Which implementation runs, and that the answer is never silent: the reasons, LUMOS_IMPL, the log and the table."""

import logging
import sys
from types import ModuleType

import pytest
import torch

import lumos_kernels
from lumos_kernels import dispatch, errors, self_check, tensors
from lumos_kernels.dispatch import Problem

CPU = Problem("cpu", torch.float32, 64)
SM90 = Problem("cuda", torch.bfloat16, 64, "sm_90")
PUBLIC_OPS = ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample")
OPS = (*PUBLIC_OPS, "frame_layout")  # the last one is behind FrameLayout.from_tokens


@pytest.fixture
def op(monkeypatch):
    """An op of four implementations: two that refuse the CPU, one that takes it, and the reference."""
    monkeypatch.delenv("LUMOS_IMPL", raising=False)
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch.ops()))
    caches = dispatch._choose, dispatch._log_choice
    for cache in caches:
        cache.cache_clear()
    names = ("fast", "wide", "plain", "reference")
    for name in names:
        monkeypatch.setitem(sys.modules, f"pretend_op.{name}", ModuleType(f"pretend_op.{name}"))
    yield dispatch.register(
        "pretend",
        "pretend_op",
        {
            "fast": lambda problem: None if problem.device == "cuda" else f"runs CUDA tensors, not {problem.device}",
            "wide": lambda problem: "head_dim 64 is too small" if problem.head_dim == 64 else None,
            "plain": dispatch.runs_anywhere,
            "reference": dispatch.runs_anywhere,
        },
    )
    for cache in caches:
        cache.cache_clear()


def chosen(op, impl="auto", problem=CPU):
    return op.choose(impl, problem).__name__.removeprefix("pretend_op.")


def test_auto_takes_the_first_implementation_that_runs(op):
    assert chosen(op) == "plain"
    assert chosen(op, problem=Problem("cpu", torch.float32, 128)) == "wide"


def test_an_explicit_choice_is_taken(op):
    assert chosen(op, "plain") == "plain"
    assert chosen(op, "reference") == "reference"


def test_an_explicit_choice_never_falls_back(op):
    with pytest.raises(ValueError, match="pretend: impl='fast' cannot run here: runs CUDA tensors, not cpu"):
        op.choose("fast", CPU)
    with pytest.raises(ValueError, match="pretend: impl='wide' cannot run here: head_dim 64 is too small"):
        op.choose("wide", CPU)


def test_an_unknown_implementation_lists_the_known_ones(op):
    with pytest.raises(ValueError, match=r"impl='slow' cannot run here: .* there are fast, wide, plain, reference"):
        op.choose("slow", CPU)


def test_auto_raises_with_every_reason_when_nothing_runs(op):
    nothing = dispatch.register("pretend", "pretend_op", dict(list(op.implementations.items())[:2]))
    with pytest.raises(ValueError, match="runs CUDA tensors, not cpu; wide: head_dim 64 is too small"):
        nothing.choose("auto", CPU)


def test_an_implementation_that_does_not_import_is_an_error_not_a_fallback(op, monkeypatch):
    monkeypatch.delitem(sys.modules, "pretend_op.plain")
    with pytest.raises(ModuleNotFoundError, match="pretend_op"):
        op.choose("auto", CPU)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "plain"),
        ("auto", "plain"),
        ("reference", "reference"),
        ("pretend=reference", "reference"),
        ("mm_rope=reference", "plain"),
        ("mm_rope=triton,pretend=reference", "reference"),
        ("reference,pretend=plain", "plain"),
        ("pretend=plain,reference", "plain"),
        ("reference,pretend=auto", "plain"),
        (" pretend = reference , ", "reference"),
    ],
)
def test_lumos_impl_sets_what_auto_takes(op, monkeypatch, value, expected):
    monkeypatch.setenv("LUMOS_IMPL", value)
    assert chosen(op) == expected


def test_lumos_impl_is_read_at_each_call(op, monkeypatch):
    assert chosen(op) == "plain"
    monkeypatch.setenv("LUMOS_IMPL", "reference")
    assert chosen(op) == "reference"
    monkeypatch.delenv("LUMOS_IMPL")
    assert chosen(op) == "plain"


def test_lumos_impl_yields_to_an_explicit_choice(op, monkeypatch):
    monkeypatch.setenv("LUMOS_IMPL", "reference")
    assert chosen(op, "plain") == "plain"


def test_lumos_impl_never_falls_back(op, monkeypatch):
    for value in ("fast", "pretend=fast"):
        monkeypatch.setenv("LUMOS_IMPL", value)
        with pytest.raises(ValueError, match="pretend: LUMOS_IMPL=fast cannot run here: runs CUDA tensors, not cpu"):
            op.choose("auto", CPU)


def test_lumos_impl_with_an_op_that_does_not_exist_is_refused(op, monkeypatch):
    monkeypatch.setenv("LUMOS_IMPL", "tube_loss=reference")
    with pytest.raises(ValueError, match=r"LUMOS_IMPL names the op 'tube_loss'; there are .*tube_masked_loss"):
        op.choose("auto", CPU)


def test_auto_logs_once_what_it_chose_and_why_not_the_others(op, caplog):
    caplog.set_level(logging.INFO, "lumos_kernels")
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        op.choose("auto", Problem("cpu", dtype, 64))
    expected = "pretend on cpu uses plain (fast: runs CUDA tensors, not cpu; wide: head_dim 64 is too small)"
    assert [record.getMessage() for record in caplog.records] == [expected]


def test_an_explicit_choice_is_not_logged(op, caplog):
    caplog.set_level(logging.INFO, "lumos_kernels")
    op.choose("plain", CPU)
    assert not caplog.records


def test_a_committed_result_decides_nothing(op, monkeypatch):
    """The self-check decides what runs on a GPU (test_self_check.py). PROVEN decides what the docs may claim."""
    monkeypatch.setattr(self_check, "verdict", lambda *_: self_check.Verdict(False, "wrong"))
    monkeypatch.setattr(dispatch, "PROVEN", {("pretend", "fast"): {"sm_90": "result.json"}})
    assert chosen(op, problem=SM90._replace(head_dim=128)) == "reference"
    assert chosen(op, "fast", SM90) == "fast"


def test_the_reference_and_the_cpu_need_no_self_check(op):
    assert not dispatch.needs_self_check("reference", SM90)
    assert not dispatch.needs_self_check("plain", CPU)
    assert dispatch.needs_self_check("fast", SM90)


def test_backends_prints_every_op_and_implementation(op, capsys):
    lumos_kernels.backends()
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["op", "impl", "device", "status", "reason"]
    table = {tuple(line.split()[:3]): line.split(maxsplit=4)[3:] for line in lines}
    assert table["pretend", "fast", "cpu"] == ["-", "runs CUDA tensors, not cpu"]
    assert table["pretend", "wide", "cpu"] == ["-", "head_dim 64 is too small"]
    assert table["pretend", "plain", "cpu"] == ["auto"]
    assert table["pretend", "reference", "cpu"] == ["ready"]
    for name in OPS:
        assert {impl for op_name, impl, _ in table if op_name == name} == set(dispatch.ops()[name].implementations)


def test_the_table_says_what_auto_runs():
    rows = dispatch.table(torch.float32)
    for name in OPS:
        automatic = [row.impl for row in rows if row.op == name and row.device == "cpu" and row.status == "auto"]
        assert len(automatic) == 1
        module = dispatch.ops()[name].choose("auto", CPU).__name__
        assert module.rsplit(".", 1)[1] == automatic[0]


def test_every_op_is_registered_with_a_reference_that_runs_anywhere():
    assert set(dispatch.ops()) == set(OPS)
    for name in OPS:
        assert list(dispatch.ops()[name].implementations)[-1] == "reference"
        for problem in (CPU, SM90, Problem("mps", torch.float64)):
            assert dispatch.ops()[name].refusal("reference", problem) is None


def test_native_refuses_by_dtype_and_device():
    assert dispatch.runs_native(Problem("cpu", torch.float64)) == "computes bfloat16, float16 and float32, not float64"
    assert dispatch.runs_native(SM90) == "runs CPU tensors, not cuda"


def test_triton_refuses_by_installation_device_and_dtype(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.runs_triton(SM90) == "triton is not installed"
    stand_in = ModuleType("triton")
    stand_in.__spec__ = object()
    monkeypatch.setitem(sys.modules, "triton", stand_in)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert dispatch.runs_triton(SM90) is None
    assert dispatch.runs_triton(CPU) == "runs CUDA tensors, not cpu"
    assert dispatch.runs_triton(Problem("cuda", torch.float64, 64, "sm_90")).endswith("not float64")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.runs_triton(CPU) is None


def test_problem_describes_a_tensor():
    assert Problem.of(torch.empty(0, dtype=torch.float16), 96) == Problem("cpu", torch.float16, 96, None)


def meta(*shape, strides=None):
    tensor = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return tensor if strides is None else tensor.as_strided(shape, strides)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (meta(2**31), False),  # its last element lies at 2^31 - 1
        (meta(2**31 + 1), True),
        (meta(90119, 32, 64), False),
        (meta(2**21, 16, 64), False),
        (meta(2**21 + 1, 16, 64), True),
        (meta(2, 4, strides=(2**31 - 4, 1)), False),
        (meta(2, 4, strides=(2**31 - 3, 1)), True),  # few elements far apart: a slice of a large tensor
        (meta(2**40, 8, strides=(0, 1)), False),  # expanded
        (meta(0, 2**40), False),
        (meta(), False),
    ],
)
def test_int64_offsets_are_asked_for_past_the_last_int32_one(tensor, expected):
    assert tensors.needs_int64_offsets(tensor) is expected
    assert tensors.needs_int64_offsets(meta(4), tensor) is expected


def test_shape_error_names_the_argument_the_known_sizes_and_what_came():
    with pytest.raises(ValueError, match=r"^q must be \[T, H, 3\] with T = 5; got float32 \[4, 2, 3\] on cpu"):
        errors.require_shape("q", torch.zeros(4, 2, 3), "T, H, 3", T=5)
    with pytest.raises(ValueError, match=r"^q must be \[T, H\]"):
        errors.require_shape("q", torch.zeros(4), "T, H")
    errors.require_shape("q", torch.zeros(4, 2, 3), "T, H, 3", T=4)


def test_unit_last_stride_copies_only_where_it_must():
    dense = torch.arange(12.0).view(3, 4)
    assert tensors.unit_last_stride(dense) is dense
    assert tensors.unit_last_stride(dense[:, 1:3]).data_ptr() == dense[:, 1:3].data_ptr()
    for awkward in (dense.T, dense[:, ::2], dense[:, :1].expand(3, 4)):
        copy = tensors.unit_last_stride(awkward)
        assert copy.stride(-1) == 1
        assert torch.equal(copy, awkward)
