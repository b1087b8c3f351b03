"""The problems on which implementations of frame_attention are compared with the reference."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..examples import DETERMINISTIC, Change, Draw, Example, Values, spoiled
from ..layout import RowLimits
from ..limits import USUAL, Limits
from .api import frame_attention
from .contract import FUSED, SELF_DIFFERENTIATING, Inputs, OutputGradients

KINDS = {"triton": (DETERMINISTIC, FUSED)}
HEAD_DIMS = (32, 64, 96, 128)
_LOG2_E = 1.4426950408889634
_CAUSAL = 165  # tokens of the example with sections


class AttentionExample(Example):
    """A call of frame_attention."""

    even = ("o", "dv")

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return o and lse."""
        o, lse = frame_attention(**args, return_lse=True, deterministic=True, impl=impl)
        return {"o": o, "lse": lse}

    def fitted(self, impl: str, int64: bool) -> Any:
        """Return the example without a gradient of lse where an implementation's library has none."""
        upstream = {name: g for name, g in self.upstream.items() if name != "lse" or impl not in SELF_DIFFERENTIATING}
        return super().fitted(impl, int64).replace(upstream)

    def _run(self, impl: str) -> Values:
        if self.kind != FUSED:
            return super()._run(impl)
        # The fused backward is called by its name: no option asks for it.
        triton: Any = importlib.import_module(f"{__package__}.triton")
        args = self.args
        inputs = Inputs(args["q"], args["k"], args["v"], args["limits"], self._scale())
        outputs = triton.forward(inputs)
        grad = OutputGradients(self.upstream["o"], self.upstream.get("lse"))
        gradients = triton.backward_fused(inputs, outputs, grad)
        return {"o": outputs.o, "lse": outputs.lse, "dq": gradients.q, "dk": gradients.k, "dv": gradients.v}

    def _scale(self) -> float:
        scale: float | None = self.args["scale"]
        return self.args["q"].shape[2] ** -0.5 if scale is None else scale

    def eager(self) -> Values:
        """Return the results of dense matmuls. p and its gradient are rounded to the dtype before their matmuls."""
        q, k, v = (self.args[name] for name in ("q", "k", "v"))
        dtype, group, scale = q.dtype, q.shape[1] // k.shape[1], self._scale()
        q_, k_, v_ = (x.float().transpose(0, 1) for x in (q, k, v))
        k_, v_ = (x.repeat_interleave(group, 0) for x in (k_, v_))
        visible = self.args["limits"].dense_mask()
        s = (q_ @ k_.mT * (scale * _LOG2_E)).masked_fill(~visible, -torch.inf)
        lse = torch.logsumexp(s / _LOG2_E, -1)
        exact_p = torch.where(visible, torch.exp2(s - lse[..., None] * _LOG2_E), 0.0)
        p = exact_p.to(dtype).float()
        o = (p @ v_).to(dtype)
        do = self.upstream["o"].float().transpose(0, 1)
        delta = (do * o.float()).sum(-1) - self.upstream.get("lse", 0.0)
        ds = (exact_p * (do @ v_.mT - delta[..., None])).to(dtype).float()
        dq, dk, dv = scale * (ds @ k_), scale * (ds.mT @ q_), p.mT @ do
        dk, dv = (x.unflatten(0, (k.shape[1], group)).sum(1) for x in (dk, dv))
        o, dq, dk, dv = (x.transpose(0, 1).to(dtype) for x in (o, dq, dk, dv))
        return {"o": o, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def changes(self) -> Iterator[Change]:
        """Yield the change of everything that a row's limits hide from the first half of the rows."""
        q, k, v = (self.args[name] for name in ("q", "k", "v"))
        limits: RowLimits = self.args["limits"]
        cut = limits.num_queries // 2
        if not cut:
            return
        last = int(limits.kv_end[:cut].max())
        if last == limits.num_keys:
            return
        upstream = {name: g.clone() for name, g in self.upstream.items()}
        upstream["o"][cut:] = 0
        if "lse" in upstream:
            upstream["lse"][:, cut:] = 0
        plain = self.replace(upstream)
        changed = plain.replace(
            q=spoiled(q, slice(cut, None)), k=spoiled(k, slice(last, None)), v=spoiled(v, slice(last, None))
        )
        rows, keys = slice(0, cut), slice(0, last)
        unaffected: dict[str, Any] = {"o": rows, "lse": (slice(None), rows), "dk": keys, "dv": keys}
        if self.kind == DETERMINISTIC:
            unaffected["dq"] = rows
        yield Change("later keys", plain, changed, unaffected)


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[AttentionExample]:
    """Yield packed documents with rows without keys, a sliding window over a longer cache, rows in any order, and calls
    without work.

    The first one has groups of four query heads, slices of a fused projection, a large gradient of lse and scores so
    large that the online softmax must follow the running maximum. No length is a multiple of a tile. The third one has
    two sections of kv heads, the second of which is not full.
    """
    head_bytes = 2 * _CAUSAL * head_dim * dtype.itemsize  # K and V of a head, or q and the gradient of o
    sections = Limits(section_bytes=2 * head_bytes, int64=True)
    for name, limits, heads, kv_heads, scale, with_lse, lowered in (
        ("documents, fused projection", _documents(device), 8, 2, None, True, USUAL),
        ("window over a cache, negative scale", _window(device), 3, 3, -0.1, False, USUAL),
        ("two sections, int64 offsets", _causal(_CAUSAL, device), 3, 3, 0.2, True, sections),
        ("rows in any order", _shuffled(device), 4, 2, None, True, USUAL),
        ("no tokens", _causal(0, device), 4, 2, None, True, USUAL),
        ("no keys", _no_keys(5, device), 4, 2, None, True, USUAL),
    ):
        queries, keys = limits.num_queries, limits.num_keys
        draw = Draw(keys, dtype, device)
        if queries == keys:
            q, k, v = draw.normal(keys, heads + 2 * kv_heads, head_dim).split([heads, kv_heads, kv_heads], 1)
        else:
            q, k, v = (draw.normal(n, h, head_dim) for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads)))
        q[:, 1::2] *= 4
        upstream = {"o": draw.normal(queries, heads, head_dim)}
        if with_lse:
            upstream["lse"] = draw.normal(heads, queries, std=10.0).float()
        args = {"q": q, "k": k, "v": v, "limits": limits, "scale": scale}
        yield AttentionExample(name, args, ("q", "k", "v"), upstream, lowered=lowered)


def _documents(device: torch.device) -> RowLimits:
    """Return the limits of 37 tokens of text and frames of 150, then of a second document whose first rows see nothing.

    Some tiles of 128 x 128 lie inside the frames. Others are cut by a frame, by the diagonal or by the next document.
    """
    text, frame, first, total = 37, 150, 487, 687
    row = torch.arange(total, dtype=torch.int64, device=device)
    in_frames = text + ((row - text) // frame + 1) * frame
    end = torch.where((row >= text) & (row < first), in_frames, row + 1)
    end = torch.where((row >= first) & (row < first + 10), first, end)
    return _limits(torch.where(row < first, 0, first), end, total)


def _causal(tokens: int, device: torch.device) -> RowLimits:
    """Return the limits of plain text."""
    row = torch.arange(tokens, dtype=torch.int64, device=device)
    return _limits(torch.zeros_like(row), row + 1, tokens)


def _no_keys(queries: int, device: torch.device) -> RowLimits:
    nothing = torch.zeros(queries, dtype=torch.int64, device=device)
    return _limits(nothing, nothing, 0)


def _window(device: torch.device) -> RowLimits:
    """Return the limits of 165 queries against a cache of 421 keys: blocks of 33 rows see the 190 keys before them."""
    row = torch.arange(165, dtype=torch.int64, device=device)
    end = 421 - 165 + (row // 33 + 1) * 33
    return _limits(end - 190, end, 421)


def _shuffled(device: torch.device) -> RowLimits:
    """Return the limits of a window of 90 keys over 300, its 165 rows out of order, every eighth of them without keys.

    Inside a tile the rows see keys everywhere, so nearly all pairs inside its bounds are masked.
    """
    row = torch.arange(165, dtype=torch.int64, device=device)
    start = row * 67 % 165
    return _limits(start, torch.where(row % 8 == 3, start, start + 90), 300)


def _limits(start: Tensor, end: Tensor, keys: int) -> RowLimits:
    return RowLimits.from_kv(start, end, keys, check=False)
