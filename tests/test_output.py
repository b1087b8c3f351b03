"""LumosOutput, FrameLayout and RowLimits are pytree nodes: torch.export, offload and wrappers find their tensors."""

import dataclasses
import io

import parallel_runs
import pytest
import torch
from parallel_runs import micro_batch
from torch import nn
from torch.utils import _pytree as pytree

from lumos import Lumos, LumosOutput
from lumos_kernels import FrameLayout
from lumos_kernels.layout import RowLimits


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Lumos(parallel_runs.config())


def inputs(number=2, labels=True):
    batch = micro_batch(number)
    masked = batch.masked
    return (masked.input_ids,), {"layout": batch.layout, **({"labels": masked.labels} if labels else {})}


def padded():
    batch = micro_batch(0)
    ids, labels = batch.masked.input_ids.reshape(1, -1), batch.masked.labels.reshape(1, -1)
    return (ids,), {"labels": labels}


def leaves_of(out):
    return {name: tensor for name, tensor in vars(out).items() if isinstance(tensor, torch.Tensor)}


@pytest.mark.parametrize("labels", [True, False])
def test_every_tensor_of_an_output_is_a_leaf_and_comes_back(model, labels):
    args, kwargs = inputs(labels=labels)
    out = model(*args, **kwargs)
    leaves, spec = pytree.tree_flatten(out)
    limits = dataclasses.fields(out.layout.limits)
    assert len(leaves) == (4 if labels else 1) + 4 + len(limits)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, LumosOutput)
    assert isinstance(again.layout, FrameLayout)
    assert again.hidden_states is out.hidden_states
    assert again.loss is out.loss
    assert again.layout.limits.kv_end is out.layout.limits.kv_end
    if labels:
        torch.testing.assert_close(again.frame_losses, out.frame_losses, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ["packed", "padded", "no labels"])
def test_export_and_its_file_give_the_output(model, case):
    args, kwargs = {"packed": inputs, "padded": padded, "no labels": lambda: inputs(labels=False)}[case]()
    expected = model(*args, **kwargs)
    program = torch.export.export(model, args, kwargs)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    with torch.serialization.safe_globals([FrameLayout, RowLimits]):  # of the example inputs
        loaded = torch.export.load(file)
    for exported in (program.module(), loaded.module()):
        with torch.no_grad():
            out = exported(*args, **kwargs)
        assert isinstance(out, LumosOutput)
        for name, tensor in leaves_of(expected).items():
            torch.testing.assert_close(getattr(out, name), tensor)


@pytest.mark.parametrize("make", [inputs, padded])
def test_the_compiled_model_has_the_gradients_of_the_model(model, make):
    args, kwargs = make()
    expected = model(*args, **kwargs)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(*args, **kwargs)
    out.loss.backward()
    torch.testing.assert_close(out.loss, expected.loss)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)


def test_saved_activations_may_lie_elsewhere(model):
    args, kwargs = inputs()
    model(*args, **kwargs).loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with torch.autograd.graph.save_on_cpu():
        out = model(*args, **kwargs)
    out.loss.backward()
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in model.named_parameters())


def test_data_parallel_is_refused_by_name(model):
    with pytest.raises(TypeError, match=r"nn\.DataParallel .* use torch\.nn\.parallel\.DistributedDataParallel"):
        model._replicate_for_data_parallel()
    assert nn.Module._replicate_for_data_parallel is not type(model)._replicate_for_data_parallel


def test_tensor_parallel_lm_head_is_refused_by_name(model):
    args, kwargs = inputs()
    model.lm_head.weight.placements = ("shard",)
    with pytest.raises(ValueError, match=r"lm_head\.weight must be whole .* got a DTensor with placements"):
        model(*args, **kwargs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mask_history_ratio", None),
        ("mask_history_ratio", "0.7"),
        ("temperature", None),
        ("guidance_scale", "15"),
        ("guidance_scale", float("nan")),
        ("confidence_threshold", "high"),
        ("guidance_interval", None),
        ("guidance_interval", 0.5),
        ("guidance_interval", (0, None)),
        ("window", 3),
        ("window", (1, None)),
    ],
)
def test_options_of_another_type_are_named(model, option, value):
    from lumos import generate_tokens

    prompt = [torch.tensor([5, 8710, 9004, 8805, 8807])]
    with pytest.raises(ValueError, match=option):
        generate_tokens(model, prompt, (4, 4), 2, **{option: value})


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_has_an_empty_output(model, shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.hidden_states.shape == (*shape, model.config.hidden_size)
    assert out.loss == 0
