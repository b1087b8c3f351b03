"""Inputs of every op at a size, and one way to call them all: what the tests of this folder are written over.

Example.call(impl) runs the public function, Example.with_gradients(impl) its gradients too. Changed inputs come from
Example.replace(name=tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumos_kernels import (
    Frame,
    FrameLayout,
    RowLimits,
    Text,
    frame_attention,
    masked_sample,
    mm_rope,
    tube_masked_loss,
)


@dataclass(frozen=True)
class Size:
    """Heads and widths of a model, and the documents of a stream."""

    name: str
    documents: Sequence[Sequence[Text | Frame]]
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    classes: tuple[int, int]

    @property
    def layout(self) -> FrameLayout:
        return FrameLayout.from_segments(self.documents)


def _model(name: str, documents: Sequence[Sequence[Text | Frame]], heads: tuple[int, int, int], hidden: int) -> Size:
    return Size(name, documents, *heads, hidden, 129536, (65536, 129536))


HEADS_1B, HEADS_3B = (32, 8, 64), (24, 8, 128)
FRAME_256P, FRAME_384P = Frame(32, 56), Frame(48, 84)  # 1,828 and 4,084 tokens
SMALL = Size(
    "small", [[Text(9), *[Frame(4, 8)] * 3, Text(2)], [Text(5), *[Frame(4, 4)] * 2]], 4, 2, 32, 64, 512, (192, 512)
)
SMALL_WIDE = replace(SMALL, name="small-wide", heads=6, head_dim=64)


def two_documents(frame: Frame) -> list[list[Text | Frame]]:
    return [[Text(266), *[frame] * 3, Text(2)], [Text(77), *[frame] * 2]]


REAL = [
    _model("1B-256p", two_documents(FRAME_256P), HEADS_1B, 2048),
    _model("3B-256p", two_documents(FRAME_256P), HEADS_3B, 3072),
    _model("1B-384p", two_documents(FRAME_384P), HEADS_1B, 2048),
    _model("3B-384p", two_documents(FRAME_384P), HEADS_3B, 3072),
]
ONE_FRAME = _model("1B-256p-1f", [[Text(266), FRAME_256P, Text(2)]], HEADS_1B, 2048)


def sizes(device: str) -> list[Size]:
    return [SMALL, SMALL_WIDE] if device == "cpu" else REAL


def contract_size(device: str) -> Size:
    """For what does not depend on the length: one frame of 1,828 tokens."""
    return SMALL if device == "cpu" else ONE_FRAME


@dataclass(frozen=True)
class Example:
    """Arguments of an op's public function, the names of those that get gradients, and the upstream gradients."""

    op: str
    size: Size
    args: dict[str, Any]
    leaves: tuple[str, ...] = ()
    upstream: tuple[Tensor, ...] = ()
    call_op: Callable[..., tuple[Tensor, ...]] = field(repr=False, default=None)

    def replace(self, upstream: tuple[Tensor, ...] | None = None, **changed: Any) -> Example:
        return replace(
            self, args={**self.args, **changed}, upstream=self.upstream if upstream is None else tuple(upstream)
        )

    def to(self, dtype: torch.dtype) -> Example:
        """Floating arguments and upstream gradients in another precision, the latter as wide as the outputs."""

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(cast(part) for part in x)
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        wide = tuple(g.to(torch.promote_types(g.dtype, dtype)) for g in self.upstream)
        return replace(self, args={name: cast(value) for name, value in self.args.items()}, upstream=wide)

    def call(self, impl: str, **options: Any) -> tuple[Tensor, ...]:
        """The outputs, without autograd."""
        with torch.no_grad():
            return self.call_op(**{**self.args, **options}, impl=impl)

    def with_gradients(self, impl: str, **options: Any) -> tuple[Tensor, ...]:
        """The outputs and the gradients of the leaves under the upstream gradients."""
        args = {name: self._fresh(name, value) for name, value in self.args.items()}
        outputs = self.call_op(**{**args, **options}, impl=impl)
        if not self.leaves:
            return tuple(outputs)
        leaves = [x for name in self.leaves for x in (args[name] if isinstance(args[name], tuple) else (args[name],))]
        grads = torch.autograd.grad(outputs[: len(self.upstream)], leaves, self.upstream)
        return *(output.detach() for output in outputs), *grads

    def _fresh(self, name: str, value: Any) -> Any:
        if name not in self.leaves:
            return value
        if isinstance(value, tuple):
            return tuple(part.detach().requires_grad_() for part in value)
        return value.detach().requires_grad_()


def _random(seed: int, device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (mean + std * torch.randn(*shape, generator=generator, device=device)).to(dtype)

    return draw


def _mm_rope(size: Size, device: str, dtype: torch.dtype, seed: int) -> Example:
    draw, layout = _random(seed, device, dtype), size.layout.to(device)
    tokens, width = layout.num_tokens, size.head_dim
    q, k, _ = draw(tokens, size.heads + 2 * size.kv_heads, width).split((size.heads, size.kv_heads, size.kv_heads), 1)
    norms = [(draw(1, width, mean=1.0, std=0.1), draw(1, width, std=0.1)) for _ in range(2)]
    return Example(
        "mm_rope",
        size,
        {"q": q, "k": k, "positions": layout.positions, "q_norm": norms[0], "k_norm": norms[1]},
        ("q", "k", "q_norm", "k_norm"),
        (draw(*q.shape), draw(*k.shape)),
        mm_rope,
    )


def _attention(**args: Any) -> tuple[Tensor, ...]:
    return frame_attention(**{"return_lse": True, "deterministic": True, **args})


def _frame_attention(size: Size, device: str, dtype: torch.dtype, seed: int) -> Example:
    draw, limits = _random(seed, device, dtype), size.layout.limits.to(device)
    tokens = limits.num_queries
    q, k, v = (draw(tokens, heads, size.head_dim) for heads in (size.heads, size.kv_heads, size.kv_heads))
    args = {"q": q, "k": k, "v": v, "limits": limits}
    return Example("frame_attention", size, args, ("q", "k", "v"), (draw(*q.shape),), _attention)


def _loss(**args: Any) -> tuple[Tensor, ...]:
    loss, stats = tube_masked_loss(**{"return_stats": True, **args})
    return loss, stats.nll, stats.lse, stats.correct


def _tube_masked_loss(size: Size, device: str, dtype: torch.dtype, seed: int) -> Example:
    draw, content = _random(seed, device, dtype), size.layout.content
    generator = torch.Generator().manual_seed(seed)
    targets = content & (torch.rand(content.shape, generator=generator) < 0.8)
    labels = torch.randint(*size.classes, content.shape, generator=generator)
    args = {
        "hidden": draw(len(content), size.hidden),
        "weight": draw(size.vocab, size.hidden, std=0.02),
        "labels": torch.where(targets, labels, -100).to(device),
        "classes": size.classes,
        "rows": targets.nonzero()[:, 0].to(torch.int32).to(device),
    }
    upstream = torch.tensor(1.7, dtype=torch.promote_types(dtype, torch.float32), device=device)
    return Example("tube_masked_loss", size, args, ("hidden", "weight"), (upstream,), _loss)


def _masked_sample(size: Size, device: str, dtype: torch.dtype, seed: int) -> Example:
    draw = _random(seed, device, dtype)
    rows = min(2048, int(size.layout.content.sum()))
    args = {
        "hidden_cond": draw(rows, size.hidden),
        "hidden_uncond": draw(rows, size.hidden),
        "weight": draw(size.vocab, size.hidden, std=0.02),
        "classes": size.classes,
        "guidance_scale": 3.0,
        "temperature": 0.9,
        "row_keys": torch.stack([torch.full((rows,), 2**40 + seed), torch.arange(rows)], 1).to(device),
    }
    return Example("masked_sample", size, args, (), (), masked_sample)


_MAKERS = {
    "mm_rope": _mm_rope,
    "frame_attention": _frame_attention,
    "tube_masked_loss": _tube_masked_loss,
    "masked_sample": _masked_sample,
}


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits) -> Tensor:
    """SDPA with the dense mask, the low-precision yardstick. Keys and values are repeated for the query heads: asked to
    group heads under a mask, torch keeps all scores of a GPU's attention in memory.
    """
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=limits.dense_mask())[0].transpose(0, 1)


def example(op: str, size: Size, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Example:
    return _MAKERS[op](size, device, dtype, seed)
