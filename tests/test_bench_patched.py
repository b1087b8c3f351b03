"""bench/patched_official.py on a checkout that holds the stand-in of the official model."""

import json
import sys
import types

import pytest
import torch

from bench import measure, patched_official
from lumos.tokens import VISUAL_START

PACKAGE = """
import math, torch
from official_double import TrainingModel, config as ChameleonXLLMXConfig

class ChameleonXLLMXForConditionalGeneration(TrainingModel):
    def __init__(self, config):
        super().__init__(config)
        self.model.vqmodel = torch.nn.Identity()

def get_mask_chedule(name):
    return lambda u: torch.cos(u * math.pi / 2)
"""
SMALL = ("--grid", "4x8", "--text", "5", "--hidden", "128", "--layers", "1", "--seconds", "0", "--threads", "1")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    folder = tmp_path / "clone" / "inner" / "model"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(PACKAGE)
    (folder / "configuration_xllmx_chameleon.py").touch()
    for name in ("transformers", "torchvision", "torchvision.transforms", "model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    del sys.modules["model"]
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path / "clone"
    sys.modules.pop("model", None)


def test_a_report_of_both_sides(checkout, capsys, monkeypatch, one_thread):
    children = []

    def child(module, arguments):
        children.append((module, arguments[-1], arguments[0]))
        return 7

    monkeypatch.setattr(patched_official.memory, "run_child", child)
    monkeypatch.chdir(checkout.parent)
    assert patched_official.main(["clone", *SMALL, "--frames", "2", "--batch", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 2 * (1 + 5 + 4 + 2 * (4 * 9 + 4) + 2)
    assert 0 <= result["gradient_difference"] < 1e-5
    assert set(result["seconds"]) == {"official", "patched"}
    assert result["extra_bytes"] == {"official": 7, "patched": 7}
    assert children == [("bench.patched_official", side, str(checkout)) for side in ("official", "patched")]


def test_the_peak_of_one_side(checkout, capsys, one_thread):
    assert patched_official.main([str(checkout), *SMALL, "--part", "patched"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found is None or found > 0


def test_a_step_that_differs_has_no_figure(checkout, monkeypatch, one_thread):
    real = patched_official.apply_lumos_kernels

    def wrong(model, **options):
        undo = real(model, **options)
        model.model.norm.weight.data.mul_(1.001)
        return undo

    monkeypatch.setattr(patched_official, "apply_lumos_kernels", wrong)
    with pytest.raises(RuntimeError, match=r"the patched step differs: .* by "):
        patched_official.main([str(checkout), *SMALL])


def test_a_folder_without_the_official_code_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a clone of Lumos"):
        patched_official.load(tmp_path)


def test_a_drawn_sample_is_a_document():
    ids = patched_official.drawn_sample(4, 8, 2, 5)
    assert ids.shape == (1, 92)
    assert ((ids >= VISUAL_START).sum() == 64).all()
    assert measure.relative_errors((ids,), (patched_official.drawn_sample(4, 8, 2, 5),)) == [0.0]
    assert ids.dtype == torch.int64
