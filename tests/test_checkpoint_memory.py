"""Memory that parameters share, strides and wrappers' names: what is saved, and what loads."""

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import folder, model, names  # noqa: F401 (fixtures)
from test_checkpoint_wild import LAYER, NORM, assert_runs, save_with, weights, write

from lumos.checkpoint import CheckpointError
from lumos.model import Lumos


def test_tied_weights_are_saved_whole_and_load_apart(folder, model, tmp_path):  # noqa: F811
    model.lm_head.weight = model.model.embed_tokens.weight
    for number, size in enumerate(("5GB", 300_000)):
        model.save_pretrained(tmp_path / str(number), max_shard_size=size)
        loaded = Lumos.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
        assert_apart(loaded)
    assert_runs(loaded)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("new", [True, False])
def test_ties_of_a_file_are_cut(folder, new):  # noqa: F811
    state = weights(folder)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    flat = torch.cat([state[LAYER].flatten(), state[NORM]])
    state[LAYER], state[NORM] = flat[: 64 * 64].view(64, 64), flat[64 * 64 :]
    write(folder, state, _use_new_zipfile_serialization=new)
    loaded = Lumos.from_pretrained(folder)
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter, state[name]), name
    assert_apart(loaded)


def assert_apart(loaded):
    """Adding one to each parameter adds it to that one alone."""
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, before[name] + 1), name


def test_views_and_strides_are_saved_and_loaded(folder, model, tmp_path):  # noqa: F811
    state = weights(folder)
    strided = state | {LAYER: state[LAYER].t().contiguous().t(), NORM: torch.ones(1).expand(64)}
    assert not strided[LAYER].is_contiguous()
    write(folder, strided | {"lm_head.weight": torch.nn.Parameter(state["lm_head.weight"])})
    loaded = Lumos.from_pretrained(folder)
    assert all(parameter.is_contiguous() and parameter.is_leaf for parameter in loaded.parameters())
    assert_apart(loaded)
    both = torch.stack([state[LAYER], state[LAYER] + 1], -1)
    other = LAYER.replace("layers.0", "layers.1")
    save_with(model, tmp_path / "views", {LAYER: both[..., 0], other: both[..., 1], NORM: torch.ones(1).expand(64)})
    saved = load_file(tmp_path / "views" / "model.safetensors")
    assert torch.equal(saved[LAYER] + 1, saved[other])
    assert torch.equal(saved[NORM], torch.ones(64))


def test_what_is_no_weight_is_not_saved(model, tmp_path):  # noqa: F811
    for tensor, fault in (
        (torch.empty(64, 64, device="meta"), "has no values"),
        (torch.eye(64).to_sparse(), "is sparse"),
        (torch.ones(64, 64, dtype=torch.int8), "is int8"),
    ):
        with pytest.raises(CheckpointError, match=f"{LAYER} {fault}"):
            save_with(model, tmp_path / "x", {LAYER: tensor})
    assert names(tmp_path) == []


def test_names_of_wrappers_are_not_saved(model, tmp_path):  # noqa: F811
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.save_pretrained(tmp_path / "saved")
    assert LAYER in load_file(tmp_path / "saved" / "model.safetensors")
