"""frame_attention through an installed flash-attn: exact, a fallback and a rival. The contract is in ops.py.

flash-attn knows no row limits, but causal masks aligned to the bottom right. Rows that see the same keys (a frame) are
one call without a mask, rows whose limit grows by one key each (text) one causal call; where each key belongs to one
call alone, they are sequences of a single varlen call. To cut the rows the limits must be read: the host waits for the
GPU once per limits, not per layer.

frame_attention(impl="flash") goes through `attend`, whose autograd is flash-attn's own. forward and backward serve
whoever chooses it otherwise (LUMOS_IMPL); backward then runs the forward calls again.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lumos_kernels.layout import RowLimits

# Where the releases keep flash_attn_func and flash_attn_varlen_func: FlashAttention-3, -4 and -2.
MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")

# More calls than this mean limits that flash-attn has no mask for, such as windows that slide token by token.
MAX_CALLS = 1024


class Run(NamedTuple):
    """Consecutive rows that one call serves: queries [q_first, q_last) against keys [k_first, k_last)."""

    q_first: int
    q_last: int
    k_first: int
    k_last: int
    causal: bool  # row i of n sees all keys but the last n - 1 - i


@functools.cache
def module() -> ModuleType | None:
    """The installed flash-attn, newest interface for Hopper first; None where there is none."""
    for name in MODULES:
        try:
            found = importlib.import_module(name)
        except (ImportError, OSError):  # absent, or built for another torch or CUDA
            continue
        if hasattr(found, "flash_attn_func"):
            return found
    return None


def refusal() -> str | None:
    """None where flash-attn is installed and loads, else why not."""
    if module() is not None:
        return None
    return "flash-attn is not installed, or does not load with this torch"


def cut(limits: RowLimits) -> list[Run]:
    """The calls that make up the limits, without the rows that see nothing. Reads the limits."""
    starts, ends = limits.kv_start.cpu(), limits.kv_end.cpu()
    same_start = (starts.diff() == 0) & (ends > starts)[1:] & (ends > starts)[:-1]
    # 0: to a row that sees the same keys, 1: to one that sees one key more, 2: to any other.
    steps = torch.where(same_start, ends.diff().clamp(0, 2), 2).tolist()
    starts, ends = starts.tolist(), ends.tolist()
    runs, first = [], 0
    while first < len(starts):
        last = first + 1
        while last < len(starts) and steps[last - 1] != 2 and steps[last - 1] == steps[first]:
            last += 1
        if starts[first] < ends[first]:
            causal = last - first > 1 and steps[first] == 1
            runs.append(Run(first, last, starts[first], ends[last - 1], causal))
        first = last
    if len(runs) > MAX_CALLS:
        raise ValueError(
            f"frame_attention: impl='flash' cannot express these limits: {len(starts)} queries would take "
            f"{len(runs)} calls of flash-attn, more than {MAX_CALLS}; it has masks for frames and for causal text only"
        )
    return runs


_RUNS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # kv_end -> (its version, kv_start's, runs)


def _runs(limits: RowLimits) -> list[Run]:
    """cut(limits), remembered as long as the tensor of limits lives and is not written to."""
    versions = limits.kv_end._version, limits.kv_start.data_ptr(), limits.kv_start._version
    known = _RUNS.get(limits.kv_end)
    if known is None or known[0] != versions:
        known = versions, cut(limits)
        _RUNS[limits.kv_end] = known
    return known[1]


def _outputs(result: Tensor | tuple, name: str) -> tuple[Tensor, Tensor]:
    """(o, lse) of a call that was asked for both; FlashAttention-2 adds a third value."""
    if isinstance(result, Tensor) or len(result) < 2:
        raise ValueError(f"frame_attention: impl='flash' cannot run here: {name} returns no lse")
    return result[0], result[1]


def _with_lse(function, arguments: dict) -> dict:
    """The argument by which this version returns lse too."""
    names = _parameters(function)
    for name in ("return_attn_probs", "return_lse"):
        if name in names:
            arguments[name] = True
    if "deterministic" not in names:
        arguments.pop("deterministic", None)
    return arguments


@functools.lru_cache(maxsize=16)
def _parameters(function) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _one_call(q: Tensor, k: Tensor, v: Tensor, run: Run, scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
    function = module().flash_attn_func
    q, k, v = q[run.q_first : run.q_last], k[run.k_first : run.k_last], v[run.k_first : run.k_last]
    options = _with_lse(function, {"softmax_scale": scale, "causal": run.causal, "deterministic": deterministic})
    o, lse = _outputs(function(q[None], k[None], v[None], **options), "flash_attn_func")
    return o[0], lse[0, :, : q.shape[0]]  # some versions pad the rows of lse


def _is_packed(runs: list[Run], queries: int, keys: int) -> bool:
    """Whether the runs are the sequences of a varlen call: all rows, all keys, each key in one run, masks alike."""
    q_edges = [0, *(run.q_last for run in runs)] == [*(run.q_first for run in runs), queries]
    k_edges = [0, *(run.k_last for run in runs)] == [*(run.k_first for run in runs), keys]
    # A single row is its own frame and its own text.
    return q_edges and k_edges and len({run.causal for run in runs if run.q_last - run.q_first > 1}) <= 1


def _one_varlen_call(q, k, v, runs: list[Run], scale: float, deterministic: bool) -> tuple[Tensor, Tensor]:
    function = module().flash_attn_varlen_func
    edges = [(0, 0), *((run.q_last, run.k_last) for run in runs)]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in zip(*edges, strict=True))
    options = _with_lse(
        function, {"softmax_scale": scale, "causal": any(r.causal for r in runs), "deterministic": deterministic}
    )
    sizes = {
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(run.q_last - run.q_first for run in runs),
        "max_seqlen_k": max(run.k_last - run.k_first for run in runs),
    }
    return _outputs(function(q, k, v, **sizes, **options), "flash_attn_varlen_func")


class _NoGradient(torch.autograd.Function):
    """lse as it is; a gradient that reaches it raises, where flash-attn would drop it in silence."""

    @staticmethod
    def forward(ctx, lse, o):
        ctx.set_materialize_grads(False)
        return lse.clone()

    @staticmethod
    def backward(ctx, grad):
        if grad is not None:
            raise ValueError("frame_attention: impl='flash' passes no gradient through lse: flash-attn has none")
        return None, None


def attend(
    q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float, deterministic: bool = False
) -> tuple[Tensor, Tensor]:
    """q [Tq, Hq, D], k and v [Tk, Hkv, D] -> o [Tq, Hq, D], lse fp32 [Hq, Tq]; autograd is flash-attn's.

    Raises ValueError where the limits take too many calls, and in backward where a gradient reaches lse.
    """
    runs = _runs(limits)
    queries, heads, _ = q.shape
    if len(runs) > 1 and hasattr(module(), "flash_attn_varlen_func") and _is_packed(runs, queries, k.shape[0]):
        o, lse = _one_varlen_call(q, k, v, runs, scale, deterministic)
        if lse.shape == (heads, queries):  # before 2.6 it came padded, by document
            return o, _NoGradient.apply(lse.float(), o)
    outs, lses, row = [], [], 0
    for run in [*runs, None]:
        upto = queries if run is None else run.q_first
        if upto > row:  # rows without keys
            outs.append(q[row:upto].masked_fill(q.new_ones((), dtype=torch.bool), 0.0))  # 0, and so is its gradient
            lses.append(q.new_full((heads, upto - row), -torch.inf, dtype=torch.float32))
        if run is not None:
            o, lse = _one_call(q, k, v, run, scale, deterministic)
            outs.append(o)
            lses.append(lse.float())
            row = run.q_last
    o = torch.cat(outs) if outs else q.clone()
    lse = torch.cat(lses, 1) if lses else q.new_empty((heads, 0), dtype=torch.float32)
    return o, _NoGradient.apply(lse, o)


def forward(q: Tensor, k: Tensor, v: Tensor, limits: RowLimits, scale: float) -> tuple[Tensor, Tensor]:
    return attend(q, k, v, limits, scale)


def backward(
    grad_o: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    limits: RowLimits,
    scale: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if grad_lse is not None:
        raise ValueError("frame_attention: impl='flash' passes no gradient through lse: flash-attn has none")
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, _ = attend(*leaves, limits, scale, deterministic)
    return torch.autograd.grad(again, leaves, grad_o, allow_unused=True, materialize_grads=True)
