"""The contract of an implementation of frame_layout, and which implementations there are.

frame_layout reads off the token ids of a packed stream where its frames lie, which position every token has, and which
keys every query sees. layout.FrameLayout says what the outputs mean. Legend: T tokens, B documents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .. import dispatch, library


class Inputs(NamedTuple):
    """What an implementation gets: contiguous tensors whose shapes and dtypes passed the checks.

    ids: int32 or int64 [T], each value fits in 32 bits. The rows may be malformed.
    cu_seqlens: int32 [B + 1], B >= 1 wherever T > 0. The values may be anything: api.frame_layout says how
        implementations read those that do not rise from 0 to T.
    """

    ids: Tensor
    cu_seqlens: Tensor


class Outputs(NamedTuple):
    """What an implementation gives.

    On malformed ids too, the limits are monotone, in bounds and each other's transposition.
    """

    positions: Tensor  # int32 [3, T]
    content: Tensor  # bool [T]
    frame_index: Tensor  # int32 [T]
    kv_start: Tensor  # int32 [T], as the next three
    kv_end: Tensor
    q_start: Tensor
    q_end: Tensor


class Implementation(Protocol):
    """A module of this folder."""

    def forward(self, inputs: Inputs) -> Outputs: ...


def _runs_native(problem: dispatch.Problem) -> str | None:
    return library.refusal() if problem.device == "cpu" else f"runs CPU tensors, not {problem.device}"


OP: dispatch.Op[Implementation] = dispatch.register(
    "frame_layout", __package__, {"native": _runs_native, "reference": dispatch.runs_anywhere}
)

if TYPE_CHECKING:  # mypy holds every implementation to the Protocol
    from . import native, reference

    _native: Implementation = native
    _reference: Implementation = reference
