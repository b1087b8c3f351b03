"""The demo's last part: the trained model continues its clips from their first picture, beside what really follows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lumos import Lumos
from lumos.codec import DctCodec
from lumos.pipelines import Pipeline, Request
from lumos.tokens import ByteTokenizer
from lumos.video import read_video, to_float, to_uint8, write_video

STEPS, GUIDANCE = 16, 1.0
GAP = 4  # pixels between the columns of the GIF


@dataclass(frozen=True)
class Continuation:
    """A clip and its continuation, each uint8 [F, H, W, 3].

    original: as filmed; decoded: through the codec; generated: the first picture given, the rest by the model.
    accuracy: for each generated latent frame, the share of codes equal to the clip's. still: the same for a video that
        stands still at its first picture, which is what moving has to beat.
    motion: mean absolute difference between neighbouring pictures, 0..255, of decoded and generated.
    psnr, psnr_still: decibels of generated, and of standing still, against decoded, after the given picture.
    """

    name: str
    original: Tensor
    decoded: Tensor
    generated: Tensor
    accuracy: list[float]
    still: list[float]
    motion: tuple[float, float]
    psnr: float
    psnr_still: float


def continue_clips(
    checkpoint: str | Path,
    clips: dict[str, Path],
    captions: dict[str, str],
    size: tuple[int, int],
    fps: int,
    seconds: int,
) -> tuple[list[Continuation], float]:
    """Continues every clip's first window from its first picture; also the seconds that sampling took."""
    pipeline = Pipeline(Lumos.from_pretrained(checkpoint), ByteTokenizer(), DctCodec(), template="plain")
    originals = {name: read_video(path, fps, seconds=seconds, size=size) for name, path in clips.items()}
    requests = [Request(captions[name], size, fps, seconds, given=pictures[:1]) for name, pictures in originals.items()]
    begin = time.perf_counter()
    results = pipeline(requests, steps=STEPS, guidance_scale=GUIDANCE, greedy=True, documents_per_pass=len(requests))
    took = time.perf_counter() - begin
    return [_compare(name, originals[name], r.codes, r.pictures) for name, r in zip(clips, results, strict=True)], took


def _compare(name: str, original: Tensor, codes: Tensor, generated: Tensor) -> Continuation:
    codec = DctCodec()
    true = codec.encode(to_float(original))
    decoded = to_uint8(codec.decode(true))[: len(original)]
    # Standing still: the same picture all along, as the codec writes it.
    still = codec.encode(to_float(original[:1].expand_as(original).contiguous()))
    pictures = to_uint8(codec.decode(still))[: len(original)]
    return Continuation(
        name,
        original,
        decoded,
        generated,
        accuracy=[float((a == b).float().mean()) for a, b in zip(codes[1:], true[1:], strict=True)],
        still=[float((a == b).float().mean()) for a, b in zip(still[1:], true[1:], strict=True)],
        motion=(_motion(decoded), _motion(generated)),
        psnr=_psnr(generated[1:], decoded[1:]),
        psnr_still=_psnr(pictures[1:], decoded[1:]),
    )


def _motion(pictures: Tensor) -> float:
    return float(pictures.float().diff(dim=0).abs().mean())


def _psnr(pictures: Tensor, target: Tensor) -> float:
    error = (pictures.float() - target.float()).square().mean()
    return float(10 * torch.log10(255**2 / error.clamp_min(1e-9)))


def write_gif(path: Path, continuations: Sequence[Continuation], fps: int) -> None:
    """Three columns (original, codec, generated), a row a clip, twice the size."""
    rows = []
    for clip in continuations:
        columns = [clip.original, clip.decoded, clip.generated]
        gap = torch.full((*clip.original.shape[:2], GAP, 3), 255, dtype=torch.uint8)
        rows.append(torch.cat([part for column in columns for part in (column, gap)][:-1], 2))
    pictures = torch.cat(rows, 1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    write_video(path, pictures, fps)


def plot(path: Path, continuations: Sequence[Continuation]) -> None:
    """original, codec and generated, picture by picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 * 3 * len(continuations)), layout="constrained")
    rows = figure.subplots(3 * len(continuations), 6, squeeze=False)
    for number, clip in enumerate(continuations):
        picked = torch.linspace(0, len(clip.original) - 1, 6).round().long().tolist()
        columns = (("original", clip.original), ("codec", clip.decoded), ("generated", clip.generated))
        for row, (label, pictures) in zip(rows[3 * number :], columns, strict=False):
            for axes, at in zip(row, picked, strict=True):
                axes.imshow(pictures[at].numpy())
                axes.set(xticks=[], yticks=[])
                if label == "original":
                    axes.set_title(f"{clip.name}, picture {at}" + (" (given)" if at == 0 else ""), fontsize=7)
            row[0].set_ylabel(label, fontsize=8)
    figure.savefig(path, dpi=90)


def report_lines(continuations: Sequence[Continuation], seconds: float) -> list[str]:
    """Markdown: the pictures, and how far from the clips they are."""
    frames = range(1, 1 + len(continuations[0].accuracy))
    lines = [
        "## Continued from the first picture",
        "",
        "![original, codec, generated](continuation.gif)",
        "",
        "Left the clip, in the middle what its codes decode to, right the model's continuation of the first picture "
        f"(a clip it was trained on; greedy, {STEPS} steps a frame, guidance {GUIDANCE:g}, all clips in one batch, "
        f"{seconds:.1f} s). [Picture by picture](continuation.png).",
        "",
        "Share of codes equal to the clip's, in brackets for a video that stands still at its first picture; PSNR "
        "against the middle column after the given picture; motion: mean change between neighbouring pictures, of 255.",
        "",
        "| clip | " + " | ".join(f"frame {n}" for n in frames) + " | PSNR (still) | motion, clip | motion, generated |",
        "|---|" + "---:|" * (len(frames) + 3),
    ]
    for clip in continuations:
        shares = [f"{100 * a:.0f} % ({100 * b:.0f} %)" for a, b in zip(clip.accuracy, clip.still, strict=True)]
        lines.append(
            f"| {clip.name} | " + " | ".join(shares) + f" | {clip.psnr:.1f} ({clip.psnr_still:.1f}) dB "
            f"| {clip.motion[0]:.1f} | {clip.motion[1]:.1f} |"
        )
    return [*lines, ""]
