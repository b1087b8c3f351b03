"""frame_attention through an installed flash-attn: exact, a fallback and a rival.

flash-attn knows no row limits, but it has causal masks aligned to the bottom right. Rows that see the same keys (a
frame) become one call without a mask. Rows whose limit grows by one key each (text) become one causal call. Where each
key belongs to one call alone, the calls become sequences of a single varlen call. Cutting the rows reads the limits:
the host waits for the GPU once per limits, not once per layer.

frame_attention(impl="flash") goes through differentiable_forward, whose autograd is flash-attn's own. forward and
backward serve a choice by LUMOS_IMPL, and backward then runs the forward calls again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..layout import RowLimits
from ..registration import once_differentiable
from .contract import Gradients, Inputs, OutputGradients, Outputs

# Where the releases keep flash_attn_func and flash_attn_varlen_func: FlashAttention-3, -4 and -2.
MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")

# Limits that take more calls have no mask in flash-attn, e.g. windows that slide token by token.
MAX_CALLS = 1024


class Run(NamedTuple):
    """Consecutive rows that one call serves: the queries [q_first, q_last) against the keys [k_first, k_last)."""

    q_first: int
    q_last: int
    k_first: int
    k_last: int
    causal: bool  # row i of n sees all keys but the last n - 1 - i


@functools.cache
def module() -> ModuleType | None:
    """Return the installed flash-attn, the newest interface for Hopper first, None where there is none."""
    for name in MODULES:
        try:
            found = importlib.import_module(name)
        except (ImportError, OSError):  # absent, or built for another torch or CUDA
            continue
        if hasattr(found, "flash_attn_func"):
            return found
    return None


def refusal() -> str | None:
    """Return None where flash-attn is installed and loads, else the reason why not."""
    if module() is not None:
        return None
    return "flash-attn is not installed, or does not load with this torch"


def cut(limits: RowLimits) -> list[Run]:
    """Return the calls that make up the limits, without the rows that see nothing. Reads the limits."""
    starts, ends = (x.cpu().clamp(0, limits.num_keys) for x in (limits.kv_start, limits.kv_end))
    same_start = (starts.diff() == 0) & (ends > starts)[1:] & (ends > starts)[:-1]
    # The step to the next row: 0 if that sees the same keys, 1 if it sees one key more, 2 if it is any other row.
    more = ends.diff()
    steps = torch.where(same_start & (more >= 0) & (more <= 1), more, 2).tolist()
    kv_start, kv_end = starts.tolist(), ends.tolist()
    runs, first = [], 0
    while first < len(kv_start):
        last = first + 1
        while last < len(kv_start) and steps[last - 1] != 2 and steps[last - 1] == steps[first]:
            last += 1
        if kv_start[first] < kv_end[first]:
            causal = last - first > 1 and steps[first] == 1
            runs.append(Run(first, last, kv_start[first], kv_end[last - 1], causal))
        first = last
    if len(runs) > MAX_CALLS:
        raise ValueError(
            f"frame_attention: impl='flash' cannot express these limits: {len(kv_start)} queries would take "
            f"{len(runs)} calls of flash-attn, more than {MAX_CALLS}; it has masks for frames and for causal text only"
        )
    return runs


_RUNS = WeakIdKeyDictionary()  # kv_end -> (versions of both limits, runs)


def _runs(limits: RowLimits) -> list[Run]:
    """Return cut(limits), cached as long as the tensor of limits lives and is not written to."""
    versions = limits.kv_end._version, limits.kv_start.data_ptr(), limits.kv_start._version
    known: tuple[tuple[int, int, int], list[Run]] | None = _RUNS.get(limits.kv_end)
    if known is None or known[0] != versions:
        known = versions, cut(limits)
        _RUNS[limits.kv_end] = known
    return known[1]


def _outputs(result: Tensor | tuple[Any, ...], name: str) -> tuple[Tensor, Tensor]:
    """Return (o, lse) of a call that was asked for both. FlashAttention-2 adds a third value."""
    if isinstance(result, Tensor) or len(result) < 2:
        raise ValueError(f"frame_attention: impl='flash' cannot run here: {name} returns no lse")
    return result[0], result[1]


def _with_lse(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with the one by which this version returns lse too."""
    names = _parameters(function)
    for name in ("return_attn_probs", "return_lse"):
        if name in names:
            arguments[name] = True
    if "deterministic" not in names:
        arguments.pop("deterministic", None)
    return arguments


@functools.lru_cache(maxsize=16)
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _function(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(module(), name)
    return function


def _one_call(inputs: Inputs, run: Run, deterministic: bool) -> tuple[Tensor, Tensor]:
    function = _function("flash_attn_func")
    q = inputs.q[None, run.q_first : run.q_last]
    k, v = (x[None, run.k_first : run.k_last] for x in (inputs.k, inputs.v))
    options = {"softmax_scale": inputs.scale, "causal": run.causal, "deterministic": deterministic}
    o, lse = _outputs(function(q, k, v, **_with_lse(function, options)), "flash_attn_func")
    return o[0], lse[0, :, : q.shape[1]]  # some versions pad the rows of lse


def _is_packed(runs: list[Run], queries: int, keys: int) -> bool:
    """Return whether the runs are the sequences of one varlen call: all rows, each key in one run, one kind of mask."""
    q_edges = [0, *(run.q_last for run in runs)] == [*(run.q_first for run in runs), queries]
    k_edges = [0, *(run.k_last for run in runs)] == [*(run.k_first for run in runs), keys]
    # A single row is its own frame and its own text.
    return q_edges and k_edges and len({run.causal for run in runs if run.q_last - run.q_first > 1}) <= 1


def _one_varlen_call(inputs: Inputs, runs: list[Run], deterministic: bool) -> tuple[Tensor, Tensor]:
    function = _function("flash_attn_varlen_func")
    edges = [(0, 0), *((run.q_last, run.k_last) for run in runs)]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=inputs.q.device) for x in zip(*edges, strict=True))
    causal = any(run.causal for run in runs)
    options = {"softmax_scale": inputs.scale, "causal": causal, "deterministic": deterministic}
    sizes = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(run.q_last - run.q_first for run in runs),
        "max_seqlen_k": max(run.k_last - run.k_first for run in runs),
    }
    result = function(inputs.q, inputs.k, inputs.v, **sizes, **_with_lse(function, options))
    return _outputs(result, "flash_attn_varlen_func")


class _NoGradient(torch.autograd.Function):
    """Passes lse on. A gradient that reaches it raises an error, where flash-attn would drop it in silence."""

    @staticmethod
    def forward(ctx: Any, lse: Tensor, o: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return lse.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        if grad is not None:
            raise ValueError("frame_attention: impl='flash' passes no gradient through lse: flash-attn has none")
        return None, None


_without_gradient: Callable[[Tensor, Tensor], Tensor] = _NoGradient.apply


class _OnceDifferentiable(torch.autograd.Function):
    """Passes q, k and v on. Their gradients cannot be differentiated again, which flash-attn itself does not notice."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v)
        ctx.set_materialize_grads(False)
        return q.view_as(q), k.view_as(k), v.view_as(v)

    @staticmethod
    @once_differentiable("frame_attention")
    def backward(ctx: Any, _: tuple[Tensor, ...], *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients


_once_differentiable: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = _OnceDifferentiable.apply


def differentiable_forward(inputs: Inputs, *, deterministic: bool) -> Outputs:
    """Return outputs through which gradients flow by flash-attn's own autograd.

    Raises ValueError where the limits take too many calls, and in backward where a gradient reaches lse. Gradients that
    are differentiated again raise RuntimeError.
    """
    q, k, v = _once_differentiable(*inputs[:3])
    inputs = inputs._replace(q=q, k=k, v=v)
    if inputs.scale < 0:  # flash-attn takes the maximum of the scores before it scales them
        inputs = inputs._replace(q=-inputs.q, scale=-inputs.scale)
    runs, queries = _runs(inputs.limits), inputs.q.shape[0]
    if len(runs) > 1 and hasattr(module(), "flash_attn_varlen_func") and _is_packed(runs, queries, inputs.k.shape[0]):
        o, lse = _one_varlen_call(inputs, runs, deterministic)
        if lse.shape == (inputs.q.shape[1], queries):  # before 2.6 it came padded, by document
            return Outputs(o, _without_gradient(lse.float(), o))
        del o, lse  # they would live beside the results of the single calls
    parts, row = [], 0
    for run in runs:
        if run.q_first > row:
            parts.append(_rows_without_keys(inputs.q, row, run.q_first))
        parts.append(_one_call(inputs, run, deterministic))
        row = run.q_last
    if queries > row or not parts:
        parts.append(_rows_without_keys(inputs.q, row, queries))
    o = torch.cat([o for o, _ in parts])
    return Outputs(o, _without_gradient(torch.cat([lse.float() for _, lse in parts], 1), o))


def _rows_without_keys(q: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return o and lse of the rows: 0, whose gradient is 0, and -inf."""
    zeros = q[first:last].masked_fill(q.new_ones((), dtype=torch.bool), 0.0)
    return zeros, q.new_full((q.shape[1], last - first), -torch.inf, dtype=torch.float32)


def forward(inputs: Inputs) -> Outputs:
    """Attend. contract.py says what comes in and goes out."""
    return differentiable_forward(inputs, deterministic=False)


def backward(inputs: Inputs, outputs: Outputs, grad: OutputGradients, *, deterministic: bool) -> Gradients:
    """Return the gradients; runs the forward calls again, since flash-attn's autograd starts from them."""
    if grad.lse is not None:
        raise ValueError("frame_attention: impl='flash' passes no gradient through lse: flash-attn has none")
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    with torch.enable_grad():
        o, _ = differentiable_forward(inputs._replace(q=q, k=k, v=v), deterministic=deterministic)
    return Gradients(*torch.autograd.grad(o, (q, k, v), grad.o, allow_unused=True, materialize_grads=True))
