"""Limits of the kernels' host code that small examples lower, so that they reach what large problems reach.

A chunk of logits holds thousands of rows, offsets pass 2^31 in tensors of gigabytes. With lower limits the same code
runs on examples of a few hundred rows. They hold for the calling thread, and backward passes that are to see them run
under torch.autograd.set_multithreading_enabled(False), which keeps them in it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple


class Limits(NamedTuple):
    """Lowered limits, None where the usual one holds."""

    chunk_bytes: int | None = None  # of a chunk of logits and what belongs to it
    section_bytes: int | None = None  # of the K and V that share the L2 cache
    splits: int | None = None  # of the tokens, each with its own partial sum
    partials: int | None = None  # partial sums that are added at once
    int64: bool = False  # compute every offset in int64


USUAL = Limits()
_current: ContextVar[Limits] = ContextVar("lumos_kernels_limits", default=USUAL)


def current() -> Limits:
    """Return the lowered limits of this thread."""
    return _current.get()


def capped(usual: int, lowered: int | None) -> int:
    """Return the usual limit or the lowered one."""
    return usual if lowered is None else min(usual, lowered)


@contextlib.contextmanager
def lowered(limits: Limits) -> Iterator[None]:
    """Lower the limits of this thread. Calls inside are slower and as right as others."""
    token = _current.set(limits)
    try:
        yield
    finally:
        _current.reset(token)
