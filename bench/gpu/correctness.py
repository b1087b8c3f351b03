"""The item that compares every kernel with fp64 at one real size for each head size, before anything is measured.

It calls tests of tests/gpu: what it finds they find again, in the second call, with everything else.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from bench.gpu.processes import ROOT
from bench.gpu.tests import own_implementations

if TYPE_CHECKING:
    from bench.gpu.worker import Run

FOLDER = ROOT / "tests" / "gpu"
# (file, test, op), the riskiest last: an illegal access ends the process with what is known by then.
CHECKS = (
    ("test_values", "test_rope_is_as_close_to_fp64_as_eager_code", "mm_rope"),
    ("test_values", "test_loss_is_as_close_to_fp64_as_the_official_way", "tube_masked_loss"),
    ("test_values", "test_draws_are_the_keys_and_confidence_their_probability", "masked_sample"),
    ("test_values", "test_attention_is_as_close_to_fp64_as_sdpa", "frame_attention"),
    ("test_values", "test_the_fused_backward_is_as_close_to_fp64_as_sdpa", "frame_attention"),
)


def find(run: Run) -> None:
    """Record {"checks": [{"test", "op", "impl", "size", "outcome", "seconds", "reason"}]}, check by check."""
    run["checks"] = []
    for name, call in checks(run):
        begin = time.perf_counter()
        outcome, reason = "passed", ""
        try:
            call()
        except Exception as error:  # also a kernel that does not compile: the other checks go on
            outcome, reason = "failed", "".join(traceback.format_exception_only(error))[-1500:]
            error.__traceback__ = None
        if run.device == "cuda":
            torch.cuda.synchronize()  # a lost device ends the item here
            torch.cuda.empty_cache()
        seconds = round(time.perf_counter() - begin, 2)
        run["checks"] = [*run["checks"], {**name, "outcome": outcome, "seconds": seconds, "reason": reason}]


def checks(run: Run) -> Iterator[tuple[dict[str, str], Callable[[], None]]]:
    """Yield (what is checked, the call that checks it)."""
    os.environ["LUMOS_GPU_TESTS"] = json.dumps({"device": run.device})
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    import gpu_examples

    modules = {file: _load(file) for file in {file for file, _, _ in CHECKS}}
    native = [(op, "reference") for _, _, op in CHECKS]
    able = native if run.dry_run else own_implementations()
    for file, test, op in CHECKS:
        for size in gpu_examples.sizes(run.device)[:2]:
            for impl in dict.fromkeys(impl for name, impl in able if name == op):
                known: dict[str, Any] = {"op": op, "impl": impl, "size": size, "device": run.device}
                function = getattr(modules[file], test)
                wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
                arguments = {name: {**known, "dtype": torch.bfloat16}[name] for name in wanted}
                named = {"test": test, "op": op, "impl": impl, "size": size.name}
                yield named, lambda function=function, arguments=arguments: function(**arguments)


def _load(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"gpu_{file}", FOLDER / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
