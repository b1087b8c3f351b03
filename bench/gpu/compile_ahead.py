"""Compiles the Triton kernels in many processes before the first of them is launched.

    python -m bench.gpu.compile_ahead     compiles everything into an empty cache, prints the seconds, predicts call 1

The calls are those of tests/compile_triton.py, attention in each configuration that the tuner tries, and what the
self-checks run: small inputs of unusual strides have variants of their own. The launches are intercepted: a process
that has not touched the GPU compiles for it, and Triton's cache on disk serves the others.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

from bench import timing
from bench.gpu.processes import ROOT, write_json
from bench.shapes import M1B, M3B
from lumos_kernels.env import cpu_model

if TYPE_CHECKING:
    from bench.gpu.worker import Run

PROCESSES = 12
START_SECONDS = 7.0  # of a process that imports torch and touches CUDA
ARCH = 90  # of the H100 and the H200
CANDIDATES = 5  # configurations of a kernel that the tuner tries, the default among them
TOKENS = 304
SKETCH = ("mm_rope forward D=64", "masked_sample guided")  # what a dry run compiles: seconds on any machine


class Subject(NamedTuple):
    """A call whose kernels are compiled."""

    name: str
    call: Callable[[], object]


def subjects() -> list[Subject]:
    """Return what is compiled, the slowest to compile first."""
    harness = _harness()
    others = [Subject(case.name, case.call) for cases in harness.CASES for case in cases()]
    others += self_check_subjects()
    return [*tuned_subjects(), *sorted(others, key=lambda subject: "attention" not in subject.name)]


def tuned_subjects(count: int = CANDIDATES) -> Iterator[Subject]:
    """Yield attention at the head sizes of the models in each configuration that the tuner tries."""
    from lumos_kernels.frame_attention.triton import tune

    for model in (M1B, M3B):
        for kernel, configs in tune.vetted(f"sm_{ARCH}", model.head_dim).items():
            for config in configs[:count]:
                name = f"frame_attention {kernel} D={model.head_dim} {tuple(vars(config).values())}"
                yield Subject(name, functools.partial(_attention, kernel, model, config))


def _attention(kernel: str, model: Any, config: Any) -> None:
    """Call the host function that launches the kernel, with its gradients as a training step has them."""
    from lumos_kernels import RowLimits
    from lumos_kernels.frame_attention import triton
    from lumos_kernels.frame_attention.contract import Inputs, OutputGradients, Outputs

    heads, kv_heads = model.heads, model.kv_heads
    qkv = torch.empty(TOKENS, heads + 2 * kv_heads, model.head_dim, dtype=torch.bfloat16)
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    limits = RowLimits(*(torch.zeros(TOKENS, dtype=torch.int32) for _ in range(4)))
    inputs = Inputs(q, k, v, limits, model.head_dim**-0.5)
    if kernel == "forward":
        triton.forward_with(config, inputs)
        return
    o, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(heads, TOKENS)
    outputs, grad = Outputs(o, lse), OutputGradients(torch.empty_like(o), None)
    if kernel == "fused":
        triton.backward_fused(inputs, outputs, grad, config=config)
    else:
        triton.backward_deterministic(inputs, outputs, grad, **{kernel: config})


def self_check_subjects() -> Iterator[Subject]:
    """Yield every example of the self-checks at the head sizes of the models."""
    from bench.gpu.tests import own_implementations
    from lumos_kernels import dispatch, examples

    cpu = torch.device("cpu")
    with timing.torch_threads(1):  # a process that is forked beside a pool of threads may hang
        for name, impl in own_implementations():
            op = dispatch.ops()[name]
            for head_dim in (M1B.head_dim, M3B.head_dim) if examples.head_dims(op) else (None,):
                for kind in examples.kinds(op, impl):
                    for one in examples.examples(op, torch.bfloat16, head_dim, cpu, kind):
                        called = f"self-check {name} {impl} D={head_dim} {kind}: {one.name}"
                        yield Subject(called, functools.partial(_example, one.fitted(impl, int64=False), impl))


def _example(example: Any, impl: str) -> None:
    """Run an example of a self-check, although its tensors lie on the CPU, which the implementation refuses."""
    from lumos_kernels.dispatch import Op

    refusal = Op.refusal

    def accepted(self: Any, name: str, problem: Any) -> str | None:
        return None if name == impl else refusal(self, name, problem)

    with mock.patch.object(Op, "refusal", accepted):
        example.run(impl)


def _harness() -> Any:
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    import compile_triton

    return compile_triton


def compile_one(number: int, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Compile a subject in this process. Return {"name", "seconds", "kernels", "failed"}."""
    torch.set_num_threads(1)
    name, call = chosen_subjects(names)[number]
    begin = time.perf_counter()
    try:
        kernels = _compiled(call)
        for kernel in kernels:
            _build_launcher(kernel)
    except Exception as error:  # a configuration that ptxas refuses: the tuner and the tests will say so too
        return {"name": name, "seconds": time.perf_counter() - begin, "kernels": 0, "failed": str(error)[:300]}
    return {"name": name, "seconds": time.perf_counter() - begin, "kernels": len(kernels), "failed": None}


def _compiled(call: Callable[[], object]) -> list[Any]:
    """Return the kernels that the call would launch, compiled for the GPU. They are in Triton's cache now."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, original = [], JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: Any, **options: Any) -> Any:
        kernels.append(original(self, *args, grid=grid, warmup=True, **options))
        return kernels[-1]

    driver.set_active(_harness().AbsentGpu(ARCH))
    with mock.patch.object(JITFunction, "run", compile_only):
        call()
    return kernels


def _build_launcher(kernel: Any) -> None:
    """Build what triton < 3.7 compiles at a kernel's first launch. Later versions have one launcher for all."""
    with contextlib.suppress(Exception):  # no CUDA headers or no libcuda: the first launch says so, or needs none
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)


@functools.cache
def _all_subjects() -> list[Subject]:
    return subjects()


def chosen_subjects(names: Sequence[str] | None) -> list[Subject]:
    return [subject for subject in _all_subjects() if names is None or subject.name in names]


class Compilation:
    """Compilations under way in processes that were forked from this one, which must not have touched CUDA yet."""

    def __init__(self, processes: int, names: Sequence[str] | None = None) -> None:
        if torch.cuda.is_initialized():
            raise RuntimeError("the processes that compile must be forked before CUDA is initialised")
        count = len(chosen_subjects(names))
        self.begin = time.monotonic()
        self.pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork"))
        self.futures: list[Future] = [self.pool.submit(compile_one, number, names) for number in range(count)]

    def finish(self, seconds: float) -> dict[str, Any]:
        """Return what was compiled within the time. What was not is left to whoever launches it."""
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end and not all(future.done() for future in self.futures):
                time.sleep(0.1)
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)
            if not all(future.done() for future in self.futures):
                for process in multiprocessing.active_children():  # or this process would wait for them at its end
                    process.kill()
        done = [f.result() for f in self.futures if f.done() and not f.cancelled() and f.exception() is None]
        return {
            "subjects": len(self.futures),
            "done": len(done),
            "wall_s": round(time.monotonic() - self.begin, 1),
            "cpu_s": round(sum(one["seconds"] for one in done), 1),
            "longest_s": round(max((one["seconds"] for one in done), default=0.0), 1),
            "failed": {one["name"]: one["failed"] for one in done if one["failed"]},
            "each": {one["name"]: round(one["seconds"], 2) for one in done},
        }


def start(run: Run) -> None:
    """Start the compilations beside the items that follow."""
    names = SKETCH if run.dry_run else None
    processes = min(2 if run.dry_run else PROCESSES, os.cpu_count() or 1)
    run.shared["compilation"] = Compilation(processes, names)
    run["processes"], run["subjects"] = processes, len(run.shared["compilation"].futures)


def finish(run: Run) -> None:
    """Wait for the compilations and record their seconds."""
    compilation = run.shared.pop("compilation", None)
    if compilation is None:  # this process was started anew behind them
        run["result"] = "the process that compiled is gone"
        return
    for key, value in compilation.finish(run.left() - 1).items():
        run[key] = value


def predict(found: dict[str, Any], processes: int = PROCESSES) -> float:
    """Return the seconds that as many processes need for what was measured in fewer: all at work, or the longest."""
    return max(found["cpu_s"] / processes, found["longest_s"])


def predicted_call(compilation: float) -> dict[str, float]:
    """Return the predicted seconds of call 1, process by process: the shares of its items, and of the compilations what
    remains when the machine is described.
    """
    from bench.gpu import stages

    names = {}
    for stage in ("prepare", "measure"):
        shares = {item.name: item.seconds for item in stages.ITEMS[stage](False)}
        if "compiled" in shares:
            shares["compiled"] = max(0.0, compilation - shares["machine"] - shares["ceilings"])
        names[stage] = round(START_SECONDS + sum(shares.values()), 1)
    return {**names, "call 1": round(sum(names.values()), 1)}


def measure(jobs: int) -> dict[str, Any]:
    """Compile everything into an empty cache and return the seconds."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}):
        return Compilation(jobs).finish(3600)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="JSON file for the seconds and the prediction")
    options = parser.parse_args(arguments)
    found = measure(options.jobs)
    for name, seconds in sorted(found["each"].items(), key=lambda pair: -pair[1]):
        print(f"{seconds:7.2f} s  {name}")
    compilation = predict(found)
    predicted = {f"compilation in {PROCESSES} processes": round(compilation, 1), **predicted_call(compilation)}
    print(f"{found['done']} calls in {options.jobs} processes: {found['wall_s']} s, together {found['cpu_s']} s;")
    print(f"refused: {', '.join(found['failed']) or 'none'}; predicted seconds: {predicted}")
    if options.out:
        environment = {"cpu": cpu_model(), "triton": triton_version(), "jobs": options.jobs}
        write_json(options.out, {**environment, **found, "predicted_s": predicted})


def triton_version() -> str:
    return importlib.metadata.version("triton")


if __name__ == "__main__":
    main()
