"""masked_sample: a guided draw for every slot of a frame, against the official way and what plain torch can do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import formulas
from bench.formulas import Work
from bench.registry import CEILING, Case, Contestant, Inputs, OpBench
from bench.shapes import IMAGE_256P, IMAGE_384P, M1B, M1B_QUARTER, SMOKE, TINY
from lumos_kernels import masked_sample
from lumos_kernels.token_ids import VISUAL_CLASSES

SMOKE_CLASSES = (192, 512)  # with a vocabulary of 512
GUIDANCE = 15.0
GROUP = 4  # classes of equal weights
CHUNK_ROWS = 256  # 66 MB of fp32 logits a chunk and branch


def build(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Rows that agree with one group of classes, which share its probability: contestants that draw with different
    random numbers still have to find that group and the confidence 1 / GROUP.
    """
    generator = torch.Generator().manual_seed(0)
    rows, width = rows_of(case), case.model.hidden
    first, last = case.options.get("classes", VISUAL_CLASSES)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def stored(values: Tensor) -> Tensor:
        return values.to(case.dtype).to(device=device, dtype=dtype)

    groups = normal((last - first) // GROUP, width)
    chosen = torch.randint(len(groups), (rows,), generator=generator)
    weight = torch.zeros(last, width).to(case.dtype)
    weight[:first] = 0.02 * normal(first, width)
    weight[first:] = (0.02 * groups).repeat_interleave(GROUP, 0)
    keys = torch.stack([torch.full((rows,), 7), torch.arange(rows)], -1)
    return Inputs(
        {
            "cond": stored(normal(rows, width) + 32 / width**0.5 * groups[chosen]),
            "uncond": stored(normal(rows, width)),
            "weight": stored(weight),
            "classes": (first, last),
            "keys": keys.to(device),
        }
    )


def rows_of(case: Case) -> int:
    """Undecided slots of the first step of a frame, or as many as the case says."""
    return case.options.get("rows", case.video.frames * case.video.rows * case.video.cols)


def _outputs(ids: Tensor, confidence: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    return (ids - inputs.classes[0]) // GROUP, confidence


def ours(inputs: Inputs, impl: str) -> tuple[Tensor, ...]:
    cond, uncond, weight, keys = (inputs.args[name] for name in ("cond", "uncond", "weight", "keys"))
    drawn = masked_sample(
        cond, uncond, weight, classes=inputs.classes, guidance_scale=GUIDANCE, row_keys=keys, impl=impl
    )
    return _outputs(*drawn, inputs)


def _draw(logits_cond: Tensor, logits_uncond: Tensor) -> tuple[Tensor, Tensor]:
    """Classes and confidence from the fp32 logits of the class slice."""
    probabilities = (logits_uncond + GUIDANCE * (logits_cond - logits_uncond)).softmax(-1)
    classes = torch.multinomial(probabilities, 1)
    return classes[:, 0], probabilities.gather(1, classes)[:, 0]


def official_style(inputs: Inputs) -> tuple[Tensor, ...]:
    """Logits of both branches over the full vocabulary in fp32, then the visual columns, softmax, draw and gather."""
    first, last = inputs.classes
    cond, uncond = (_logits(x, inputs.weight) for x in (inputs.cond, inputs.uncond))
    classes, confidence = _draw(cond[:, first:last], uncond[:, first:last])
    return _outputs(classes + first, confidence, inputs)


def chunked(inputs: Inputs) -> tuple[Tensor, ...]:
    """The class slice only, in chunks of rows: what plain torch can do."""
    first, last = inputs.classes
    chunks = zip(inputs.cond.split(CHUNK_ROWS), inputs.uncond.split(CHUNK_ROWS), strict=True)
    parts = [_draw(*(_logits(x, inputs.weight[first:last]) for x in chunk)) for chunk in chunks]
    classes, confidence = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return _outputs(classes + first, confidence, inputs)


def _logits(x: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def two_matmuls(inputs: Inputs) -> tuple[Tensor, ...]:
    """The logits of both branches alone, in the dtype of the inputs and rounded to it, chunk by chunk."""
    weight = inputs.weight[slice(*inputs.classes)].T
    for x in (*inputs.cond.split(CHUNK_ROWS), *inputs.uncond.split(CHUNK_ROWS)):
        torch.mm(x, weight)
    return ()


def work(case: Case) -> Work:
    first, last = case.options.get("classes", VISUAL_CLASSES)
    return formulas.sample_flops(rows_of(case), case.model.hidden, last - first, branches=2)


def _official_bytes(case: Case) -> int:
    """Of the full vocabulary: logits in the activation dtype and fp32. Of the slice: guided logits, two terms of
    them, probabilities and what multinomial divides them by.
    """
    first, last = case.options.get("classes", VISUAL_CLASSES)
    return rows_of(case) * (last * (2 * 4 + case.dtype.itemsize) + (last - first) * 3 * 4)


BENCH = OpBench(
    name="masked_sample",
    build=build,
    ours=ours,
    rivals=(
        Contestant("chunked softmax", chunked),
        Contestant("official style", official_style, memory=_official_bytes),
        Contestant("two matmuls", two_matmuls, CEILING),
    ),
    yardstick="chunked softmax",
    work=work,
    cases=(
        Case("masked_sample", TINY, SMOKE, torch.bfloat16, backward=False, options={"classes": SMOKE_CLASSES}),
        Case("masked_sample", M1B_QUARTER, IMAGE_256P, torch.bfloat16, False, options={"rows": 256}, suffix="-256rows"),
        *(
            Case("masked_sample", model, video, torch.bfloat16, backward=False, slow=True)
            for model in (M1B_QUARTER, M1B)
            for video in (IMAGE_256P, IMAGE_384P)
        ),
    ),
)
