"""Checkpoints from the wild: older and foreign files, mixed and quantised dtypes, shared memory, damage."""

import contextlib
import json
import logging
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint import assert_same, folder, model  # noqa: F401 (fixtures)

from lumos.checkpoint import CheckpointError
from lumos.generate import generate_tokens
from lumos.model import Lumos

NORM = "model.norm.weight"
LAYER = "model.layers.0.self_attn.q_proj.weight"


def weights(folder):  # noqa: F811
    return load_file(folder / "model.safetensors")


def write(folder, state, form="bin", **options):  # noqa: F811
    """The folder with other weights, as safetensors or as what torch.save makes of any object."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if form == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin", **options)


def assert_runs(loaded):
    """A forward pass with a loss, its gradients, and a sampled frame."""
    frame = [8197, 8805, 8805, *([9003] * 4 + [8803]) * 4, 8196]
    ids = torch.tensor([[0, 5000, 8710, 9004, 8805, 8805, *frame, 9005, 8710]])
    loss = loaded(ids, labels=torch.where(ids == 9003, 9300, -100)).loss
    loss.backward()
    assert torch.isfinite(loss)
    prompt = torch.tensor([0, 5000, 8710, 9004, 8805, 8805])
    [made] = generate_tokens(loaded, [prompt], grid=(4, 4), frames=1, steps=2, guidance_scale=2.0, seed=0)
    assert len(made) == 3 + 24 + 1


# Forms of .bin


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_files_from_before_pytorch_1_6_load(folder, model, dtype):  # noqa: F811
    write(folder, weights(folder), _use_new_zipfile_serialization=False)
    loaded = Lumos.from_pretrained(folder, dtype=dtype)
    assert_same(loaded, model.to(dtype or torch.float32))


def test_a_damaged_file_from_before_pytorch_1_6_is_named(folder):  # noqa: F811
    write(folder, weights(folder), _use_new_zipfile_serialization=False)
    data = (folder / "pytorch_model.bin").read_bytes()
    random = np.random.default_rng(0)
    for cut in (*range(1, 400, 7), len(data) // 2, len(data) - 1):
        (folder / "pytorch_model.bin").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            Lumos.from_pretrained(folder)
    for _ in range(60):  # bytes of the pickles, at the front of the file
        broken = bytearray(data)
        for place in random.integers(0, 600, 4):
            broken[place] = random.integers(256)
        (folder / "pytorch_model.bin").write_bytes(broken)
        with contextlib.suppress(CheckpointError):  # a changed name or stride may still be a checkpoint
            Lumos.from_pretrained(folder)


def test_weights_inside_what_a_trainer_saved(folder, model):  # noqa: F811
    state = weights(folder)
    for content in (
        {"state_dict": state, "epoch": 3, "optimizer": {"state": {0: {"step": 1}}}},
        {"model": {"module": state}, "step": torch.Size([1])},
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
        {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
        {name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"): t for name, t in state.items()},
    ):
        write(folder, content)
        assert_same(Lumos.from_pretrained(folder), model)


def test_wrappers_in_safetensors_and_their_clashes(folder, model):  # noqa: F811
    state = weights(folder)
    wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
    write(folder, wrapped | {"module.model.vqmodel.codes": torch.ones(3, dtype=torch.int32)}, "safetensors")
    assert_same(Lumos.from_pretrained(folder), model)
    write(folder, state | {f"module.{NORM}": state[NORM].clone()}, "safetensors")
    with pytest.raises(CheckpointError, match=f"{NORM} is stored twice, in .*safetensors and in .*safetensors"):
        Lumos.from_pretrained(folder)


def test_a_tensor_in_two_shards_is_named(folder):  # noqa: F811
    state = weights(folder)
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "a.safetensors")
    save_file({NORM: state[NORM] + 1}, folder / "b.safetensors")
    weight_map = dict.fromkeys(state, "a.safetensors") | {NORM: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=rf"{NORM} is stored twice, in .*a\.safetensors and in .*b\.safetensors"):
        Lumos.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold a dict of tensors, got a list"),
        (torch.zeros(3), "must hold a dict of tensors, got a Tensor"),
        ({"epoch": 3, NORM: torch.zeros(64)}, "must hold a dict of tensors, but epoch is a int"),
        ({NORM: [1.0] * 64, "x": torch.zeros(1)}, f"must hold a dict of tensors, but {NORM} is a list"),
        ({3: torch.zeros(64)}, "unexpected: 3"),
        ({"state_dict": {}}, "missing: "),
        ({NORM: print}, "damaged or no checkpoint: UnpicklingError Unsupported global"),
    ],
)
def test_other_contents_are_named(folder, content, message):  # noqa: F811
    write(folder, content)
    with pytest.raises(CheckpointError) as caught:
        Lumos.from_pretrained(folder)
    assert message in str(caught.value)
    assert "pytorch_model.bin" in str(caught.value) or "do not fit" in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_what_is_no_checkpoint_at_all_is_said(folder):  # noqa: F811
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    page = b"\n<!DOCTYPE html><html><body>404</body></html>"
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / "model.safetensors").unlink(missing_ok=True)
        for data, message in ((pointer, "is a Git LFS pointer"), (page, "is a web page")):
            (folder / name).write_bytes(data)
            with pytest.raises(CheckpointError, match=f"{name} {message}"):
                Lumos.from_pretrained(folder)
    with tarfile.open(folder / "pytorch_model.bin", "w") as archive:
        archive.add(folder / "config.json", "storages")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a tar archive, the form of PyTorch before 0\.2"):
        Lumos.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({NORM: np.zeros(64)}))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged or no checkpoint"):
        Lumos.from_pretrained(folder)


# Dtypes


def mixed(state, widest=torch.float32):
    """bf16 weights with norms of another dtype, as some trainers write them."""
    return {name: t.to(widest if "norm" in name else torch.bfloat16) for name, t in state.items()}


def set_config(folder, **keys):  # noqa: F811
    config = json.loads((folder / "config.json").read_text())
    config.pop("torch_dtype")
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "torch.bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"torch_dtype": "float16"}, torch.float32),  # no weight has it
        ({"torch_dtype": "half a byte"}, torch.float32),
        ({"torch_dtype": None}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_mixed_dtypes_become_one_that_computes(folder, form, named, expected, caplog):  # noqa: F811
    state = mixed(weights(folder))
    write(folder, state, form)
    set_config(folder, **named)
    with caplog.at_level(logging.WARNING):
        loaded = Lumos.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    for name, parameter in loaded.state_dict().items():
        assert torch.equal(parameter, state[name].to(expected)), name
    assert f"are bfloat16 and float32; all are loaded as {str(expected)[6:]}" in caplog.text
    assert_runs(loaded)


def test_mixed_halves_take_the_dtype_that_holds_both(folder):  # noqa: F811
    write(folder, mixed(weights(folder), torch.float16), "safetensors")
    set_config(folder)
    loaded = Lumos.from_pretrained(folder)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_given_dtype_holds_for_all(folder, dtype, caplog):  # noqa: F811
    state = mixed(weights(folder))
    for form in ("safetensors", "bin"):
        write(folder, state, form)
        loaded = Lumos.from_pretrained(folder, dtype=dtype)
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert "all are loaded as" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bfloat16", torch.bool])
def test_a_dtype_that_no_model_has_is_refused(folder, dtype):  # noqa: F811
    with pytest.raises(ValueError, match=r"dtype must be None or one of torch\.float16, .*got"):
        Lumos.from_pretrained(folder, dtype=dtype)


def test_a_mixed_model_is_saved_so_that_nothing_is_lost(folder, model, tmp_path):  # noqa: F811
    model.config.extra["torch_dtype"] = "bfloat16"
    model.to(torch.bfloat16).model.norm.float()
    with torch.no_grad():
        model.model.norm.weight.fill_(1 + 2**-20)
    model.save_pretrained(tmp_path / "mixed")
    assert json.loads((tmp_path / "mixed" / "config.json").read_text())["torch_dtype"] == "float32"
    assert_same(Lumos.from_pretrained(tmp_path / "mixed"), model.float())


STRANGE = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("given", [None, torch.float32])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [*STRANGE, torch.complex64, torch.float8_e8m0fnu])
def test_weights_of_other_dtypes_are_refused_by_name(folder, form, dtype, given):  # noqa: F811
    state = weights(folder)
    state[LAYER] = torch.ones(64, 64).to(dtype)
    write(folder, state, form)
    with pytest.raises(CheckpointError) as caught:
        Lumos.from_pretrained(folder, dtype=given)
    name = "F8_E8M0" if form == "safetensors" and dtype == torch.float8_e8m0fnu else str(dtype)[6:]
    file = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    allowed = "not a dense tensor of float16, bfloat16, float32, float64"
    assert f"{allowed}: {LAYER} is {name} in {file}" in str(caught.value)
    assert "missing" not in str(caught.value)
    assert ("quantised" in str(caught.value)) == (dtype not in (torch.complex64, torch.bool))


def test_quantised_checkpoints_are_called_so(folder):  # noqa: F811
    state = weights(folder)
    for changes in (
        {LAYER: torch.ones(64, 64, dtype=torch.int8), f"{LAYER}_scale": torch.ones(64)},
        {LAYER: torch.ones(2048, 1, dtype=torch.uint8), f"{LAYER}.absmax": torch.ones(64)},
        {LAYER.replace("weight", "qweight"): torch.ones(8, 64, dtype=torch.int32)},
        {LAYER: torch.ones(64, 64).to(torch.float8_e4m3fn), f"{LAYER}_scale_inv": torch.ones(1, 1)},
    ):
        write(folder, state | changes, "safetensors")
        with pytest.raises(
            CheckpointError, match=r"the checkpoint is quantised \(.*self_attn.q_proj.*\): dequantise it"
        ):
            Lumos.from_pretrained(folder)


@pytest.mark.parametrize(("name", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E5M2FNUZ", 8), ("U16", 16), ("X9", 8)])
def test_dtypes_that_torch_may_not_have(folder, name, bits):  # noqa: F811
    size = 64 * bits // 8
    header = json.dumps({NORM: {"dtype": name, "shape": [64], "data_offsets": [0, size]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    with pytest.raises(CheckpointError, match=rf"({NORM} is \w+ in model\.safetensors|model\.safetensors is damaged)"):
        Lumos.from_pretrained(folder)


# Tensors that are no weights


def test_tensors_without_plain_values_are_refused_by_name(folder):  # noqa: F811
    state = weights(folder)
    for tensor, fault in (
        (torch.eye(64).to_sparse(), "is sparse (sparse_coo)"),
        (torch.eye(64).to_sparse_csr(), "is sparse (sparse_csr)"),
        (torch.empty(64, 64, device="meta"), "has no values (device meta)"),
        (torch.quantize_per_tensor(torch.eye(64), 0.1, 0, torch.qint8), "is qint8"),
    ):
        write(folder, state | {LAYER: tensor})
        with pytest.raises(CheckpointError) as caught:
            Lumos.from_pretrained(folder)
        assert f"{LAYER} {fault} in pytorch_model.bin" in str(caught.value)


def test_shards_of_a_distributed_model_are_refused_by_name(folder, model, tmp_path):  # noqa: F811
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    state = weights(folder)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard = distribute_tensor(state[LAYER], init_device_mesh("cpu", (1,)))
        with pytest.raises(CheckpointError, match=rf"{LAYER} is a DTensor, a shard: gather it"):
            save_with(model, tmp_path / "x", {LAYER: shard})
        write(folder, state | {LAYER: shard})
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin|is a DTensor, a shard: gather it"):
            Lumos.from_pretrained(folder)
    finally:
        dist.destroy_process_group()


def save_with(model, path, state):  # noqa: F811
    from lumos.checkpoint import save_pretrained

    save_pretrained(model, path, state_dict=model.state_dict() | state)


def test_empty_tensors_do_not_fit(folder):  # noqa: F811
    state = weights(folder)
    for form in ("safetensors", "bin"):
        write(folder, state | {NORM: torch.zeros(0), LAYER: torch.zeros(64, 0)}, form)
        with pytest.raises(
            CheckpointError, match=r"wrong shape: .*weight has shape \[.*0\], .*weight has shape \[.*0\]"
        ):
            Lumos.from_pretrained(folder)


# Indexes


def test_missing_shards_name_their_tensors(folder):  # noqa: F811
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for shard, message in (
        ("model-00001-of-00002.safetensors", f"has no model-00001-of-00002.safetensors, .* names for {NORM}"),
        ("..", "names the shard '..', which is not a file of its folder"),
        ("", "names the shard '', which is not"),
        ("/etc/passwd", "names the shard '/etc/passwd'"),
        ("a\0b", "names the shard"),
        (3, "names the shard 3"),
    ):
        index.write_text(json.dumps({"weight_map": {NORM: shard}}))
        with pytest.raises(CheckpointError, match=message):
            Lumos.from_pretrained(folder)
    for content in ("[]", '{"weight_map": ["a"]}', "{", "[" * 100_000, '{"weight_map": null}'):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=r"index\.json is not an index of shards"):
            Lumos.from_pretrained(folder)
