"""Sampling from a model with NaN ends with an error that names where it came from, and writes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from sampling_oracle import prompt, small_model

from lumos import generate as generate_module
from lumos.generate import generate_frames, generate_tokens
from lumos_kernels.errors import NotFiniteError
from lumos_kernels.masked_sample import ops


@pytest.fixture(params=["the op raises", "the op cannot look"])
def unseen(request, monkeypatch):
    """On a GPU the op reads nothing, and a frame's confidences are looked at once."""
    if request.param == "the op cannot look":
        monkeypatch.setattr(ops, "_refuse_nan", lambda *_: None)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"guidance_scale": None}, {"confidence_threshold": 0.9}])
def test_the_first_weight_that_is_not_finite_is_named(unseen, options, value):
    model = small_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    message = rf"document 0, frame 0, step 0: .*model\.layers\.1\.mlp\.up_proj\.weight holds {value}"
    with pytest.raises(NotFiniteError, match=message):
        generate_tokens(model, [prompt(6)], (4, 4), 2, steps=3, **options)


def test_document_frame_and_step_are_named(unseen, monkeypatch):
    """The second of two documents breaks at the second step of its third frame; its frames before are yielded."""
    model, original, calls = small_model(), generate_module.masked_sample, []

    def broken(conditional, *rest, **options):
        calls.append(len(conditional))
        if len(calls) == 2 * 4 + 2:
            conditional = conditional.clone()
            conditional[-1] = math.nan
        return original(conditional, *rest, **options)

    monkeypatch.setattr(generate_module, "masked_sample", broken)
    prompts, frames = [prompt(6), prompt(9)], []
    message = "document 1, frame 2, step 1: .* all weights are finite, so the activations overflow in float32"
    results = generate_frames(model, prompts, (4, 4), 3, steps=4, guidance_scale=None, documents_per_pass=2)
    with pytest.raises(NotFiniteError, match=message):
        frames.extend((frame.document, frame.frame) for frame in results)
    assert frames == [(0, 0), (1, 0), (0, 1), (1, 1)]
