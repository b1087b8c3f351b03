"""lumos/scaling.py: formulas of memory against the tensors of one process. Several, and the wire: test_parallel.py."""

import dataclasses
from pathlib import Path

import parallel_runs
import pytest
import torch
from live_bytes import LiveBytes

from bench.scaling import document
from lumos import Lumos, LumosConfig
from lumos.scaling import RECOMPUTATION, Cluster, Step, fitting_steps
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


def test_every_element_of_the_model_is_counted(layout):
    for name in ("tiny", "1B", "3B"):
        config = LumosConfig.preset(name)
        assert step_of(config, layout).memory().parameters == 4 * config.num_parameters
        for processes in (8, 64):  # whose parts are rounded up
            parameters = step_of(config, layout, processes=processes).memory().parameters
            assert 0 <= parameters * processes / (4 * config.num_parameters) - 1 < 0.01


def test_times_follow_from_the_assumptions(layout):
    """... by hand: of a cluster where everything is a round number."""
    cluster = Cluster(
        gpus_per_node=4,
        flops=1e12,
        compute_share=0.5,
        memory_rate=1e9,
        nvlink=1e9,
        network=1e8,
        link_share=0.5,
        latency=0,
    )
    assert cluster.seconds(1e9, 1) == 0
    assert cluster.seconds(1e9, 4) == 2
    assert cluster.seconds(1e9, 8) == 5  # a ring over nodes: the four cards of a node
    assert cluster.seconds(1e9, 8, neighbours=False) == 20
    assert dataclasses.replace(cluster, latency=1).seconds(0, 8) == 3

    alone = step_of(CONFIG, layout)
    work = CONFIG.training_flops(layout, alone.targets[0])
    assert alone.seconds(cluster)["compute"] == pytest.approx(work / 5e11)
    assert alone.seconds(cluster)["optimizer"] == pytest.approx(28 * CONFIG.num_parameters / 1e9)
    assert step_of(CONFIG, layout, recomputation="full").seconds(cluster)["compute"] == pytest.approx(
        4 / 3 * work / 5e11
    )
    assert alone.mfu(cluster) == pytest.approx(work / alone.seconds(cluster)["total"] / 1e12)

    shared = step_of(CONFIG, layout, processes=8, replicate=2, context=2).seconds(cluster)
    step = step_of(CONFIG, layout, processes=8, replicate=2, context=2)
    sent = step.bytes_sent()
    assert shared["compute"] == pytest.approx(work / 2 / 5e11, rel=1e-3)
    assert shared["exchange"] == pytest.approx(sent["all_to_all"] / 5e8)
    sharding = (sent["all_gather"] + sent["reduce_scatter"]) / 5e8 + sent["all_reduce"] / 5e7
    visible = sharding - shared["first gather"] - 0.8 * shared["compute"]
    assert shared["sharding beyond compute"] == pytest.approx(visible)
    assert shared["total"] == pytest.approx(sum(v for k, v in shared.items() if k != "total"))


def test_layouts_that_fit_come_fastest_first():
    layout = FrameLayout.from_segments([[Text(20), *[Frame(48, 84)] * 3]])

    def step(**options):
        return step_of(LumosConfig.lumos_1b(), layout, **options)

    cluster = Cluster()
    steps = fitting_steps(step, cluster, 16)
    times = [s.seconds(cluster)["total"] * s.context for s in steps]
    assert times == sorted(times)
    assert {s.context for s in steps} == {1, 2, 4, 8}
    assert {s.replicate for s in steps} == {1, 2}
    assert {s.recomputation for s in steps} == set(RECOMPUTATION)
    small = Cluster(memory=min(s.memory().total for s in steps) / 0.9 + 1e9)
    fitting = fitting_steps(step, small, 16)
    assert 0 < len(fitting) < len(steps)
    assert all(s.memory().total <= 0.9 * small.memory for s in fitting)
    assert not fitting_steps(step, Cluster(memory=1e9), 16)

    def tiny(**options):
        return step_of(CONFIG, layout, **options)

    assert {s.context for s in fitting_steps(tiny, cluster, 8)} == {1, 2, 4}, "4 key/value heads"


def test_the_document_holds_these_tables():
    text = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert text.endswith(document()), "docs/scaling.md is not what `python -m bench.scaling` prints"
