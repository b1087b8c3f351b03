"""Tests that the examples tell wrong implementations from right ones (lumos_kernels/battery.py)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lumos_kernels
from lumos_kernels import battery, dispatch, examples, library, limits, tensors
from lumos_kernels.frame_attention import native as attention
from lumos_kernels.masked_sample import native as sample
from lumos_kernels.mm_rope import native as rope
from lumos_kernels.tube_masked_loss import native as loss

native = pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal()))
CPU = torch.device("cpu")
PACKAGE = Path(lumos_kernels.__file__).parent


def examine(op: str, dtype: torch.dtype) -> battery.Finding:
    return battery.examine(battery.Subject(dispatch.ops()[op], "native", dtype, 32, "deterministic", CPU))


def forward_wrapped(module, change):
    forward = module.forward
    return module, "forward", lambda *arguments: change(forward(*arguments))


def scaled_last_row(x):
    x[-1:] *= 1.01


def wrong_correct():
    return forward_wrapped(loss, lambda out: out._replace(correct=torch.zeros_like(out.correct)))


def wrong_dhidden():
    def change(out):
        if out.dhidden is not None:
            rows = out.dhidden.abs().amax(1).nonzero()[:, 0]
            out.dhidden[rows[-1:]] *= 1.01
        return out

    return forward_wrapped(loss, change)


def wrong_lse_gradient():
    backward = loss.backward

    def without(inputs, lse, grad, wanted):
        return backward(inputs, lse, grad._replace(lse=torch.zeros_like(grad.lse)), wanted)

    return loss, "backward", without


def wrong_o():
    def change(out):
        scaled_last_row(out.o)
        return out

    return forward_wrapped(attention, change)


def wrong_scale():
    forward = attention.forward
    return attention, "forward", lambda inputs: forward(inputs._replace(scale=inputs.q.shape[2] ** -0.5))


def wrong_eps():
    forward = rope.forward
    return rope, "forward", lambda inputs: forward(inputs._replace(eps=1e-5))


def wrong_dtype():
    return forward_wrapped(sample, lambda out: type(out)(out.classes, out.confidence.double()))


def wrong_strides():
    backward = rope.backward

    def dense(x):
        return torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))

    return rope, "backward", lambda inputs, grad: backward(inputs, type(grad)(grad.q, dense(grad.k)))


def wrong_counter():
    forward = sample.forward

    def low_word(keys):
        return None if keys is None else torch.stack([keys[:, 0], keys[:, 1] & 0xFFFFFFFF], 1)

    return sample, "forward", lambda inputs: forward(inputs._replace(row_keys=low_word(inputs.row_keys)))


def wrong_temperature():
    forward = sample.forward
    return sample, "forward", lambda inputs: forward(inputs._replace(temperature=1.0))


@native
@pytest.mark.parametrize(
    ("op", "wrong", "what"),
    [
        ("tube_masked_loss", wrong_correct, "correct"),
        ("tube_masked_loss", wrong_dhidden, "dhidden"),
        ("tube_masked_loss", wrong_lse_gradient, "dhidden"),
        ("frame_attention", wrong_o, "o"),
        ("frame_attention", wrong_scale, "o"),
        ("mm_rope", wrong_eps, "q"),
        ("masked_sample", wrong_dtype, "instead of torch.float32"),
        ("mm_rope", wrong_strides, "gradient of k every second row"),
        ("masked_sample", wrong_counter, "drawn"),
        ("masked_sample", wrong_temperature, "log confidence"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_implementation_is_found_in_bf16(op, wrong, what, monkeypatch):
    monkeypatch.setattr(*wrong())
    finding = examine(op, torch.bfloat16)
    assert any(what in failure for failure in finding.failures), finding.failures


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["frame_attention", "masked_sample", "mm_rope", "tube_masked_loss"])
def test_a_right_implementation_stays_well_inside_its_bounds(op, dtype):
    finding = examine(op, dtype)
    assert finding.passed
    assert finding.worst is not None
    assert finding.worst.share < 0.8
    assert finding.milliseconds is None


@native
def test_the_matmul_precision_is_left_as_it_was():
    torch.set_float32_matmul_precision("high")
    try:
        assert examine("masked_sample", torch.float32).passed
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_limits_are_lowered_for_a_while_and_never_raised():
    small = torch.empty(2)
    with limits.lowered(limits.Limits(splits=3, int64=True)):
        assert limits.capped(512, limits.current().splits) == 3
        assert limits.capped(2, limits.current().splits) == 2
        assert limits.capped(512, limits.current().partials) == 512
        assert tensors.needs_int64_offsets(small)
    assert limits.current() == limits.USUAL
    assert not tensors.needs_int64_offsets(small)


@pytest.mark.parametrize("op", ["frame_attention", "masked_sample", "mm_rope", "tube_masked_loss"])
def test_there_are_examples_without_work(op):
    found = examples.examples(dispatch.ops()[op], torch.float32, 32, CPU)
    assert any(example.name.startswith(("no tokens", "no rows")) for example in found)


LOSS, SAMPLE, ROPE = "tube_masked_loss/triton.py", "masked_sample/triton.py", "mm_rope/triton/backward.py"
ATTENTION = "frame_attention/triton/primitives.py"
# One wrong line of a Triton kernel, and the example that shows it.
MUTANTS = {
    "sums not carried over chunks": ("mean", LOSS, "beta=0 if first else 1", "beta=0"),
    "targets of the first chunk": (
        "mean",
        LOSS,
        "inputs.targets[part],",
        "inputs.targets[: part.stop - part.start],",
    ),
    "first block alone": ("row losses, long", LOSS, "tl.program_id(1) * BLOCK", "0"),
    "ties": (
        "row losses, long",
        LOSS,
        "correct = not _occurs_before(row_ptr, top, target, classes, BLOCK, VECTOR)",
        "correct = True",
    ),
    "last of ties": ("greedy", SAMPLE, "line_best > best", "line_best >= best"),
    "first block of a split": (
        "two rows",
        ROPE,
        "range(first_block, last_block)",
        "range(first_block, min(first_block + 1, last_block))",
    ),
    "one round of partials": ("two rows", ROPE, "range(0, count, BLOCK_N)", "range(0, min(count, BLOCK_N), BLOCK_N)"),
    "sections": ("two sections", ATTENTION, "first + rest % width", "rest % width"),
    "int64 offsets": ("two sections", ATTENTION, "row = row.to(tl.int64)", "row = row.to(tl.int64) * 0"),
}
COMPARE = """
import sys
import torch
from lumos_kernels import battery, dispatch, examples
op, start = sys.argv[1:]
for example in examples.examples(dispatch.ops()[op], torch.float32, 32, torch.device("cpu")):
    if example.name.startswith(start):
        complaints = [complaint for _, complaint in battery._compare(example, example.run("triton")) if complaint]
        print("wrong" if complaints else "right", complaints)
"""


def outcome(root: Path, op: str, example: str) -> str:
    """Return "right" or "wrong", what the Triton implementation of the package in a folder is on an example."""
    done = subprocess.run(
        [sys.executable, "-c", COMPARE, op, example],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[0]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on machines without a GPU")


@interpreted
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_triton_kernel_is_found(mutant, tmp_path):
    pytest.importorskip("triton")
    example, file, right, wrong = MUTANTS[mutant]
    copy = tmp_path / "lumos_kernels"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    source = (copy / file).read_text()
    assert right in source
    (copy / file).write_text(source.replace(right, wrong))
    assert outcome(tmp_path, file.partition("/")[0], example) == "wrong"


@interpreted
@pytest.mark.parametrize(
    ("op", "example"),
    [
        ("tube_masked_loss", "row losses, long"),
        ("masked_sample", "greedy"),
        ("mm_rope", "two rows"),
        ("frame_attention", "two sections"),
    ],
)
def test_a_right_triton_kernel_passes(op, example):
    pytest.importorskip("triton")
    assert outcome(PACKAGE.parent, op, example) == "right"


def test_every_op_with_gpu_code_has_examples():
    for op in dispatch.ops().values():
        if set(op.implementations) - {"native", "reference"}:
            assert examples.examples(op, torch.float32, 64, torch.device("cpu"))
