"""masked_sample under torch.library: schema and fake; there is no gradient. Imports torch only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import Problem
from ..errors import NotFiniteError
from ..registration import define
from .contract import OP, Inputs, Outputs


def _fake_forward(hidden_cond: Tensor, *_: Any) -> Outputs:
    rows = hidden_cond.shape[0]
    return Outputs(hidden_cond.new_empty(rows, dtype=torch.int64), hidden_cond.new_empty(rows, dtype=torch.float32))


@define(
    "masked_sample(Tensor hidden_cond, Tensor? hidden_uncond, Tensor weight, Tensor? row_keys, float guidance_scale, "
    "float temperature, int first, int last, str impl) -> (Tensor, Tensor)",
    _fake_forward,
)
def _forward(hidden_cond: Tensor, hidden_uncond: Tensor | None, weight: Tensor, *rest: Any) -> Outputs:
    row_keys, guidance_scale, temperature, first, last, impl = rest
    chosen = OP.choose(impl, Problem.of(hidden_cond))
    class_slice = weight[first:last].to(hidden_cond.dtype)
    inputs = Inputs(hidden_cond, hidden_uncond, class_slice, row_keys, guidance_scale, temperature)
    classes, confidence = chosen.forward(inputs)
    if not confidence.is_cuda:
        _refuse_nan(confidence, inputs)
    return Outputs(classes + first, confidence)


def _refuse_nan(confidence: Tensor, inputs: Inputs) -> None:
    """Raise NotFiniteError for rows without a distribution. On a GPU that would make the host wait."""
    rows = confidence.isnan().nonzero()[:, 0]
    if not len(rows):
        return
    first = int(rows[0])
    sources = {
        f"hidden_cond[{first}]": inputs.hidden_cond[first],
        f"hidden_uncond[{first}]": None if inputs.hidden_uncond is None else inputs.hidden_uncond[first],
        "the class slice of weight": inputs.weight,
    }
    culprits = [name for name, x in sources.items() if x is not None and not x.isfinite().all()]
    cause = f"{' and '.join(culprits)} must be finite" if culprits else "finite inputs gave logits that overflow"
    raise NotFiniteError(
        f"masked_sample: {len(rows)} of {len(confidence)} rows have logits without a distribution (NaN or infinity), "
        f"row {first} first: {cause}",
        first,
    )
