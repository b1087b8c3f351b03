"""What users hand to Lumos and generate_tokens by mistake is refused by name: other types, NaN."""

from __future__ import annotations

import math
import re

import parallel_runs
import pytest
import torch

from lumos import Lumos, generate_tokens
from lumos.tokens import VIDEO_START

IDS, LABELS = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[-100, 9100, 9100, -100]])
PROMPT = torch.tensor([5, VIDEO_START, 8806, 8809])


@pytest.fixture(scope="module")
def model():
    return Lumos(parallel_runs.config())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": None}, "frames must be one for all 1 documents, or a list with one for each; got None"),
        ({"frames": 2.0}, "frames must be one for all 1 documents, or a list with one for each; got 2.0"),
        ({"seed": None}, "seed must be one for all 1 documents, or a list with one for each; got None"),
        ({"seed": math.nan}, "seed must be one for all 1 documents, or a list with one for each; got nan"),
        ({"grid": None}, "grid must be one for all 1 documents, or a list with one for each; got None"),
        ({"grid": 4}, "grid must be one for all 1 documents, or a list with one for each; got 4"),
        ({"grid": [4]}, "grid must be (rows, columns) of codes, positive multiples of 4; got 4"),
        ({"grid": [(4.0, 4.0)]}, "grid must be (rows, columns) of codes, positive multiples of 4; got (4.0, 4.0)"),
        ({"prompts": None}, "prompts must be a list of 1-D int64 tensors, one a document, and not empty; got NoneType"),
        ({"prompts": {"a": PROMPT}}, "prompts must be a list of 1-D int64 tensors, one a document, and not empty"),
        ({"kv_device": "nowhere"}, "kv_device must be None or a torch device, got 'nowhere'"),
        ({"kv_device": [0]}, "kv_device must be None or a torch device, got [0]"),
    ],
    ids=str,
)
def test_arguments_of_sampling(model, options, message):
    given = {"prompts": [PROMPT], "grid": (4, 4), "frames": 1, "steps": 1} | options
    with pytest.raises(ValueError, match=re.escape(message)):
        generate_tokens(model, **given)


def test_sampling_without_a_model():
    with pytest.raises(ValueError, match="model must be a Lumos"):
        generate_tokens(None, [PROMPT], (4, 4), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[0, 0, 0, 0]]}, "input_ids must be a tensor"),
        ({"labels": [[0, 0, 0, 0]]}, "labels must be None or a tensor, got list"),
        ({"layout": 5}, "layout must be None or a FrameLayout, got int"),
        *(({"focal_gamma": value}, "focal_gamma must be 0 or >= 1") for value in (math.nan, math.inf, None, "2", -1.0)),
        *(({"decay_start": value}, "decay_start must be None or a finite number") for value in (math.nan, "1")),
        *(({"z_loss_weight": value}, "z_loss_weight must be a finite number") for value in (math.nan, "1")),
    ],
    ids=str,
)
def test_arguments_of_the_model(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(**{"input_ids": IDS, "labels": LABELS} | options)


def test_labels_of_codes_on_text_are_in_no_frame(model):
    losses = model(IDS, LABELS).frame_losses
    assert losses.shape == (0,)


def test_sampling_under_autocast(model):
    options = {"steps": 2, "greedy": True, "guidance_scale": None}
    with torch.autocast("cpu", torch.bfloat16):
        [ids] = generate_tokens(model, [PROMPT], (4, 4), 2, **options)
    assert len(ids) == len(generate_tokens(model, [PROMPT], (4, 4), 2, **options)[0])


def test_mixed_peft_models_sample_and_adalora_counts(model):
    peft = pytest.importorskip("peft")
    mixed = peft.PeftMixedModel(
        Lumos(parallel_runs.config()), peft.LoraConfig(r=2, target_modules=["q_proj"]), "default"
    )
    generate_tokens(mixed, [PROMPT], (4, 4), 1, steps=1)
    adapted = peft.get_peft_model(
        Lumos(parallel_runs.config()), peft.AdaLoraConfig(total_step=9, target_modules=["lm_head"])
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1)
    base = adapted.get_base_model()
    lo, hi = base.config.classes
    logits = base.lm_head(base(IDS).hidden_states[0, 1:3])[:, lo:hi]
    expected = torch.nn.functional.cross_entropy(logits, LABELS[0, 1:3] - lo)
    torch.testing.assert_close(adapted(IDS, LABELS).loss, expected)
