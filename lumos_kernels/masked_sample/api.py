"""The public masked_sample: validation, keys and documentation."""

from __future__ import annotations

import torch
from torch import Tensor

from lumos_kernels import checks
from lumos_kernels.masked_sample import ops  # noqa: F401  (registers the op)
from lumos_kernels.tube_loss.api import VISUAL_CLASSES


@torch.no_grad()
def masked_sample(
    hidden_cond: Tensor,
    hidden_uncond: Tensor | None,
    weight: Tensor,
    classes: tuple[int, int] = VISUAL_CLASSES,
    guidance: float | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    greedy: bool = False,
    row_keys: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draws a token for each undecided slot from the guided distribution, and gives the probability of the draw.

    Logits are made for the class slice alone: l = uncond + guidance * (cond - uncond), divided by the temperature.

    Args:
        hidden_cond: [N, C], the undecided rows of the conditional branch, bf16, fp16, fp32 or fp64.
        hidden_uncond: [N, C], the same rows of the unconditional branch, or None.
        weight: [V, C], the whole lm_head, any floating dtype: its slice is computed in hidden_cond's.
        classes: (first, last), the columns of the class slice.
        guidance: classifier-free guidance scale; None or 1 uses the conditional branch alone.
        temperature: > 0, divides the guided logits before the draw and the confidence.
        generator: source of the call's seed, on any device; default: the default generator of hidden_cond's device.
            Not under torch.compile, which cannot trace a generator: give row_keys there.
        greedy: take the most probable token instead of a draw.
        row_keys: int64 [N, 2], (seed, counter) of each row, instead of a generator: row i's draw then depends on
            its own key alone, whatever rows accompany it. Without it the key is (seed of the call, i).
        impl: "auto" or an implementation's name. An explicit choice never falls back.

    Returns:
        ids int64 [N] in [first, last), and confidence fp32 [N]. The same keys give the same draw on every backend, up
        to ties of two scores nearer than the rounding of their logits (Philox4x32-10 and Gumbel-max:
        masked_sample/philox.py); "native" and "reference" draw the same from equal logits, bit for bit.

    Raises:
        ValueError: a shape, dtype, device or option does not fit, or an explicit `impl` cannot run.

    Source: arXiv 2507.08801 section 3.5; official sampling steps 1 and 2.
    """
    checks.shape("hidden_cond", hidden_cond, "N, C")
    count, width = hidden_cond.shape
    checks.dtype("hidden_cond", hidden_cond, checks.FLOATS)
    checks.shape("weight", weight, "V, C", C=width)
    checks.dtype("weight", weight, checks.FLOATS)
    checks.same("weight", weight, "hidden_cond", hidden_cond, dtypes=False)
    first, last = checks.class_slice(classes, weight)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0 (greedy=True takes the most probable token); got {temperature}")
    guided = guidance is not None and guidance != 1
    if guided and hidden_uncond is None:
        raise ValueError(f"guidance {guidance} needs hidden_uncond, the unconditional branch's rows")
    if guided:
        checks.shape("hidden_uncond", hidden_uncond, "N, C", N=count, C=width)
        checks.same("hidden_uncond", hidden_uncond, "hidden_cond", hidden_cond)
    if row_keys is not None:
        checks.shape("row_keys", row_keys, "N, 2", N=count)
        checks.dtype("row_keys", row_keys, (torch.int64,))
        checks.same("row_keys", row_keys, "hidden_cond", hidden_cond, dtypes=False)
    if greedy:
        row_keys = None
    elif row_keys is None:
        row_keys = _keys_of_call(count, generator, hidden_cond.device)
    return torch.ops.lumos_kernels.masked_sample.default(
        hidden_cond,
        hidden_uncond if guided else None,
        weight,
        row_keys,
        first,
        last,
        float(guidance) if guided else 1.0,
        float(temperature),
        impl,
    )


def _keys_of_call(count: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    source = device if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=source).to(device)
    return torch.stack([seed.expand(count), torch.arange(count, device=device)], -1)
