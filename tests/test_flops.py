"""torch's FlopCounterMode counts the ops: what LumosConfig.training_flops says, and the scores computed again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lumos import Lumos, LumosConfig
from lumos_kernels import Frame, FrameLayout, RowLimits, Text, frame_attention, masked_sample, tube_masked_loss

CONFIG = {
    "vocab_size": 65536 + 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def layout() -> FrameLayout:
    return FrameLayout.from_segments([[Text(5), Frame(4, 4), Frame(4, 4)], [Text(3), Frame(4, 8)]])


def test_a_training_step_counts_what_the_config_says(layout):
    config = LumosConfig.from_dict(CONFIG)
    model = Lumos(config, impl="reference")
    labels = torch.full((layout.num_tokens,), -100)
    labels[7:20] = 65536 + torch.arange(13)
    ids = torch.zeros(layout.num_tokens, dtype=torch.int64)
    pairs = layout.limits.visible_pairs()

    def step() -> None:
        model(ids, labels, layout).loss.backward()

    again = 2 * pairs * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert counted(step) == config.training_flops(layout, 13) + again
    assert counted(lambda: model(ids, layout=layout)) == config.forward_flops(layout.num_tokens, pairs, 0)


def test_attention_counts_visible_pairs_alone():
    q = torch.randn(6, 4, 32, requires_grad=True)
    k = torch.randn(9, 2, 32)
    limits = RowLimits.from_kv(torch.tensor([0, 0, 2, 2, 5, 9]), torch.tensor([1, 3, 3, 4, 9, 9]), 9)
    pairs = 1 + 3 + 1 + 2 + 4
    assert counted(lambda: frame_attention(q, k, k, limits)) == 4 * pairs * 4 * 32
    out = frame_attention(q, k, k, limits).sum()
    assert counted(out.backward) == 10 * pairs * 4 * 32


def test_the_loss_counts_targets_classes_and_the_gradients_that_are_made():
    hidden, weight = torch.randn(10, 16, requires_grad=True), torch.randn(50, 16)
    labels = torch.tensor([-100, 20, 21, 5, -100, 39, 10, 49, -100, -100])
    product = 2 * 4 * 16 * 30
    options = {"classes": (10, 40)}
    assert counted(lambda: tube_masked_loss(hidden.detach(), weight, labels, **options)) == product
    assert counted(lambda: tube_masked_loss(hidden, weight, labels, **options).backward()) == 2 * product
    rows = torch.tensor([1, 2, 5, 6])
    both = weight.clone().requires_grad_()
    assert counted(lambda: tube_masked_loss(hidden, both, labels, rows=rows, **options).backward()) == 3 * product

    def each() -> None:
        tube_masked_loss(hidden, both, labels, reduction="none", **options).sum().backward()

    assert counted(each) == product + 3 * product  # backward makes the logits again


def test_sampling_counts_both_branches():
    cond, uncond, weight = torch.randn(7, 16), torch.randn(7, 16), torch.randn(50, 16)
    call = {"classes": (10, 50), "greedy": True}
    assert counted(lambda: masked_sample(cond, None, weight, **call)) == 2 * 7 * 16 * 40
    assert counted(lambda: masked_sample(cond, uncond, weight, guidance_scale=3.0, **call)) == 4 * 7 * 16 * 40


def test_without_values_all_pairs_and_rows_count():
    with torch.device("meta"):
        q, labels = torch.empty(6, 4, 32), torch.empty(6, dtype=torch.int64)
        start, end = torch.empty(2, 6, dtype=torch.int32)
    op = torch.ops.lumos_kernels.frame_attention.default
    assert counted(lambda: op(q, q, q, start, end, start, end, 1.0, "auto")) == 4 * 36 * 4 * 32
    hidden, loss = q[:, :, 0], torch.ops.lumos_kernels.tube_masked_loss.default
    options = None, None, 0.0, 10, 40, False, False, False, "auto"
    assert counted(lambda: loss(hidden, hidden, labels, *options)) == 2 * 6 * 4 * 30


@pytest.mark.parametrize("first", ["import lumos_kernels", "from torch.utils import flop_counter"])
def test_either_may_be_imported_first(first):
    script = f"""
{first}
import sys
assert ("triton" in sys.modules) <= ("flop_counter" in globals())
import lumos_kernels
finders = [finder for finder in sys.meta_path if type(finder).__module__.startswith("lumos_kernels")]
assert bool(finders) == ("flop_counter" not in globals())
from torch.utils import flop_counter
import torch
assert torch.ops.lumos_kernels.frame_attention in flop_counter.flop_registry
assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("lumos_kernels")]
assert not type(flop_counter.__loader__).__module__.startswith("lumos_kernels")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_makes_logits_alone(mode, reduction):
    hidden, weight = torch.randn(4, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.tensor([-100, 20, 21, 5])
    with mode():
        assert counted(lambda: tube_masked_loss(hidden, weight, labels, classes=(10, 40), reduction=reduction)) == (
            2 * 2 * 16 * 30
        )
