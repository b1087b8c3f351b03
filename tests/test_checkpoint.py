import dataclasses
import fnmatch
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lumos.checkpoint import CheckpointError
from lumos.config import LumosConfig
from lumos.model import Lumos

CONFIG = {
    "vocab_size": 9344,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "visual_start": 9216,
    "mm_rope": True,
    "vq_config": {"embed_dim": 256, "channel_multiplier": [1, 1, 2]},
    "vocabulary_map": {"<s>": 0},
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Lumos(LumosConfig.from_dict(CONFIG))


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def assert_same(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].contiguous().view(torch.uint8), tensor.view(torch.uint8)), name


def names(path):
    return sorted(os.listdir(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", ["5GB", 300_000])
def test_saved_weights_load_bit_for_bit(model, tmp_path, dtype, size):
    model = model.to(dtype)
    with torch.no_grad():
        model.model.norm.weight[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    model.save_pretrained(tmp_path / "a" / "saved", max_shard_size=size)
    again = Lumos.from_pretrained(tmp_path / "a" / "saved")
    assert_same(again, model)
    assert again.config == dataclasses.replace(model.config, extra=again.config.extra)
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    files = names(tmp_path / "a" / "saved")
    if size == "5GB":
        assert files == ["config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "a" / "saved" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(model.state_dict())
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.state_dict().values())
        assert len(files) > 4
    assert names(tmp_path / "a") == ["saved"]


def test_loaded_models_train_and_leave_the_file_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    model = Lumos.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)  # over the very file that its weights came from
    assert_same(Lumos.from_pretrained(folder), model)


def test_unknown_config_keys_are_written_back(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["torch_dtype"] == "float32"
    Lumos.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == config | {"torch_dtype": "bfloat16"}


def test_dtype_casts_while_loading(folder, model):
    loaded = Lumos.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert_same(loaded, model.to(torch.bfloat16))


def as_bin(folder, sharded):
    """Turns a saved folder into what older official exports look like."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not sharded:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number, keys in enumerate((list(state)[:7], list(state)[7:]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({key: state[key] for key in keys}, folder / name)
        weight_map.update(dict.fromkeys(keys, name))
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files_load(folder, model, sharded):
    as_bin(folder, sharded)
    assert_same(Lumos.from_pretrained(folder), model)


def test_the_image_tokenizer_of_a_checkpoint_is_ignored(folder, model):
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.vqmodel.encoder.conv.weight": torch.ones(3)}, folder / "model.safetensors")
    assert_same(Lumos.from_pretrained(folder), model)
    as_bin(folder, sharded=False)
    assert_same(Lumos.from_pretrained(folder), model)


def test_subfolders_load(folder, model, tmp_path):
    os.rename(folder, tmp_path / "1B-sft")
    assert_same(Lumos.from_pretrained(tmp_path, subfolder="1B-sft"), model)
    with pytest.raises(FileNotFoundError, match="subfolder '3B' does not exist"):
        Lumos.from_pretrained(tmp_path, subfolder="3B")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_everything_that_does_not_fit_is_named_at_once(folder, form):
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    state["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(64, 65)
    state["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(state, folder / "model.safetensors")
    if form == "bin":
        as_bin(folder, sharded=False)
    with pytest.raises(CheckpointError) as caught:
        Lumos.from_pretrained(folder)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight;" in message
    assert "unexpected: model.layers.7.mlp.up_proj.weight;" in message
    assert "q_proj.weight has shape [64, 65], the config asks for [64, 64]" in message


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def truncate_bin(folder):
    as_bin(folder, sharded=False)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])


def pickle_code(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": print}, folder / "pytorch_model.bin")


def pickle_list(folder):
    (folder / "model.safetensors").unlink()
    torch.save([1], folder / "pytorch_model.bin")


def index_outside(folder):
    os.rename(folder / "model.safetensors", folder.parent / "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_garbage(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weights": 1}')


def shard_missing(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (truncate, CheckpointError, "model.safetensors is damaged"),
        (empty_file, CheckpointError, "model.safetensors is damaged"),
        (truncate_bin, CheckpointError, "pytorch_model.bin is damaged"),
        (pickle_code, CheckpointError, "pytorch_model.bin is damaged or no checkpoint"),
        (pickle_list, CheckpointError, "pytorch_model.bin must hold a dict of tensors"),
        (index_outside, CheckpointError, "names the shard '../model.safetensors', which is not a file of its folder"),
        (index_garbage, CheckpointError, "is not an index of shards: KeyError 'weight_map'"),
        (shard_missing, FileNotFoundError, "has no model-00001-of-00001.safetensors"),
        (lambda folder: (folder / "model.safetensors").unlink(), FileNotFoundError, "has no weights: none of model"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), ValueError, "config.json is not valid JSON"),
    ],
)
def test_damage_is_named(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message):
        Lumos.from_pretrained(folder)


def test_a_missing_path_is_no_hub_id(tmp_path):
    for path in (tmp_path / "none", str(tmp_path / "none"), "./none/there", "none"):
        with pytest.raises(FileNotFoundError, match="no checkpoint folder"):
            Lumos.from_pretrained(path)


def test_hub_ids_are_downloaded(folder, model, tmp_path, monkeypatch):
    import huggingface_hub

    hub, calls = tmp_path / "hub", []

    def snapshot_download(repository, revision=None, allow_patterns=None):
        """Copies the matching files, as the hub matches them: "*" crosses folders, a plain name does not."""
        calls.append((repository, revision))
        for file in (file for file in tmp_path.rglob("*") if file.is_file() and hub not in file.parents):
            name = str(file.relative_to(tmp_path))
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in allow_patterns):
                (hub / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, hub / name)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    shutil.copytree(folder, tmp_path / "other")
    forms = [
        lambda: None,
        lambda: model.save_pretrained(folder, "1MB"),
        lambda: (model.save_pretrained(folder), as_bin(folder, sharded=True)),
    ]
    for form in forms:
        form()
        shutil.rmtree(hub, ignore_errors=True)
        assert_same(Lumos.from_pretrained("owner/Lumos-1", subfolder="saved", revision="v1"), model)
        assert set(calls) == {("owner/Lumos-1", "v1")}
        assert {path.name for path in hub.iterdir()} == {"saved"}, "other subfolders stay where they are"


def test_a_failing_download_is_explained(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot_download(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match=r"owner/name is no local folder and could not be downloaded.*offline"):
        Lumos.from_pretrained("owner/name")


def test_a_failed_save_leaves_the_old_checkpoint(folder, model, monkeypatch):
    import lumos.checkpoint

    before = {file: (folder / file).read_bytes() for file in names(folder)}
    written = []

    def failing(tensors, path, metadata=None):
        if written:
            raise OSError("no space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(lumos.checkpoint, "save_file", failing)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder, max_shard_size="1MB")
    assert written
    assert {file: (folder / file).read_bytes() for file in names(folder)} == before
    assert names(folder.parent) == ["saved"]


def test_saving_over_a_checkpoint_replaces_it_and_keeps_other_files(folder, model, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "pytorch_model-00001-of-00002.bin").write_bytes(b"stale")
    model.save_pretrained(folder, max_shard_size="1MB")
    assert "model.safetensors" not in names(folder)
    assert "pytorch_model-00001-of-00002.bin" not in names(folder)
    assert {"tokenizer.json", "notes", "config.json"} <= set(names(folder))
    model.save_pretrained(folder)
    assert names(folder) == ["config.json", "model.safetensors", "notes", "tokenizer.json"]
    assert_same(Lumos.from_pretrained(folder), model)
    assert names(tmp_path) == ["saved"]


def test_bad_save_arguments_are_named(model, tmp_path):
    for size in ("5 apples", 0, True):
        with pytest.raises(ValueError, match="max_shard_size must be"):
            model.save_pretrained(tmp_path / "x", max_shard_size=size)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    assert names(tmp_path) == ["file"]
