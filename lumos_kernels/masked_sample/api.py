"""The public masked_sample: validation, keys and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import FLOATS, describe, require_classes, require_dtype, require_number, require_same, require_shape
from ..token_ids import VISUAL_CLASSES
from . import ops  # noqa: F401  # defines torch.ops.lumos_kernels.masked_sample


def masked_sample(
    hidden_cond: Tensor,
    hidden_uncond: Tensor | None,
    weight: Tensor,
    *,
    classes: tuple[int, int] = VISUAL_CLASSES,
    guidance_scale: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    row_keys: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw a token for each undecided slot from the guided distribution, and return it with its probability.

    Logits are made for the class slice alone: uncond + guidance_scale * (cond - uncond), divided by the temperature.

    Args:
        hidden_cond: [N, C], the undecided rows of the conditional branch, bf16, fp16, fp32 or fp64.
        hidden_uncond: [N, C], the same rows of the unconditional branch, or None.
        weight: [V, C], the whole lm_head, any floating dtype. Its slice is computed in hidden_cond's dtype.
        classes: (first, last), the columns of the class slice; the visual codes of Lumos-1 by default.
        guidance_scale: scale of classifier-free guidance. None or 1 uses the conditional branch alone.
        temperature: > 0, divides the guided logits before the draw and the confidence.
        generator: source of the call's seed, on any device; default: the default generator of hidden_cond's device.
            torch.compile cannot trace a generator: give row_keys there.
        greedy: take the most probable token instead of a draw.
        row_keys: int64 [N, 2], (seed, counter) of each row, instead of a generator. The draw of row i then depends on
            its own key alone, whatever rows accompany it. Without row_keys the key is (seed of the call, i).
        impl: "auto", "reference" (plain PyTorch), "native" (C++ on CPUs) or "triton" (GPUs). An explicit choice never
            falls back: it raises where it cannot run.

    Returns:
        (ids, confidence): int64 [N] in [first, last), and fp32 [N]. The same keys give the same draw on every backend,
        up to ties of two scores nearer than the rounding of their logits (Philox4x32-10 and Gumbel-max:
        masked_sample/philox.py). "native" and "reference" draw the same from equal logits, bit for bit. On a GPU a row
        whose logits hold NaN or an infinity has the confidence NaN, and some id of the classes: nothing is read there.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or an explicit `impl` cannot run. On the CPU also
            where the logits of a row hold NaN or an infinity (NotFiniteError).

    Source: arXiv 2507.08801 section 3.5; official sampling steps 1 and 2.
    """
    require_shape("hidden_cond", hidden_cond, "N, C")
    count, width = hidden_cond.shape
    require_dtype("hidden_cond", hidden_cond, FLOATS)
    require_shape("weight", weight, "V, C", C=width)
    require_dtype("weight", weight, FLOATS)
    require_same("weight", weight, "hidden_cond", hidden_cond, dtypes=False)
    require_classes(classes, weight)
    above_0 = "a finite number > 0 (greedy=True takes the most probable token)"
    require_number("temperature", temperature, above_0, above=0)
    if guidance_scale is not None:
        require_number("guidance_scale", guidance_scale, "None or a finite number")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be None or a torch.Generator; got {describe(generator)}")
    if guidance_scale is None or guidance_scale == 1:
        guidance_scale, hidden_uncond = 1.0, None
    elif hidden_uncond is None:
        raise ValueError(f"guidance_scale {guidance_scale} needs hidden_uncond, the unconditional branch's rows")
    else:
        require_shape("hidden_uncond", hidden_uncond, "N, C", N=count, C=width)
        require_same("hidden_uncond", hidden_uncond, "hidden_cond", hidden_cond)
    if row_keys is not None:
        require_shape("row_keys", row_keys, "N, 2", N=count)
        require_dtype("row_keys", row_keys, (torch.int64,))
        require_same("row_keys", row_keys, "hidden_cond", hidden_cond, dtypes=False)
    if greedy:
        row_keys = None
    elif row_keys is None:
        row_keys = _keys_of_call(count, generator, hidden_cond.device)
    with torch.no_grad():
        ids, confidence = torch.ops.lumos_kernels.masked_sample.default(
            hidden_cond, hidden_uncond, weight, row_keys, float(guidance_scale), float(temperature), *classes, impl
        )
    return ids, confidence


def _keys_of_call(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=source).to(device)
    return torch.stack([seed.expand(count), torch.arange(count, device=device)], -1)
