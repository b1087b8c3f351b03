"""The parts that run the whole model: training steps, the longest sequence, launches and host syncs, generation."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

import lumos
from bench import memory, timing
from bench.gpu.tests import gpu_implementations
from bench.official_style import official_style_loss
from lumos import Lumos, LumosConfig, mask_tokens
from lumos.tokens import VIDEO_START
from lumos_kernels import FrameLayout, dispatch
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.token_ids import MASK, NUMBER_BASE

# Dense bf16 peak of the data sheet, what MFU is a share of: "H100 80GB HBM3", "H200" and "A100-SXM4-80GB" name these.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}
TEXT = 262  # before the video start; 266 with what follows it
FRAMES_384P, FRAMES_256P = (48, 84), (32, 56)
PROMPT_TEXT = 64
NO_IMPL = "reference"


def implementations(device: str) -> dict[str, str]:
    """For every op the implementation that the model runs: the GPU's first that takes bf16, proven or not."""
    chosen = {}
    for name, op in dispatch.ops().items():
        problem = Problem.of(torch.empty(0, dtype=torch.bfloat16, device=device), 64)
        able = [
            impl for op_name, impl in gpu_implementations() if op_name == name and op.refusal(impl, problem) is None
        ]
        chosen[name] = "auto" if device == "cpu" else next(iter(able), NO_IMPL)
    return chosen


def model_config(dry_run: bool, **changes: Any) -> LumosConfig:
    """The 1B model; in a dry run a tiny one with few visual codes. changes: of its sizes."""
    config = LumosConfig.tiny() if dry_run else LumosConfig.lumos_1b()
    fewer = {"vocab_size": config.visual_start + 512} if dry_run else {}
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
        if model is None:
            torch.manual_seed(0)
            with torch.device(device):
                model = Lumos(config).to(torch.bfloat16).train()
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


def timed(step: Step, call: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Median seconds of a step, its share of the device's peak, and its peak memory beyond weights and states."""
    call()  # makes the optimizer's state and compiles
    clock = timing.clock_for(step.device)
    samples = timing.interleave({"step": call}, seconds, clock, min_rounds=2)["step"]
    median = statistics.median(samples)
    before, highest = memory.peak_of(call, step.device) or (None, None)
    peak = next(
        (v for name, v in PEAK_TFLOPS.items() if step.device == "cuda" and name in torch.cuda.get_device_name()), None
    )
    return {
        "seconds": median,
        "samples": len(samples),
        "tokens": step.tokens,
        "targets": step.targets,
        "useful_flops": step.flops,
        "TFLOP/s": step.flops / median / 1e12,
        "mfu": step.flops / median / 1e12 / peak if peak else None,
        "peak_bytes": highest,
        "extra_bytes": None if highest is None else highest - before,
    }


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the call returns, or {"failed": why}: out of memory is a finding, not an end."""
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


def training(run: Any) -> None:
    """Steps of the 1B model at 13,000 and 28,900 tokens, the longest that fits, then the official way."""
    config = model_config(run.dry_run)
    sizes = [((4, 8), 2), ((4, 8), 3)] if run.dry_run else [(FRAMES_256P, 7), (FRAMES_384P, 7)]
    each = 0.1 if run.dry_run else 2.0
    run.record["implementations"] = implementations(run.device)
    run.record["steps"] = {}
    model = None
    for grid, frames in sizes:
        step = Step(config, grid, frames, run.device, model=model)
        model = step.model
        found = run.record["steps"].setdefault(f"{step.tokens} tokens", {})
        found["ours"] = attempt(lambda step=step: timed(step, step, each))
        found["ours, forward and backward"] = attempt(lambda step=step: timed(step, step.backward, each))
        run.record.save()
    del step
    _longest(run, config, model)
    model.checkpoint_layers(0)
    for grid, frames in sizes:
        if run.left() < 5:
            break
        step = Step(config, grid, frames, run.device, model=model)
        found = run.record["steps"][f"{step.tokens} tokens"]
        found["losses"] = attempt(lambda step=step: _losses(step))
        found["official"] = attempt(lambda step=step: timed(step, lambda: step("official"), each / 4))
        run.record.save()


def _longest(run: Any, config: LumosConfig, model: Lumos) -> None:
    """Steps of more and more frames of 384p; layers are computed again in backward where they do not fit otherwise."""
    run.record["longest"] = []
    for frames, checkpointed in [(2, False), (3, True)] if run.dry_run else [(14, False), (22, True), (14, True)]:
        if run.left() < 5:
            break
        if frames in [found["frames"] for found in run.record["longest"] if "seconds" in found]:
            continue
        model.checkpoint_layers(int(checkpointed))
        step = Step(config, (4, 8) if run.dry_run else FRAMES_384P, frames, run.device, model=model)
        found = attempt(lambda step=step: timed(step, step, 0.1))
        note = {"frames": frames, "tokens": step.tokens, "checkpointed": checkpointed, **found}
        run.record["longest"] += [note]


def _losses(step: Step) -> dict[str, Any]:
    """Both losses on the same weights: in bf16 they agree to a few thousandths."""
    with torch.no_grad():
        ours, official = (float(step.loss(side)) for side in ("ours", "official"))
    agree = abs(ours - official) <= 2 * torch.finfo(torch.bfloat16).eps * abs(official)
    return {"ours": ours, "official": official, "agree": agree}


def launches(run: Any) -> None:
    """Kernels that a layer launches, and how often the host waits in a step: from models of two and four layers."""
    counts: dict[str, list[int]] = {"forward": [], "step": []}
    for layers in (2, 4):
        small = model_config(run.dry_run, num_hidden_layers=layers, vocab_size=65536 + 1024)
        step = Step(small, (4, 8) if run.dry_run else FRAMES_256P, 1, run.device)
        step.backward()
        counts["forward"].append(len(kernels(lambda step=step: step.loss(), run.device)))
        counts["step"].append(len(kernels(step.backward, run.device)))
        run.record[f"kernels of {layers} layers"] = {name: values[-1] for name, values in counts.items()}
    run.record["forward_per_layer"] = (counts["forward"][1] - counts["forward"][0]) / 2
    run.record["step_per_layer"] = (counts["step"][1] - counts["step"][0]) / 2
    run.record["by_name"] = Counter(kernels(step.backward, run.device)).most_common(40)
    run.record["host_syncs"] = attempt(lambda: host_syncs(step)) if run.device == "cuda" else None


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


def generation(run: Any) -> None:
    """One generated frame, then a whole 256p video if the time allows it: 50 steps with guidance."""
    if not hasattr(lumos, "generate_tokens"):
        run.record["result"] = "lumos has no generate_tokens yet"
        return
    config = model_config(run.dry_run)
    torch.manual_seed(0)
    with torch.device(run.device):
        model = Lumos(config).to(torch.bfloat16).eval()
    model.impl = implementations(run.device)
    grid, steps = ((4, 8), 2) if run.dry_run else (FRAMES_256P, 50)
    prompt = document(config, grid, 0, PROMPT_TEXT)[0, :-2]
    run.record["frames"] = {}
    for frames in (1, 7):
        spent = run.record["frames"].get("1", {}).get("seconds", 0.0)
        if 7 * spent > run.left():
            run.record["left_out"] = f"{frames} frames: {run.left():.0f} s are left, one frame took {spent:.1f} s"
            break
        found = attempt(lambda frames=frames: _generate(model, prompt, grid, frames, steps, run.device))
        run.record["frames"] = {**run.record["frames"], str(frames): found}


def _generate(model: Lumos, prompt: Tensor, grid: tuple[int, int], frames: int, steps: int, device: str) -> dict:
    options = {"grid": grid, "steps": steps, "guidance_scale": 15.0}
    lumos.generate_tokens(model, [prompt], frames=1, **{**options, "steps": 2})  # compiles
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    [ids] = lumos.generate_tokens(model, [prompt], frames=frames, **options)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    first, last = model.config.classes
    codes = int(((ids >= first) & (ids < last)).sum())
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "seconds": seconds,
        "steps": steps,
        "codes": codes,
        "complete": codes == frames * grid[0] * grid[1],
        "peak_bytes": peak,
    }
