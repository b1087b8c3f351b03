"""The sampler that ours is measured against computes the same thing."""

import pytest
import torch
from golden import GENERATION, load
from sampling_oracle import prompt, small_model
from test_generate import golden_case

from bench.official_sampler import official_style_sample
from lumos import generate_tokens


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", GENERATION)
def test_official_style_sampler_is_the_official_one(name, cache):
    model, tensors, options = golden_case(name)
    ids = official_style_sample(model, load(name)[0]["prompt_ids"].long(), cache=cache, **options)
    assert torch.equal(ids, tensors["output_ids"].long())


def test_official_style_draws_visual_codes_at_random():
    model = small_model()
    options = {"grid": (4, 4), "frames": 2, "steps": 3, "guidance_scale": 2.0}
    one, two = (
        official_style_sample(model, prompt(6), generator=torch.Generator().manual_seed(seed), **options)
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)
    assert ((one >= 9216).sum() == 32).all()


@pytest.mark.parametrize("window", [(0, 1), (1, 1), (2, 1), (1, 2), (0, 5)])
@pytest.mark.parametrize("given", [0, 1])
def test_a_window_is_sampling_with_its_mask(window, given):
    """The ring of frames in the cache against a dense mask over everything, without a cache."""
    sink, recent = window
    model, ids = small_model(), prompt(6, given=given)
    options = {"grid": (4, 4), "frames": 6, "steps": 3, "guidance_scale": 2.0, "greedy": True}
    expected = official_style_sample(
        model, ids, cache=False, sees=lambda frame, key: key < sink or frame - key <= recent, **options
    )
    [actual] = generate_tokens(model, [ids], window=window, **options)
    assert torch.equal(actual, expected)
    [exact] = generate_tokens(model, [ids], **options)
    assert torch.equal(actual, exact) == (sum(window) >= 5)
