"""Logits without a distribution: NaN and infinities are named on the CPU, and are the confidence NaN elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from lumos_kernels import library, masked_sample
from lumos_kernels.errors import NotFiniteError
from lumos_kernels.masked_sample import ops

IMPLS = ["reference", *(["native"] if library.refusal() is None else [])]
CALL = {"classes": (10, 74), "guidance_scale": 3.0}


@pytest.fixture
def inputs():
    cond, uncond = torch.randn(2, 9, 32)
    return [cond, uncond, torch.randn(80, 32)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "drawn"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    ("place", "name"), [(0, r"hidden_cond\[4\]"), (1, r"hidden_uncond\[4\]"), (2, "the class slice of weight")]
)
def test_what_is_not_finite_is_named(inputs, impl, greedy, value, place, name):
    row = 20 if place == 2 else 4
    inputs[place][row] = value
    count, first = (9, 0) if place == 2 else (1, 4)
    name = name.replace("4", str(first))
    with pytest.raises(NotFiniteError, match=f"{count} of 9 rows .* row {first} first: {name} must be finite"):
        masked_sample(*inputs, **CALL, greedy=greedy, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_that_overflow_are_named(inputs, impl):
    inputs[0][2] = inputs[2][11] = 1e30
    with pytest.raises(NotFiniteError, match="row 2 first: finite inputs gave logits that overflow"):
        masked_sample(*inputs, **CALL, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_outside_the_class_slice_does_not_matter(inputs, impl):
    inputs[2][:10] = inputs[2][74:] = math.nan
    _, confidence = masked_sample(*inputs, **CALL, impl=impl)
    assert confidence.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_without_the_check_a_row_has_the_confidence_nan_and_an_id(inputs, impl, monkeypatch):
    """What a GPU gives, where nothing is read."""
    monkeypatch.setattr(ops, "_refuse_nan", lambda *_: None)
    inputs[0][4] = math.nan
    ids, confidence = masked_sample(*inputs, **CALL, impl=impl)
    assert confidence.isnan().tolist() == [row == 4 for row in range(9)]
    assert ((ids >= 10) & (ids < 74)).all()


@pytest.mark.parametrize(
    ("option", "allowed"),
    [
        ({"guidance_scale": math.nan}, "guidance_scale must be None or a finite number; got nan"),
        ({"guidance_scale": math.inf}, "guidance_scale must be None or a finite number; got inf"),
        ({"temperature": math.inf}, "temperature must be a finite number > 0"),
        ({"temperature": math.nan}, "temperature must be a finite number > 0"),
    ],
)
def test_options_are_finite(inputs, option, allowed):
    with pytest.raises(ValueError, match=allowed):
        masked_sample(*inputs, **{**CALL, **option})
