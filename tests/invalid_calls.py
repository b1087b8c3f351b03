"""Calls ops with invalid indices, in a process that test_invalid_indices.py starts and whose end it judges.

    python tests/invalid_calls.py --calls 10000 --seed 1

A call may raise ValueError or give a result that is defined: in range, and finite where no input is otherwise. Tensors
lie between NaN, so that what is read outside of them shows. Each call is written to --log before it starts: after a
signal, the log names the call.

To attack another op: write one function that draws a call from a Draw, runs it and asserts on its outputs, and list it
in CALLS.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lumos_kernels import FrameLayout, RowLimits, frame_attention, library, masked_sample, mm_rope, tube_masked_loss
from lumos_kernels.frame_layout.api import frame_layout

OPS = torch.ops.lumos_kernels
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
GUARD = 64  # elements before and after a tensor


class Draw:
    """The random choices of one call."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = self.random.choice([torch.bfloat16, torch.float32])

    def size(self, most: int) -> int:
        """Small sizes often, zero too."""
        return self.random.choice([0, 1, 2, self.random.randint(0, 40), self.random.randint(0, most)])

    def index(self, most: int) -> int:
        """A value inside 0..most as often as not, else near its ends, far away or at the ends of int32."""
        outside = [-1, most + 1, most + 7, -(10**6), 10**6, INT_MIN, INT_MIN + 1, INT_MAX, INT_MAX - 1]
        return self.random.randint(0, most) if self.random.random() < 0.6 else self.random.choice(outside)

    def indices(self, count: int, most: int, dtype: torch.dtype = torch.int32) -> Tensor:
        values = [self.index(most) for _ in range(min(count, 40))]
        if dtype == torch.int64 and values and self.random.random() < 0.2:
            values[0] = self.random.choice([2**32 + 1, -(2**62), 2**62])
        return self.guarded(torch.tensor((values * (count // 40 + 1))[:count], dtype=dtype))

    def guarded(self, values: Tensor) -> Tensor:
        """The same values in the middle of a larger buffer of NaN, or of large integers."""
        outside = torch.nan if values.is_floating_point() else torch.iinfo(values.dtype).max
        buffer = torch.full((values.numel() + 2 * GUARD,), outside, dtype=values.dtype)
        middle = buffer[GUARD : GUARD + values.numel()].view(values.shape)
        middle.copy_(values)
        return middle

    def normal(self, *shape: int) -> Tensor:
        return self.guarded(torch.randn(shape, generator=self.generator).to(self.dtype))


def assert_attention(outputs: Sequence[Tensor], limits: RowLimits) -> None:
    o, lse, *gradients = outputs
    assert all(bool(x.isfinite().all()) for x in (o, *gradients)), "NaN or infinity, or an element was not written"
    sees = limits.dense_mask().any(1)
    assert bool(lse[:, sees].isfinite().all()), "lse of a row with keys"
    assert bool((lse[:, ~sees] == -torch.inf).all()), "lse of a row without keys"
    assert not o[~sees].any(), "o of a row without keys"


def attend(draw: Draw, limits: RowLimits) -> None:
    """Forward and backward by the public function, or by the ops."""
    kv_heads, head_dim = draw.random.choice([1, 2]), draw.random.choice([32, 64, 24])
    heads = kv_heads * draw.random.choice([1, 3])
    q = draw.normal(limits.num_queries, heads, head_dim)
    k, v = (draw.normal(limits.num_keys, kv_heads, head_dim) for _ in range(2))
    grad_o, grad_lse = draw.normal(*q.shape), torch.randn(heads, len(q), generator=draw.generator)
    rows = limits.kv_start, limits.kv_end, limits.q_start, limits.q_end
    impl = draw.random.choice(["auto", "auto", "auto", "reference"])
    if draw.random.random() < 0.5:
        o, lse = OPS.frame_attention(q, k, v, *rows, 0.2, impl)
        gradients = OPS.frame_attention_backward(grad_o, grad_lse, q, k, v, *rows, 0.2, o, lse, False, impl)
    else:
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o, lse = frame_attention(*leaves, limits, return_lse=True, impl=impl)
        gradients = torch.autograd.grad((o, lse), leaves, (grad_o, grad_lse))
    assert_attention([o.detach(), lse.detach(), *gradients], limits)


def attention_by_hand(draw: Draw) -> None:
    """RowLimits whose four tensors know nothing of each other."""
    queries, keys = draw.size(300), draw.size(420)
    of_rows = [draw.indices(queries, keys) for _ in range(2)]
    attend(draw, RowLimits(*of_rows, *(draw.indices(keys, queries) for _ in range(2))))


def attention_from_kv(draw: Draw) -> None:
    """from_kv, checked or not. What it returns without an error is in range."""
    queries, keys = draw.size(300), draw.size(420)
    dtype = draw.random.choice([torch.int32, torch.int64])
    start, end = (draw.indices(queries, keys, dtype) for _ in range(2))
    limits = RowLimits.from_kv(start, end, keys, draw.random.choice([None, True, False, False, False]))
    for bound, most in zip(vars(limits).values(), (keys, keys, queries, queries), strict=True):
        assert bool(((bound >= 0) & (bound <= most)).all())
    attend(draw, limits)


STRUCTURE = (8197, 8196, 8803, 8804, 8805, 8806, 9002, 9003, 9004, 5, 0, -1, 70000)


def layout(draw: Draw) -> None:
    """Documents whose bounds are anything, over tokens that are anything, and attention over what comes of them."""
    tokens = draw.size(300)
    ids = [draw.random.choice(STRUCTURE) for _ in range(tokens)]
    ids = draw.guarded(torch.tensor(ids, dtype=draw.random.choice([torch.int32, torch.int64])))
    impl = draw.random.choice(["native", "reference"]) if "native" in draw_impls() else "reference"
    bounds = draw.indices(draw.random.randint(0, 6), tokens, draw.random.choice([torch.int32, torch.int64]))
    way = draw.random.randrange(3)
    if way == 0:
        read = OPS.frame_layout(ids, bounds.clamp(INT_MIN, INT_MAX).int(), impl)
        positions, content, frame_index, *rows = read
    elif way == 1:
        positions, content, frame_index, *rows = frame_layout(
            ids, bounds, check=draw.random.choice([None, True, False, False]), impl=impl
        )
    else:
        made = FrameLayout.from_tokens(ids, bounds, draw.random.choice([None, True, False, False]))
        positions, content, frame_index = made.positions, made.content, made.frame_index
        rows = list(vars(made.limits).values())
    assert positions.shape == (3, tokens)
    assert bool((content == (frame_index >= 0)).all())
    index = torch.arange(tokens)
    kv_start, kv_end, q_start, q_end = rows
    for low, high in ((kv_start, index), (index + 1, kv_end), (q_start, index), (index + 1, q_end)):
        assert bool(((low >= 0) & (low <= high) & (high <= tokens)).all())
    attend(draw, RowLimits(*rows))


def draw_impls() -> tuple[str, ...]:
    return ("reference",) if library.refusal() else ("native", "reference")


def rope(draw: Draw) -> None:
    """Positions at the ends of int32."""
    tokens = draw.size(40)
    q, k = draw.normal(tokens, 2, 32), draw.normal(tokens, 1, 32)
    positions = torch.stack([draw.indices(tokens, 100_000) for _ in range(3)])
    leaves = [x.requires_grad_() for x in (q, k)]
    outputs = mm_rope(*leaves, positions, impl=draw.random.choice(draw_impls()))
    gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(x) for x in outputs])
    assert all(bool(x.isfinite().all()) for x in (*outputs, *gradients))


def sample(draw: Draw) -> None:
    """Classes outside of the weight, and keys at the ends of int64."""
    count, width, vocabulary = draw.size(20), draw.random.choice([1, 8, 33]), draw.random.randint(1, 70)
    first, last = sorted(draw.index(vocabulary) for _ in range(2))
    keys = torch.tensor([[draw.random.choice([0, -1, 2**63 - 1, -(2**63), 5]) for _ in range(2)] for _ in range(count)])
    ids, confidence = masked_sample(
        draw.normal(count, width),
        draw.normal(count, width),
        draw.normal(vocabulary, width),
        classes=(first, last),
        guidance_scale=draw.random.choice([None, 0.0, 3.0]),
        greedy=draw.random.random() < 0.3,
        row_keys=keys.reshape(count, 2).long(),
        impl=draw.random.choice(draw_impls()),
    )
    assert bool(((ids >= first) & (ids < last)).all())
    assert bool(((confidence >= 0) & (confidence <= 1.001)).all())


def loss(draw: Draw) -> None:
    """Labels of no class, and rows that are not the target rows."""
    tokens, width, vocabulary = draw.size(60), draw.random.choice([8, 33]), draw.random.randint(1, 70)
    first, last = sorted(draw.index(vocabulary) for _ in range(2))
    labels = draw.indices(tokens, vocabulary, torch.int64)
    count = draw.random.choice([tokens, draw.random.randint(0, tokens + 5)])
    rows = draw.indices(count, max(tokens - 1, 0), draw.random.choice([torch.int32, torch.int64]))
    leaves = [x.requires_grad_() for x in (draw.normal(tokens, width), draw.normal(vocabulary, width))]
    value = tube_masked_loss(
        *leaves,
        labels,
        classes=(first, last),
        rows=draw.random.choice([None, rows]),
        reduction=draw.random.choice(["mean", "sum", "none"]),
        impl=draw.random.choice(draw_impls()),
    )
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True)
    assert all(bool(x.isfinite().all()) for x in (value, *gradients))


CALLS: dict[str, Callable[[Draw], None]] = {
    "attention_by_hand": attention_by_hand,
    "attention_from_kv": attention_from_kv,
    "layout": layout,
    "rope": rope,
    "sample": sample,
    "loss": loss,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--log", default=os.devnull)
    options = parser.parse_args()
    torch.set_num_threads(1)
    isas = [*library.isas(), *library.models()]
    refused = 0
    with open(options.log, "w") as log:
        for number in range(options.calls):
            seed = options.seed * 1_000_003 + number
            name = options.only[number % len(options.only)]
            draw = Draw(seed)
            if isas:
                os.environ["LUMOS_CPU_ISA"] = draw.random.choice(isas)
            log.seek(0)
            log.write(f"{name} of seed {seed} on {os.environ.get('LUMOS_CPU_ISA')}\n".ljust(80))
            log.flush()
            try:
                CALLS[name](draw)
            except ValueError:
                refused += 1
    print(f"{options.calls} calls, {refused} refused")


if __name__ == "__main__":
    main()
