"""lumos/scaling.py: formulas of memory against the tensors of real steps. Bytes on the wire: test_parallel.py."""

import dataclasses

import parallel_runs
import pytest
import torch
from live_bytes import LiveBytes

from lumos import Lumos
from lumos.scaling import RECOMPUTATION, Step
from lumos.train import make_optimizer
from lumos_kernels import Frame, FrameLayout, Text

CONFIG = dataclasses.replace(parallel_runs.config(), intermediate_size=224, model_parallel_size=1)


@pytest.fixture(scope="module")
def layout():
    return FrameLayout.from_segments([[Text(20), Frame(8, 16), Frame(8, 16)]])


def step_of(config, layout, **options):
    return Step(config, (layout,), (int(layout.content.sum()),), **options)


@pytest.mark.parametrize("recomputation", RECOMPUTATION)
@pytest.mark.parametrize(
    ("dtype", "swin_norm"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)], ids=str
)
def test_activations_are_those_of_a_real_forward(layout, recomputation, dtype, swin_norm):
    """To the byte, beside the scale of the loss. (With bfloat16 a norm of bfloat16 on a CPU keeps copies in fp32.)"""
    config = dataclasses.replace(CONFIG, swin_norm=swin_norm)
    model = Lumos(config).train()
    model.checkpoint_layers(int(recomputation != "none"), selective=recomputation == "selective")
    ids = torch.randint(10, 4000, (layout.num_tokens,))
    labels = torch.where(layout.content, config.visual_start, -100)
    rows = layout.content.nonzero().flatten()
    with LiveBytes() as live, torch.autocast("cpu", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        loss = model(ids, labels=labels, layout=layout, rows=rows).loss
        kept = live.bytes
    step = step_of(config, layout, recomputation=recomputation, element_size=dtype.itemsize)
    casts = (dtype != torch.float32) * dtype.itemsize * config.num_hidden_layers * config.layer_matmul_parameters
    casts *= recomputation == "none"
    assert kept - casts == step.activation_bytes(layout.num_tokens) + step.loss_bytes(layout.num_tokens) + loss.nbytes


def test_parameters_gradients_and_optimizer_of_one_process():
    model = Lumos(CONFIG)
    optimizer = make_optimizer(model, 1e-3, 0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    memory = step_of(CONFIG, FrameLayout.from_segments([[Text(8)]])).memory()
    assert memory.parameters == sum(p.nbytes for p in model.parameters()) == 4 * CONFIG.num_parameters
    assert memory.gradients == memory.parameters
    assert memory.optimizer == sum(x.nbytes for state in optimizer.state.values() for x in state.values())
