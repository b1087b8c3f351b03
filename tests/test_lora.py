"""lumos/train/lora.py: adapters alone are trained, survive resuming, merge exactly, and are peft's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import folder, small_config  # noqa: F401

from lumos import Lumos, mask_tokens
from lumos.data import SampleFolder
from lumos.options import write_options
from lumos.train import TrainConfig, Trainer, read_log
from lumos.train.export import export
from lumos.train.loop import _make_model
from lumos.train.lora import TARGETS, add_lora

peft = pytest.importorskip("peft")


@pytest.fixture
def base(tmp_path):
    """A checkpoint to adapt."""
    torch.manual_seed(7)
    Lumos(small_config()).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def options(folder, base, out, **more):  # noqa: F811
    given = {"lr": 1e-2, "warmup": 0, "steps": 3, "lora_rank": 4, "lora_alpha": 8.0, "text_drop": 0.0}
    return TrainConfig(**{"data": (str(folder),), "init": str(base), "out": str(out), **given, **more})


def run(config):
    trainer = Trainer(config, progress=False)
    trainer.run()
    return trainer


def losses(out):
    return [line["loss"] for line in read_log(out / "log.jsonl")]


def hidden(model, folder):  # noqa: F811
    batch = mask_tokens(SampleFolder(folder)[0].ids[None], seeds=[0], classes=small_config().classes)
    with torch.no_grad():
        return model.eval()(batch.input_ids).hidden_states


def test_only_the_adapters_are_trained(folder, base, tmp_path):  # noqa: F811
    trainer = run(options(folder, base, tmp_path / "run", ema=0.0))
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-4] for name in trained} == set(TARGETS)
    assert {name.split(".")[-3] for name in trained} == {"lora_A", "lora_B"}
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(trained)
    before = Lumos.from_pretrained(base).state_dict()
    now = {name.replace(".base_layer", ""): tensor for name, tensor in trainer.model.state_dict().items()}
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert all(p.abs().sum() > 0 for name, p in trainer.model.named_parameters() if ".lora_B." in name)


def test_an_adapter_adds_nothing_before_it_is_trained(folder, base, tmp_path):  # noqa: F811
    model = Lumos.from_pretrained(base)
    want = hidden(model, folder)
    adapted = add_lora(model, options(folder, base, tmp_path))
    assert torch.equal(hidden(adapted, folder), want)


def test_the_exported_model_is_the_adapted_one(folder, base, tmp_path):  # noqa: F811
    trainer = run(options(folder, base, tmp_path / "run"))
    exported = Lumos.from_pretrained(tmp_path / "run" / "checkpoint")
    assert list(exported.state_dict()) == list(Lumos(small_config()).state_dict())
    want = hidden(trainer.model, folder)
    torch.testing.assert_close(hidden(exported, folder), want, rtol=1e-5, atol=1e-5)
    assert (want - hidden(Lumos.from_pretrained(base), folder)).abs().max() > 1e-2


def test_peft_reads_the_adapter(folder, base, tmp_path):  # noqa: F811
    trainer = run(options(folder, base, tmp_path / "run", lora_targets=("q_proj", "down_proj")))
    adapted = peft.PeftModel.from_pretrained(Lumos.from_pretrained(base), tmp_path / "run" / "adapter")
    want = hidden(trainer.model, folder)
    assert torch.equal(hidden(adapted, folder), want)
    own_names = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(hidden(merged, folder), want, rtol=1e-5, atol=1e-5)
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["base_model_name_or_path"]) == (4, str(base))
    names = set(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
    assert names == set(own_names), "the names that peft itself writes"


def test_a_resumed_run_goes_on_bit_for_bit(folder, base, tmp_path):  # noqa: F811
    run(options(folder, base, tmp_path / "whole", steps=4))
    run(options(folder, base, tmp_path / "parts", steps=2))
    run(options(folder, base, tmp_path / "parts", steps=4))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = (Lumos.from_pretrained(tmp_path / name / "checkpoint").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_checkpoint_of_the_state_exports_merged(folder, base, tmp_path, ema):  # noqa: F811
    run(options(folder, base, tmp_path / "run", ema=ema))
    export(tmp_path / "run", tmp_path / "again")
    again, exported = (Lumos.from_pretrained(tmp_path / name).state_dict() for name in ("again", "run/checkpoint"))
    assert all(torch.equal(again[name], exported[name]) for name in exported)


def test_the_loss_falls(folder, base, tmp_path):  # noqa: F811
    run(options(folder, base, tmp_path / "run", steps=30, documents=5))
    got = losses(tmp_path / "run")
    assert sum(got[-3:]) / 3 < got[0] - 0.1


def test_two_processes_train_the_adapters_and_the_average_of_one(folder, base, tmp_path, monkeypatch):  # noqa: F811
    common = {"steps": 3, "micro_batches": 2, "ema": 0.5, "lr": 1e-2}
    run(options(folder, base, tmp_path / "one", **common))
    config = options(folder, base, tmp_path / "two", **common)
    write_options(tmp_path / "two.yaml", config.to_dict())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "lumos.cli",
    ]
    done = subprocess.run(
        [*command, "train", "--config", str(tmp_path / "two.yaml")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert list(one) == list(two)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"init": None}, "lora_rank needs init"),
        ({"lora_rank": -1}, "lora_rank must be at least 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be > 0"),
        (
            {"lora_targets": ("q_proj", "lm_head")},
            "lora_targets must be some of .* got q_proj, lm_head; lm_head",
        ),
        ({"lora_targets": ()}, "got none"),
    ],
)
def test_bad_options_are_named(more, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"init": "x", "lora_rank": 4, **more})


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setattr("lumos.train.lora.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'lumos-kernels\[lora\]'"):
        TrainConfig(init="x", lora_rank=4)


def test_init_may_name_a_subfolder(base, tmp_path, folder):  # noqa: F811
    model = _make_model(options(folder, f"{tmp_path}:{base.name}", tmp_path, lora_rank=0))
    want = Lumos.from_pretrained(base).state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in model.state_dict().items())
