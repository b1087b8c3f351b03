"""Labels under adapters on lm_head are read as without them: ignored ones, relative ones, and rows."""

from __future__ import annotations

import pytest
import torch
from test_adapters import adapt, make_model

IDS = torch.arange(12).view(2, 6)
KINDS = ["lora", "dora", "saved"]


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    pytest.importorskip("peft")
    return adapt(make_model(torch.float32), request.param)


@pytest.mark.parametrize("ignored", [-100, 8803])
def test_a_batch_without_targets_has_the_loss_zero(model, ignored):
    labels = torch.full_like(IDS, -100)
    labels[:, 2] = ignored
    loss = model(IDS, labels).loss
    assert loss == 0
    loss.backward()


def test_labels_relative_to_the_classes_are_refused_in_their_own_terms(model):
    lo, hi = model.get_base_model().config.classes
    message = rf"targets in classes = \({lo}, {hi}\), or -100; got 12 other labels from 0 to 11, and none"
    with pytest.raises(ValueError, match=message):
        model(IDS, IDS)


def test_rows_are_checked(model):
    labels = torch.full_like(IDS, -100)
    labels[0, 3] = model.get_base_model().config.classes[0]
    with pytest.raises(ValueError, match="rows must be exactly the 1 target rows"):
        model(IDS, labels, rows=torch.tensor([2]))
