"""Nothing in a training step or a sampling step makes the host wait for its GPU, as far as that shows without one.

host_syncs.py says how. That of the attention kernels is tested with their use of memory (triton_kernels).
"""

import os
from unittest import mock

import pytest
import torch
from host_syncs import HostSync, NoHostSync, pretended_gpu

from lumos_kernels import FrameLayout
from lumos_kernels.frame_layout import reference as layout_reference
from lumos_kernels.frame_layout.contract import Inputs
from lumos_kernels.masked_sample import contract as sample_contract
from lumos_kernels.mm_rope import contract as rope_contract
from lumos_kernels.tube_masked_loss import contract as loss_contract
from lumos_kernels.tube_masked_loss import ops as loss_ops

needs_triton = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels do not launch")

X = torch.arange(6.0)
MASK = X > 2
WAITING = {
    "item": lambda x, mask: x[0].item(),
    "int": lambda x, mask: int(x.sum()),
    "if": lambda x, mask: 1 if mask.any() else 0,
    "nonzero": lambda x, mask: x.nonzero(),
    "where of one argument": lambda x, mask: torch.where(mask),
    "masked_select": lambda x, mask: x.masked_select(mask),
    "boolean index": lambda x, mask: x[mask],
    "boolean index put": lambda x, mask: x.clone().index_put_((mask,), x[:3]),
    "unique": lambda x, mask: x.unique(),
    "unique_consecutive": lambda x, mask: x.unique_consecutive(),
    "repeat_interleave": lambda x, mask: x.repeat_interleave(mask.long()),
    "equal": lambda x, mask: torch.equal(x, x),
    "bincount": lambda x, mask: x.long().bincount(),
}
NOT_WAITING = {
    "masked_fill by index": lambda x, mask: x.clone().index_put_((mask,), torch.zeros(())),
    "repeat_interleave with its size": lambda x, mask: x.repeat_interleave(mask.long(), output_size=3),
    "index": lambda x, mask: x[mask.long()],
    "cast": lambda x, mask: x.to(torch.float64),
    "copy": lambda x, mask: x.clone().copy_(mask),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_detector_sees(name):
    with NoHostSync(), pytest.raises(HostSync):
        WAITING[name](X, MASK)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_the_detector_lets_pass(name):
    with NoHostSync():
        NOT_WAITING[name](X, MASK)


@needs_triton
def test_the_detector_sees_copies_between_host_and_device_and_reading_through_python():
    pytest.importorskip("triton")
    with pretended_gpu():
        there, here = torch.zeros(3, device="meta"), torch.zeros(3)
        here.to("meta", non_blocking=True)
        for copy in (there.cpu, lambda: here.to("meta"), lambda: here.copy_(there), lambda: there.copy_(here)):
            with pytest.raises(HostSync, match="a blocking copy"):
                copy()
        for read in (there.tolist, there.numpy, lambda: torch.tensor([1.0], device="meta").item()):
            with pytest.raises((HostSync, NotImplementedError, TypeError)):
                read()


# The layout and the model's step


def test_reading_a_layout():
    rows = torch.tensor([[5, 8197, 8805, 8805, *[9003] * 4, 8803, 8196], [0] * 10])
    with NoHostSync():
        layout_reference.forward(Inputs(rows.flatten(), torch.tensor([0, 10, 20], dtype=torch.int32)))
        FrameLayout.from_tokens(rows)
        with pytest.raises(HostSync):
            _ = FrameLayout.from_tokens(rows).num_frames


def test_training_step(monkeypatch):
    """Of real tensors on the CPU, with the ops' own host code left to their tests."""
    from test_model import small_model, training_batch, video

    from lumos.masking import MaskedBatch
    from lumos.train import MicroBatch, make_optimizer, training_step

    model = small_model()
    model.impl = "reference"
    monkeypatch.setattr("lumos.model.frame_attention", lambda q, k, v, *_, **__: q)
    documents = [video(), video()]
    masked: MaskedBatch = training_batch(documents)
    layout = FrameLayout.from_tokens(torch.stack(documents))
    # Read on the CPU, where batches are made, before they move to the device.
    monkeypatch.setattr(FrameLayout, "num_frames", 3)
    optimizer = make_optimizer(model, 1e-3, 0.1)
    with NoHostSync():
        for _ in range(2):
            stats = training_step(model, optimizer, [MicroBatch(masked, layout)] * 2, 4.0)
        with pytest.raises(HostSync):
            float(stats.loss)


# The ops


def loss_arguments(tokens, width, classes, dtype=torch.bfloat16, weight_dtype=None, rows=True):
    hidden = torch.empty(tokens, width, dtype=dtype, device="meta")
    weight = torch.empty(classes + 8, width, dtype=weight_dtype or dtype, device="meta")
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    rows = torch.empty(tokens - tokens // 4, dtype=torch.int32, device="meta") if rows else None
    return hidden, weight, labels, rows, torch.empty(tokens, device="meta")


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("need", [(True, True), (False, False)], ids=str)
def test_tube_masked_loss_of_known_rows(dtype, need):
    """... on Triton, in three chunks; its matmuls are called as CUDA's library demands."""
    kernels = pytest.importorskip("lumos_kernels.tube_masked_loss.triton")
    hidden, weight, labels, rows, per_token = loss_arguments(400, 64, 640, dtype)
    with pretended_gpu() as record, mock.patch.object(kernels, "CHUNK_BYTES", 128 * 704 * dtype.itemsize):
        nll, lse, correct, dhidden, dweight = loss_ops._forward(
            hidden, weight, labels, rows, per_token, 0.1, 8, 648, *need, False, "triton"
        )
        assert record.launches == ["_loss_kernel"] * 3
        gradients = loss_ops._backward(
            per_token, per_token, hidden, weight, labels, rows, lse, 8, 648, *need, False, "triton"
        )
        assert record.launches[3:] == (["_gradient_kernel"] * 3 if any(need) else [])
    assert (nll.shape, lse.shape, correct.dtype) == ((400,), (400,), torch.bool)
    for dx, dw in ((dhidden, dweight), gradients):
        assert (dx.dtype, dw.dtype) == (dtype, torch.float32)
        assert dx.shape == ((400, 64) if need[0] else (0,))
        assert dw.shape == ((640, 64) if need[1] else (0,))


@needs_triton
def test_tube_masked_loss_reads_the_number_of_unknown_rows():
    pytest.importorskip("triton")
    hidden, weight, labels, _, per_token = loss_arguments(400, 64, 640)
    with pretended_gpu(), pytest.raises(HostSync, match="nonzero"):
        loss_ops._forward(hidden, weight, labels, None, per_token, 0.1, 8, 648, True, True, True, "triton")


@needs_triton
@pytest.mark.parametrize("width", [2048, 3072])
def test_tube_masked_loss_holds_one_chunk_beyond_its_results(width):
    """28,224 target rows, all of 7 frames of 384p: one chunk of logits and of rows, besides what it returns."""
    kernels = pytest.importorskip("lumos_kernels.tube_masked_loss.triton")
    hidden = torch.empty(28924, width, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(64000, width, dtype=torch.bfloat16, device="meta")
    rows = torch.empty(28224, dtype=torch.int64, device="meta")
    targets = torch.empty_like(rows)
    with pretended_gpu() as record:
        results = [torch.empty(weight.shape, device="meta")]
        inputs = loss_contract.Inputs(hidden, weight, targets, rows)
        results += kernels.forward(inputs, loss_contract.RowLoss(None, 0.0), loss_contract.Wanted(True, *results))
        kept = sum(x.untyped_storage().nbytes() for x in results)
        assert record.bytes == kept
        assert record.peak - kept <= 4096 * (64000 + width) * 2 + 4 * len(rows)  # 0.54 GB at 2,048; some indices
        del results
        assert record.bytes == 0


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_masked_sample_of_known_keys(dtype, guided, greedy):
    kernels = pytest.importorskip("lumos_kernels.masked_sample.triton")
    hidden = torch.empty(4032, 2048, dtype=dtype, device="meta")
    weight = torch.empty(64000, 2048, dtype=dtype, device="meta")
    keys = None if greedy else torch.empty(4032, 2, dtype=torch.int64, device="meta")
    with pretended_gpu() as record:
        inputs = sample_contract.Inputs(hidden, hidden if guided else None, weight, keys, 16.0, 1.0)
        ids, confidence = kernels.forward(inputs)
    assert record.launches == ["_sample_kernel"] * (4 if guided else 2)
    assert (ids.dtype, confidence.dtype) == (torch.int64, torch.float32)
    assert record.peak < 0.6e9


@needs_triton
@pytest.mark.parametrize("backward", [False, True])
def test_mm_rope(backward):
    kernels = pytest.importorskip("lumos_kernels.mm_rope.triton")
    q, k = (torch.empty(1000, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    positions = torch.empty(3, 1000, dtype=torch.int32, device="meta")
    norm = rope_contract.Norm(torch.empty(1, 64, device="meta"), torch.empty(1, 64, device="meta"))
    inputs = rope_contract.Inputs(q, k, positions, norm, norm, torch.empty(32, device="meta"), 1e-5)
    with pretended_gpu() as record:
        if backward:
            kernels.backward(inputs, rope_contract.Rotated(q, k))
        else:
            kernels.forward(inputs)
    assert record.launches == (["_backward_kernel", "_sum_partials_kernel"] if backward else ["_forward_kernel"])
