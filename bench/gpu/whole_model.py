"""Items that train the whole model: steps, losses, the kernels of a step, launches and host syncs, the longest step."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from bench import memory, timing
from bench.gpu import profiles
from bench.gpu.tests import gpu_implementations
from bench.official_style import official_style_loss
from lumos import Lumos, LumosConfig, mask_tokens
from lumos.tokens import VIDEO_START
from lumos_kernels import FrameLayout, dispatch
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.token_ids import MASK, NUMBER_BASE

if TYPE_CHECKING:
    from bench.gpu.worker import Run

# Dense bf16 peak of the data sheet, what MFU is a share of: "H100 80GB HBM3", "H200" and "A100-SXM4-80GB" name these.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}
COUNTS = "three times the forward: attention's backward counts as 2 x its forward, in the op benchmark as 2.5 x"
TEXT = 262  # before the video start; 266 with what follows it
FRAMES_384P, FRAMES_256P = (48, 84), (32, 56)
NO_IMPL = "reference"


def implementations(device: str) -> dict[str, str]:
    """Return for every op the implementation that the model runs: the GPU's first that takes bf16."""
    chosen = {}
    for name, op in dispatch.ops().items():
        problem = Problem.of(torch.empty(0, dtype=torch.bfloat16, device=device), 64)
        able = [
            impl for op_name, impl in gpu_implementations() if op_name == name and op.refusal(impl, problem) is None
        ]
        chosen[name] = "auto" if device == "cpu" else next(iter(able), NO_IMPL)
    return chosen


def model_config(dry_run: bool, **changes: Any) -> LumosConfig:
    """Return the 1B model's sizes; in a dry run those of a tiny one with few visual codes. changes: of its sizes."""
    config = LumosConfig.tiny() if dry_run else LumosConfig.lumos_1b()
    fewer = {"vocab_size": config.visual_start + 512, "num_hidden_layers": 2} if dry_run else {}
    return LumosConfig.from_dict({**config.to_dict(), **fewer, **changes})


def document(config: LumosConfig, grid: tuple[int, int], frames: int, text: int = TEXT) -> Tensor:
    """int64 [1, L]: text, video start, seconds, frames per second, frames of random codes, video end, end of turn."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(1, 8000, (text - 1,), generator=generator)
    head = torch.tensor([8710, VIDEO_START, NUMBER_BASE + 2, NUMBER_BASE + 12])
    ids = torch.cat([torch.tensor([0]), prompt, head, *[frame_skeleton(*grid)] * frames, torch.tensor([9005, 8710])])
    codes = torch.randint(*config.classes, ids.shape, generator=generator)
    return torch.where(ids == MASK, codes, ids)[None]


class Step:
    """A model in bf16 with a fused AdamW, and a masked batch of one document on the device.

    The masks, the layout and the target rows are made before, as the data path makes them.
    """

    def __init__(
        self,
        config: LumosConfig,
        grid: tuple[int, int],
        frames: int,
        device: str,
        impl: Mapping[str, str] | None = None,
        model: Lumos | None = None,
    ) -> None:
        self.device, self.config = device, config
        model = model or new_model(config, device)
        self.model = model
        self.model.impl = impl or implementations(device)
        batch = mask_tokens(document(config, grid, frames), seeds=[0], classes=config.classes)
        layout = FrameLayout.from_tokens(batch.input_ids)
        self.tokens, self.targets = layout.num_tokens, batch.num_targets
        self.flops = config.training_flops(layout, batch.num_targets)
        self.batch, self.layout = batch.to(device), layout.to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=device == "cuda")

    def loss(self, side: str = "ours") -> Tensor:
        batch = self.batch
        if side == "official":
            return official_style_loss(self.model, batch.input_ids, batch.labels)
        return self.model(batch.input_ids, labels=batch.labels, layout=self.layout, rows=batch.rows).loss

    def backward(self, side: str = "ours") -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(side).backward()

    def __call__(self, side: str = "ours") -> None:
        self.backward(side)
        self.optimizer.step()


def timed(step: Step, call: Callable[[], None], seconds: float, note: Callable[[dict[str, Any]], None]) -> None:
    """Time steps for about so many seconds, at least one behind the warm-up, and note the figures after each of them.

    The figures are the median seconds, the share of the device's peak, and the peak memory of the second call.
    """
    clock, begin = timing.clock_for(step.device), time.perf_counter()
    note({**figures(step, [clock(call, 1)], None, None), "warm_up": True})  # compiles, makes the optimizer's state
    samples: list[float] = []
    before, highest = memory.peak_of(lambda: samples.append(clock(call, 1)), step.device) or (None, None)
    note(figures(step, samples, before, highest))
    while time.perf_counter() - begin < seconds:
        samples.append(clock(call, 1))
        note(figures(step, samples, before, highest))


def figures(step: Step, samples: Sequence[float], before: int | None, highest: int | None) -> dict[str, Any]:
    """Return what a result says of steps that took so long. before, highest: bytes without the step, and in it."""
    median = statistics.median(samples)
    name = torch.cuda.get_device_name() if step.device == "cuda" else ""
    peak = next((value for device, value in PEAK_TFLOPS.items() if device in name), None)
    return {
        "seconds": median,
        "samples": len(samples),
        "tokens": step.tokens,
        "targets": step.targets,
        "useful_flops": step.flops,
        "TFLOP/s": step.flops / median / 1e12,
        "mfu": step.flops / median / 1e12 / peak if peak else None,
        "counts": COUNTS,
        "peak_bytes": highest,
        "extra_bytes": None if highest is None else highest - before,
    }


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what the call returns, or {"failed": why}: out of memory is a finding, not an end."""
    try:
        return call()
    except (RuntimeError, ValueError, AssertionError) as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a lost device ends the part here, with what is on file
        return {"failed": text}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shared_step(run: Run, grid: tuple[int, int], frames: int) -> Step:
    """Return a step of the 1B model, with the weights of the items before where there are some."""
    model = shared_model(run)
    model.checkpoint_layers(0)
    return Step(model.config, grid, frames, run.device, model=model)


def shared_model(run: Run) -> Lumos:
    """Return the 1B model in bf16, made by the first item of a process that needs it."""
    if "model" not in run.shared:
        run.shared["model"] = new_model(model_config(run.dry_run), run.device)
    return run.shared["model"]


def new_model(config: LumosConfig, device: str) -> Lumos:
    torch.manual_seed(0)
    with torch.device(device):
        return Lumos(config).to(torch.bfloat16).train()


def sizes(dry_run: bool) -> list[tuple[tuple[int, int], int]]:
    """Return grid and frames of the published batches: 13,064 and 28,856 tokens."""
    return [((4, 8), 2), ((4, 8), 3)] if dry_run else [(FRAMES_256P, 7), (FRAMES_384P, 7)]


def _time(run: Run, key: str, step: Step, call: Callable[[], None]) -> None:
    """Record the figures of a call under `key`, or why it failed."""

    def note(found: dict[str, Any]) -> None:
        run[key] = found

    failed = attempt(lambda: timed(step, call, 0.05 if run.dry_run else 3.0, note) or {})
    run.data.setdefault(key, {}).update(failed)
    run.save()


def step_finder(size: int) -> Callable[[Run], None]:
    """Return what an item does for a batch: steps of the model, then forward and backward without the optimizer."""

    def find(run: Run) -> None:
        step = shared_step(run, *sizes(run.dry_run)[size])
        run["implementations"] = step.model.impl
        _time(run, "ours", step, step)
        _time(run, "ours, forward and backward", step, step.backward)

    return find


def losses(run: Run) -> None:
    """Record both losses of the smaller batch, ours and the official style's."""
    step = shared_step(run, *sizes(run.dry_run)[0])
    run["tokens"] = step.tokens
    run["losses"] = attempt(lambda: _losses(step))


def kernel_table(run: Run) -> None:
    """Record the kernels of one step of the larger batch, the longest first, and where the host waits in it."""
    step = shared_step(run, *sizes(run.dry_run)[-1])
    step()
    run["tokens"] = step.tokens
    run["kernels"] = profiles.table(step, run.device, top=40)
    run["host_syncs"] = attempt(lambda: host_syncs(step)) if run.device == "cuda" else None


def official_step(run: Run) -> None:
    """Record a step of the larger batch in the official style."""
    step = shared_step(run, *sizes(run.dry_run)[-1])
    run["tokens"] = step.tokens
    _time(run, "official", step, lambda: step("official"))


def longest(run: Run) -> None:
    """Record one step of 90,116 tokens whose layers are computed again in backward. It is on file phase by phase."""
    step = shared_step(run, *(((4, 8), 3) if run.dry_run else (FRAMES_384P, 22)))
    step.model.checkpoint_layers(1)
    run["tokens"], run["checkpointed"] = step.tokens, True
    run["phases"] = {}
    run["step"] = attempt(lambda: _in_phases(run, step))


def _in_phases(run: Run, step: Step) -> dict[str, Any]:
    start = time.perf_counter()
    if step.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if step.device == "cuda" else None

    def done(phase: str) -> None:
        if step.device == "cuda":
            torch.cuda.synchronize()
        run["phases"] = {**run["phases"], phase: time.perf_counter() - start}

    loss = step.loss()
    done("forward")
    loss.backward()
    done("backward")
    step.optimizer.step()
    done("optimizer")
    highest = torch.cuda.max_memory_allocated() if step.device == "cuda" else None
    return figures(step, [time.perf_counter() - start], before, highest)


def _losses(step: Step) -> dict[str, Any]:
    """Both losses on the same weights: in bf16 they agree to a few thousandths."""
    with torch.no_grad():
        ours, official = (float(step.loss(side)) for side in ("ours", "official"))
    agree = abs(ours - official) <= 2 * torch.finfo(torch.bfloat16).eps * abs(official)
    return {"ours": ours, "official": official, "agree": agree}


def launches(run: Run) -> None:
    """Record how many kernels a layer launches: the difference between models of four and of two layers."""
    counts: dict[str, list[int]] = {"forward": [], "step": []}
    for layers in (2, 4):
        small = model_config(run.dry_run, num_hidden_layers=layers, vocab_size=65536 + 1024)
        step = Step(small, (4, 8) if run.dry_run else FRAMES_256P, 1, run.device)
        step.backward()
        counts["forward"].append(len(kernels(lambda step=step: step.loss(), run.device)))
        counts["step"].append(len(kernels(step.backward, run.device)))
    run["forward_per_layer"] = (counts["forward"][1] - counts["forward"][0]) / 2
    run["step_per_layer"] = (counts["step"][1] - counts["step"][0]) / 2
    run["by_name"] = Counter(kernels(step.backward, run.device)).most_common(40)


def kernels(call: Callable[[], Any], device: str) -> list[str]:
    """Names of the kernels that a call launches; on a CPU, of the operators it calls."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    wanted = torch.autograd.DeviceType.CUDA if device == "cuda" else torch.autograd.DeviceType.CPU
    names = [event.name for event in profile.events() if event.device_type == wanted]
    return [name for name in names if not name.startswith(("Memcpy", "Memset", "cuda"))]


def host_syncs(step: Step) -> dict[str, Any]:
    """Where the host waits for the device in forward and backward of a step."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return {"count": len(where), "where": Counter(where).most_common(10)}
