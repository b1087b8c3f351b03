"""Small problems on which an implementation is compared with its reference on the user's own machine.

Each op has a module examples with its own class of Example and a function `examples`. The self-check behind "auto"
(self_check.py) and `python -m lumos_kernels.check` run them. Their sizes and lowered limits are chosen to reach what
large problems reach: whole and partial tiles, ragged tails, rows without work, groups of heads, slices of fused
projections, several chunks.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import limits
from .dispatch import Op
from .layout import RowLimits
from .limits import Limits

DETERMINISTIC = "deterministic"  # the kind of backward that gives the same bits every time
LARGE = 300.0  # finite in every dtype, and no rounding could hide it

Values = dict[str, Tensor]  # outputs by name, gradients as "d" and the name of the argument


class Change(NamedTuple):
    """A change of the arguments that must not reach certain results.

    before, after: the examples without and with the change.
    unaffected: result -> index of the elements that must be the same in both, bit for bit.
    """

    name: str
    before: Example
    after: Example
    unaffected: Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """Arguments of an op's public function, and the gradients that arrive at its outputs.

    leaves: names of the arguments that get a gradient. upstream: name of an output -> its gradient.
    kind: the kind of backward that runs. lowered: limits under which the example runs.
    """

    name: str
    args: Mapping[str, Any]
    leaves: tuple[str, ...] = ()
    upstream: Mapping[str, Tensor] = field(default_factory=dict)
    kind: str = DETERMINISTIC
    lowered: Limits = limits.USUAL

    # Results whose rows are sums without cancellation: the relative error of their rows is much the same everywhere.
    even: ClassVar[tuple[str, ...]] = ()

    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        """Return the outputs of the public function by name, differentiable in the leaves."""
        raise NotImplementedError

    def eager(self) -> Values:
        """Return the results of the same mathematics in PyTorch, rounded where the kernels round."""
        return self.run("reference")

    def changes(self) -> Iterator[Change]:
        """Yield changes that must not reach certain results."""
        yield from ()

    def run(self, impl: str) -> Values:
        """Return the outputs and the gradients of the leaves."""
        # The limits hold for this thread, so the backward pass has to stay in it.
        with limits.lowered(self.lowered), torch.autograd.set_multithreading_enabled(False):
            return self._run(impl)

    def _run(self, impl: str) -> Values:
        args = {
            name: value.detach().requires_grad_() if name in self.leaves else value for name, value in self.args.items()
        }
        with torch.enable_grad():
            outputs = self.outputs(impl, args)
        found = {name: value.detach() for name, value in outputs.items()}
        if self.leaves:
            arrived = list(self.upstream.values())
            gradients = torch.autograd.grad(
                [outputs[name] for name in self.upstream], [args[name] for name in self.leaves], arrived
            )
            found |= {f"d{name}": value for name, value in zip(self.leaves, gradients, strict=True)}
        return found

    def judged(self, found: Values, eager: Values, exact: Values) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield (name, result, eager result, exact result) for each result that has a tolerance."""
        for name, value in found.items():
            if value.is_floating_point():
                yield name, value, eager[name], exact[name]

    def exact(self) -> Values:
        """Return the reference's results in fp64 on the same (rounded) arguments."""

        def wide(values: Mapping[str, Any]) -> dict[str, Any]:
            floats = {n: x.double() for n, x in values.items() if isinstance(x, Tensor) and x.is_floating_point()}
            return {**values, **floats}

        return dataclasses.replace(self, args=wide(self.args), upstream=wide(self.upstream), kind=DETERMINISTIC).run(
            "reference"
        )

    def fitted(self, impl: str, int64: bool) -> Any:
        """Return the example as an implementation runs it, without forced int64 offsets unless `int64`."""
        return dataclasses.replace(self, lowered=self.lowered._replace(int64=self.lowered.int64 and int64))

    def on(self, device: torch.device) -> Example:
        """Return the example with its tensors on a device."""

        def moved(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: _moved(value, device) for name, value in values.items()}

        return dataclasses.replace(self, args=moved(self.args), upstream=moved(self.upstream))

    def replace(self, upstream: Mapping[str, Tensor] | None = None, **args: Any) -> Any:
        """Return the example with other arguments, or with other gradients that arrive."""
        given = self.upstream if upstream is None else upstream
        return dataclasses.replace(self, args={**self.args, **args}, upstream=given)


class Draw:
    """Random tensors that do not depend on any setting of the process, and leave its generators alone."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.dtype, self.device = dtype, device

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Return normal variates in the dtype and on the device of the draw."""
        values = torch.randn(shape, generator=self.generator, dtype=torch.float32, device="cpu")
        return (mean + std * values).to(self.device, self.dtype)

    def signs(self, *shape: int) -> Tensor:
        """Return 0.25 and -0.25. Sums of products of them are exact in every order and precision."""
        return self.integers(0, 2, *shape).sub(0.5).mul(0.5).to(self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Return int64 in [low, high) on the device of the draw."""
        values = torch.randint(low, high, shape, generator=self.generator, dtype=torch.int64, device="cpu")
        return values.to(self.device)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor | RowLimits) else value


def spoiled(x: Tensor, rows: slice | Tensor) -> Tensor:
    """Return a copy whose rows hold large finite values of both signs."""
    x = x.clone()
    count = x[rows].numel()
    sign = torch.where(torch.arange(count, device=x.device) % 2 == 0, LARGE, -LARGE)
    x[rows] = sign.to(x.dtype).view(x[rows].shape)
    return x


# Distances of the columns that tie: in a line of four, in a block, and in blocks of 2,048, 4,096 and others.
TIES = ((0, 1), (5, 95), (8, 8 + 2_048), (13, 17 + 4_096), (22, 5_000))


def tie(draw: Draw, hidden: Sequence[Tensor], weight: Tensor) -> None:
    """Make the largest logits of the first rows of hidden[0] @ weight.T exactly equal, those of a pair of TIES each.

    The first rows of the other hidden states become zero.
    """
    for row, pair in enumerate(TIES):
        pattern = draw.signs(weight.shape[1])
        weight[list(pair)] = pattern
        hidden[0][row] = 4 * pattern
        for other in hidden[1:]:
            other[row] = 0


def first_of_ties(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows have two equal largest logits that carry no rounding, and the first column of the largest."""
    top, columns = high.topk(min(2, high.shape[1]))
    rounded = (low.gather(1, columns) - top).abs().amax(1)
    return (top[:, 0] == top[:, -1]) & (rounded == 0) & (high.shape[1] > 1), high.argmax(1)


def kinds(op: Op[Any], impl: str) -> tuple[str, ...]:
    """Return the kinds of backward that an implementation has, the one that is always there first."""
    listed = getattr(_module(op), "KINDS", {})
    return tuple(listed.get(impl, (DETERMINISTIC,)))


def head_dims(op: Op[Any]) -> tuple[int, ...]:
    """Return the head sizes at which the op is examined, () where its problems have none."""
    return tuple(getattr(_module(op), "HEAD_DIMS", ()))


def examples(
    op: Op[Any], dtype: torch.dtype, head_dim: int | None, device: torch.device, kind: str = DETERMINISTIC
) -> list[Example]:
    """Return the op's examples for a dtype, a head size and a kind of backward."""
    return [dataclasses.replace(example, kind=kind) for example in _module(op).examples(dtype, head_dim or 64, device)]


def _module(op: Op[Any]) -> Any:
    return importlib.import_module(f"{op.package}.examples")
