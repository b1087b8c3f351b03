"""The GPU tests themselves, on the CPU: they pass on what is right, and each kind of fault is caught by its test."""

import functools
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lumos_kernels import RowLimits
from lumos_kernels.frame_attention import reference as attention
from lumos_kernels.masked_sample import reference as sample
from lumos_kernels.mm_rope import reference as rope
from lumos_kernels.tube_masked_loss import reference as loss

FOLDER = Path(__file__).parent / "gpu"
DRY_RUN = json.dumps({"device": "cpu"})


@pytest.fixture
def load(monkeypatch):
    """A test file of tests/gpu as a module, set to the dry run."""
    monkeypatch.setenv("LUMOS_GPU_TESTS", DRY_RUN)
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"dry_run_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def _leak(forward, inputs):
    """Every row sees one key more than it may."""
    limits = inputs.limits
    kv_end = (limits.kv_end + 1).clamp_max(limits.num_keys)
    return forward(inputs._replace(limits=RowLimits(limits.kv_start, kv_end, limits.q_start, limits.q_end)))


def _scaled(forward, inputs):
    return forward(inputs._replace(scale=inputs.scale * (1.0 if inputs.q.dtype == torch.float64 else 1.02)))


def _leak_backward(backward, inputs, *rest, deterministic):
    right = backward(inputs, *rest, deterministic=deterministic)
    dv = right.v
    return right if dv.dtype == torch.float64 else right._replace(v=dv + 0.3 * dv.abs().mean(0, keepdim=True))


def _keyless(forward, inputs):
    o, lse = forward(inputs)
    has_keys = inputs.limits.kv_end > inputs.limits.kv_start
    return torch.where(has_keys[:, None, None], o, inputs.v[0, 0]), lse


def _mixed_tokens(forward, inputs):
    q_out, k_out = forward(inputs)
    return q_out, k_out + 1e-2 * k_out.mean(0, keepdim=True)


def _turned(forward, inputs):
    """Wrong in the first call alone: the ones after it are the yardstick."""
    first = not hasattr(inputs.positions, "met")
    inputs.positions.met = True
    return forward(inputs._replace(positions=inputs.positions + first))


def _unwritten(forward, inputs):
    q_out, k_out = forward(inputs)
    out = torch.empty(q_out.shape, dtype=q_out.dtype)
    out[:-1] = q_out[:-1]
    return out, k_out


def _random(forward, inputs):
    q_out, k_out = forward(inputs)
    return q_out * (1 + 0.1 * torch.rand(())), k_out


def _in_place(forward, inputs):
    outputs = forward(inputs)
    inputs.q.mul_(2)
    return outputs


def _dense_strides(backward, inputs, grad):
    """Reads the gradient as if it were contiguous."""
    strides = torch.empty(grad.q.shape, device="meta").stride()
    needed = sum((size - 1) * stride for size, stride in zip(grad.q.shape, strides, strict=True)) + 1
    room = grad.q.untyped_storage().nbytes() // grad.q.element_size() - grad.q.storage_offset()
    return backward(inputs, grad._replace(q=grad.q.as_strided(grad.q.shape, strides)) if room >= needed else grad)


def _ignored_row(forward, inputs, *rest):
    outputs = forward(inputs, *rest)
    if outputs.dhidden is not None:
        ignored = torch.ones(len(inputs.hidden), dtype=torch.bool).index_fill_(0, inputs.rows, False).nonzero()[0]
        outputs.dhidden[ignored] = 1e-6
    return outputs


def _shifted_loss(forward, inputs, *rest):
    outputs = forward(inputs, *rest)
    return outputs._replace(nll=outputs.nll * (1.0 if inputs.hidden.dtype == torch.float64 else 1.01))


def _next_key(forward, inputs):
    return forward(inputs if inputs.row_keys is None else inputs._replace(row_keys=inputs.row_keys + 1))


def _mixed_rows(forward, inputs):
    cond = inputs.hidden_cond
    return forward(inputs._replace(hidden_cond=cond + cond.mean(0, keepdim=True)))


def _certain(forward, inputs):
    ids, confidence = forward(inputs)
    return ids, confidence.sqrt()


FAULTS = [  # reference module, function, fault, file, test
    (attention, "forward", _leak, "test_values", "test_later_frames_and_other_documents_do_not_matter"),
    (attention, "backward", _leak_backward, "test_values", "test_later_frames_and_other_documents_do_not_matter"),
    (attention, "forward", _scaled, "test_values", "test_attention_is_as_close_to_fp64_as_sdpa"),
    (attention, "backward", _leak_backward, "test_values", "test_the_fused_backward_is_as_close_to_fp64_as_sdpa"),
    (attention, "forward", _keyless, "test_values", "test_rows_without_keys_give_zero"),
    (rope, "forward", _mixed_tokens, "test_values", "test_a_token_is_rotated_by_itself_alone"),
    (rope, "forward", _turned, "test_values", "test_rope_is_as_close_to_fp64_as_eager_code"),
    (rope, "forward", _unwritten, "test_contracts", "test_every_element_is_written"),
    (rope, "forward", _random, "test_contracts", "test_fifty_runs_give_the_same_bits"),
    (rope, "forward", _in_place, "test_contracts", "test_inputs_are_left_alone"),
    (rope, "backward", _dense_strides, "test_contracts", "test_awkward_upstream_gradients"),
    (loss, "forward", _ignored_row, "test_values", "test_ignored_rows_and_other_classes_do_not_matter"),
    (loss, "forward", _shifted_loss, "test_values", "test_loss_is_as_close_to_fp64_as_the_official_way"),
    (sample, "forward", _next_key, "test_values", "test_draws_are_the_keys_and_confidence_their_probability"),
    (sample, "forward", _certain, "test_values", "test_draws_are_the_keys_and_confidence_their_probability"),
    (sample, "forward", _mixed_rows, "test_values", "test_a_row_is_drawn_by_itself_alone"),
]
OP_OF = {attention: "frame_attention", rope: "mm_rope", loss: "tube_masked_loss", sample: "masked_sample"}


def call(module, test, op):
    known = {"op": op, "impl": "reference", "device": "cpu", "dtype": torch.bfloat16, "frame": 1}
    if hasattr(module, "SIZES"):
        known["size"] = module.SIZES[0]
    function = getattr(module, test)
    function(**{name: known[name] for name in inspect.signature(function).parameters})


@pytest.mark.parametrize(
    ("module", "function", "fault", "file", "test"),
    FAULTS,
    ids=[
        f"{OP_OF[module]}{fault.__name__}" + ("-fused" if "fused" in test else "")
        for module, _, fault, _, test in FAULTS
    ],
)
def test_a_fault_is_caught(module, function, fault, file, test, load, monkeypatch):
    tests = load(file)
    call(tests, test, OP_OF[module])
    right = getattr(module, function)
    monkeypatch.setattr(module, function, functools.partial(fault, right))
    with pytest.raises(AssertionError):
        call(tests, test, OP_OF[module])


def _pytest(*arguments, **settings):
    environment = {**os.environ, "LUMOS_GPU_TESTS": json.dumps(settings)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER), *arguments]
    return subprocess.run(command, env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)


@pytest.mark.slow
def test_they_pass_on_the_cpu_implementations():
    run = _pytest(device="cpu")
    assert run.returncode == 0, run.stdout + run.stderr
