"""What the layers know of the packed stream, and what sampling and context parallelism plug into them.

Legend of the shape suffixes: as in lumos.model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lumos_kernels import FrameLayout, dispatch
from lumos_kernels.layout import RowLimits

MODEL_OPS = ("mm_rope", "frame_attention", "tube_masked_loss", "masked_sample")


class KeyValueCache(Protocol):
    """What sampling plugs into the layers: update stores or extends the keys and values of one layer."""

    def update(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the new tokens' keys and values, returns those that the new queries attend to, in stream order."""
        ...


class ContextExchange(Protocol):
    """What context parallelism plugs in: a rank has its own tokens, and in attention all tokens of its own heads."""

    size: int

    def own(self, x: Tensor) -> Tensor:
        """[..., T] of the whole stream -> the part that belongs to the rank's tokens."""
        ...

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The rank's tokens of all heads -> all tokens of the rank's heads."""
        ...

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back."""
        ...


@dataclass(frozen=True)
class Stream:
    """What every layer needs to know of the packed stream.

    positions: int32 [3, T]; limits: RowLimits of T queries over the keys (of the cache, where there is one).
    context: where several ranks share the stream: positions are then the rank's own, limits those of all tokens.
    impl: implementation of every op, or of the ops named in a mapping (MODEL_OPS); the others are "auto".
    """

    positions: Tensor
    limits: RowLimits
    impl: str | Mapping[str, str] = "auto"
    cache: KeyValueCache | None = None
    context: ContextExchange | None = None


def own_layout(layout: FrameLayout, context: ContextExchange) -> FrameLayout:
    """What concerns a rank's own tokens of a shared stream; documents and limits stay those of the whole stream."""
    positions, content, frame_index = map(context.own, (layout.positions, layout.content, layout.frame_index))
    return FrameLayout(layout.cu_seqlens, positions, content, frame_index, layout.limits)


def choose_impl(impl: str | Mapping[str, str], op: str) -> str:
    """Return the implementation of one op, out of a name for all of them or a mapping by op name."""
    return impl if isinstance(impl, str) else impl.get(op, "auto")


def check_impl(impl: str | Mapping[str, str]) -> None:
    """Raise ValueError unless `impl` names implementations that the model's ops have."""
    dispatch.check_impl(impl, MODEL_OPS)
