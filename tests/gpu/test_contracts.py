"""What every implementation must keep, whatever it computes: all elements written, strides, determinism, CUDA graphs,
torch.compile, no host sync, offsets past 2^31 elements.
"""

import pytest
import torch
from gpu_examples import SMALL, Size, contract_size, dense_sdpa, example
from gpu_settings import device

from lumos_kernels import Text
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    poisoned_allocations,
)

SIZE = contract_size(device())
ON_GPU = device() == "cuda"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="only a CUDA device has it")
WITH_GRADIENTS = ("mm_rope", "frame_attention", "tube_masked_loss")


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(x, y, f"result {number}")


def test_every_element_is_written(op, impl, device):
    one = example(op, SIZE, device)
    expected = one.with_gradients(impl)
    with poisoned_allocations():
        actual = one.with_gradients(impl)
    assert not any(bool(x.isnan().any()) for x in actual if x.is_floating_point())
    assert_same(actual, expected)


@pytest.mark.ops(*WITH_GRADIENTS)
def test_awkward_upstream_gradients(op, impl, device):
    one = example(op, SIZE, device)
    if not one.upstream[0].shape:  # a mean: its upstream gradient is one number
        one = one.replace(reduction="none", upstream=[torch.randn(one.args["labels"].shape, device=device)])
    kinds = [awkward_gradients(g.shape, g.dtype, seed, device) for seed, g in enumerate(one.upstream)]
    for named in zip(*kinds, strict=True):
        awkward = [gradient for _, gradient in named]
        dense = [gradient.contiguous() for gradient in awkward]
        results = [one.replace(upstream=grads).with_gradients(impl) for grads in (awkward, dense)]
        for number, (x, y) in enumerate(zip(*results, strict=True)):
            assert_bitwise_equal(x, y, f"{named[0][0]}: result {number}")
        assert any(bool(x.any()) for x in results[1][len(one.upstream) :])


def test_inputs_are_left_alone(op, impl, device):
    one = example(op, SIZE, device)
    tensors = {name: value for name, value in one.args.items() if isinstance(value, torch.Tensor)}
    copies = {name: value.clone() for name, value in tensors.items()}
    upstream = [gradient.clone() for gradient in one.upstream]
    one.with_gradients(impl)
    for name, value in tensors.items():
        assert_bitwise_equal(value, copies[name], name)
    assert_same(one.upstream, upstream)


def test_fifty_runs_give_the_same_bits(op, impl, device):
    one = example(op, SIZE, device)
    expected = one.with_gradients(impl)
    for _ in range(50 if ON_GPU else 5):
        assert_same(one.with_gradients(impl), expected)


@needs_gpu
def test_no_host_sync(op, impl, device):
    """With rows= given, nothing in forward or backward makes the host wait: not even a copy of a number."""
    one = example(op, SIZE, device)
    one.with_gradients(impl)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        one.with_gradients(impl)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_cuda_graph_replays_on_changed_inputs(op, impl, device):
    one, two = (example(op, SIZE, device, seed=seed) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            one.with_gradients(impl)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = one.with_gradients(impl)
    # Same structure, other numbers: what a training loop changes between replays.
    expected_args = {}
    for name, value in two.args.items():
        for mine, other in zip(_tensors(one.args[name]), _tensors(value), strict=True):
            if mine.is_floating_point() or name == "row_keys":
                mine.copy_(other)
        expected_args[name] = one.args[name]
    for mine, other in zip(one.upstream, two.upstream, strict=True):
        mine.copy_(other)
    for result in captured:
        result.fill_(torch.nan if result.is_floating_point() else 1)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(captured, one.replace(**expected_args).with_gradients(impl))


def _tensors(value):
    return [x for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, torch.Tensor)]


@pytest.mark.ops(*WITH_GRADIENTS)
def test_compiles_whole_forward_and_backward(op, impl, device):
    torch._dynamo.reset()
    backend = "inductor" if ON_GPU else "aot_eager"
    compiled = torch.compile(example(op, SIZE, device).call_op, fullgraph=True, backend=backend)
    for seed in (0, 1):
        one = example(op, SIZE, device, seed=seed)
        if op == "tube_masked_loss":  # one graph for any labels: rows= would make their number a shape
            one = one.replace(
                rows=None, reduction="none", upstream=[torch.randn(one.args["labels"].shape, device=device)]
            )
        expected = one.with_gradients(impl)
        actual = type(one)(**{**vars(one), "call_op": compiled}).with_gradients(impl)
        for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
            if x.is_floating_point():
                assert_close_to_reference(x, y, y.double(), f"result {number}")


# Offsets past 2^31 elements: needs some 50 GB, so on a GPU alone. Marked large so that a run can do them by themselves.


def _rows_past_int32(channels, documents_of=2048):
    return -(-(2**31) // channels // documents_of) * documents_of + documents_of


@needs_gpu
@pytest.mark.large
@pytest.mark.ops("mm_rope")
def test_rope_past_int32_offsets(op, impl, device):
    heads, width = 32, 64
    tokens, last = _rows_past_int32(heads * width), 512
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(tokens, heads, width, generator=generator, device=device, dtype=torch.bfloat16)
    small = example(op, Size("int64", [[Text(tokens)]], heads, 1, width, 64, 512, (192, 512)), device)
    grads = torch.randn_like(q), small.upstream[1]
    one = small.replace(q=q, upstream=grads)
    assert q.numel() > 2**31
    end = slice(tokens - last, None)
    args = {name: one.args[name][end] for name in ("q", "k")}
    part = one.replace(**args, positions=one.args["positions"][:, end], upstream=[g[end] for g in grads])
    actual, expected = one.with_gradients(impl)[:4], part.with_gradients(impl)[:4]
    assert_same([x[end] for x in actual], expected)


@needs_gpu
@pytest.mark.large
@pytest.mark.ops("frame_attention")
def test_attention_past_int32_offsets(op, impl, device):
    heads, width, length = 32, 64, 2048
    tokens = _rows_past_int32(heads * width, length)
    documents = [[Text(length)]] * (tokens // length)
    one = example(op, Size("int64", documents, heads, heads, width, 64, 512, (192, 512)), device)
    assert one.args["q"].numel() > 2**31
    end = slice(tokens - length, None)
    limits = Size("end", [[Text(length)]], heads, heads, width, 64, 512, (192, 512)).layout.limits.to(device)
    parts = {name: one.args[name][end] for name in ("q", "k", "v")}
    part = one.replace(**parts, limits=limits, upstream=[one.upstream[0][end]])
    o, lse, dq, dk, dv = one.with_gradients(impl)
    ours = o[end], lse[:, end], dq[end], dk[end], dv[end]
    del o, lse, dq, dk, dv
    leaves = [part.args[name].clone().requires_grad_() for name in ("q", "k", "v")]
    sdpa = dense_sdpa(*leaves, limits)
    low = [sdpa.detach(), part.call("reference")[1], *torch.autograd.grad(sdpa, leaves, part.upstream)]
    exact = part.to(torch.float64).with_gradients("reference")
    for name, x, y, z in zip(("o", "lse", "dq", "dk", "dv"), ours, low, exact, strict=True):
        assert_close_to_reference(x, y, z, name)


@needs_gpu
@pytest.mark.large
@pytest.mark.ops("tube_masked_loss")
def test_loss_past_int32_offsets(op, impl, device):
    width = 2048
    tokens, last = _rows_past_int32(width), 300
    labels = torch.full((tokens,), -100, device=device)
    labels[-last:] = torch.randint(192, 512, (last,), device=device)
    labels[:last] = torch.randint(192, 512, (last,), device=device)
    rows = (labels != -100).nonzero()[:, 0].to(torch.int32)
    hidden = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    assert hidden.numel() > 2**31
    one = example(op, Size("int64", [[Text(1)]], 1, 1, 32, width, 512, (192, 512)), device)
    one = one.replace(hidden=hidden, labels=labels, rows=rows)
    few = torch.cat([torch.arange(last), torch.arange(tokens - last, tokens)]).to(device)
    part = one.replace(hidden=hidden[few], labels=labels[few], rows=torch.arange(2 * last, device=device).int())
    loss, nll, lse, correct, dhidden, dweight = one.with_gradients(impl)
    assert not dhidden[last:-last].any()
    expected = part.with_gradients(impl)
    assert_same((nll[few], lse[few], correct[few], dhidden[few], dweight), expected[1:])
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)  # a sum over more rows, in another order


@needs_gpu
@pytest.mark.large
@pytest.mark.ops("masked_sample")
def test_sample_past_int32_offsets(op, impl, device):
    width, classes = 2048, (192, 512)
    rows, last = _rows_past_int32(width), 500
    one = example(op, Size("int64", SMALL.documents, 1, 1, 32, width, 512, classes), device)
    hidden = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    assert hidden.numel() > 2**31
    keys = torch.stack([torch.full((rows,), 7), torch.arange(rows)], 1).to(device)
    one = one.replace(hidden_cond=hidden, hidden_uncond=None, guidance_scale=None, row_keys=keys)
    part = one.replace(hidden_cond=hidden[-last:], row_keys=keys[-last:])
    assert_same([x[-last:] for x in one.call(impl)], part.call(impl))
