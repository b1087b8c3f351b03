"""An op that pretends to have a GPU implementation: what the tests of the self-check choose.

y = x * x, with the implementations "fast" (the GPU's, which needs a self-check) and "reference". The problem says that
it is on a GPU, and the examples lie on the CPU. Run as a script, it chooses once and prints how often it checked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lumos_kernels import battery, dispatch, self_check
from lumos_kernels.dispatch import Problem
from lumos_kernels.examples import Change, Draw, Example, Values, spoiled

NAME, PACKAGE = "pretend", "pretend_op"
ON_GPU = Problem("cuda", torch.float32, None, "sm_90", 0)
MACHINE = {"gpu": "Pretend", "arch": "sm_90", "driver": "1.0"}
TITLE = "pretend fast float32 - deterministic"


class PretendExample(Example):
    def outputs(self, impl: str, args: Mapping[str, Any]) -> Values:
        return {"y": sys.modules[f"{PACKAGE}.{impl}"].forward(args["x"])}

    def changes(self) -> Iterator[Change]:
        first, last = slice(0, 8), slice(8, None)
        yield Change("later rows", self, self.replace(x=spoiled(self.args["x"], last)), {"y": first, "dx": first})


def examples(dtype: torch.dtype, head_dim: int, device: torch.device) -> Iterator[PretendExample]:
    draw = Draw(0, dtype, device)
    yield PretendExample("some", {"x": draw.normal(16, 3)}, ("x",), {"y": draw.normal(16, 3)})


def square(x: Tensor) -> Tensor:
    return x * x


def modules() -> dict[str, ModuleType]:
    """The modules of the op by name: both implementations are right."""
    found = {name: ModuleType(f"{PACKAGE}.{name}") for name in ("fast", "reference", "examples")}
    found["fast"].forward = found["reference"].forward = square
    found["examples"].examples = examples
    return {f"{PACKAGE}.{name}": module for name, module in found.items()}


def register() -> dispatch.Op:
    return dispatch.register(
        NAME,
        PACKAGE,
        {
            "fast": lambda problem: None if problem.device == "cuda" else f"runs CUDA tensors, not {problem.device}",
            "reference": dispatch.runs_anywhere,
        },
    )


def main() -> None:
    sys.modules.update(modules())
    examine, checks = battery.examine, []

    def slow(subject: Any, **options: Any) -> Any:
        checks.append(subject)
        time.sleep(1.0)
        return examine(subject, **options)

    with (
        mock.patch.object(battery, "examine", slow),
        mock.patch.object(self_check, "machine", return_value=MACHINE),
        mock.patch.object(self_check, "device_of", return_value=torch.device("cpu")),
    ):
        chosen = register().choose("auto", ON_GPU)
    print(chosen.__name__.split(".")[1], len(checks))


if __name__ == "__main__":
    main()
