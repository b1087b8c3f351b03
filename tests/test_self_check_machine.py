"""The facts of a machine on which a verdict of the self-check depends, and the GPUs that are refused by name."""

from types import SimpleNamespace

import pytest
import torch

from lumos_kernels import cache, dispatch, self_check
from lumos_kernels.dispatch import Problem


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gfx942", "runs NVIDIA GPUs, not gfx942 under ROCm"),
        ("sm_75", "needs compute capability 8.0 or newer, and this GPU is sm_75"),
        ("sm_80", None),
        ("sm_120", None),
    ],
)
def test_gpus_that_the_kernels_cannot_run_on_are_refused_by_name(arch, reason):
    problem = Problem("cuda", torch.bfloat16, 64, arch, 0)
    assert dispatch.refuses_architecture(problem) == reason
    if reason is not None:
        assert dispatch.ops()["frame_attention"].refusal("flash", problem) == reason
        assert dispatch.runs_triton(problem) == reason


def test_the_driver_is_read_from_the_kernel_module(monkeypatch, tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 2025\nGCC version: 12\n")
    monkeypatch.setattr(self_check, "DRIVER_FILE", file)
    assert self_check.driver() == "580.82.07"


def test_rocm_is_told_by_its_architecture(monkeypatch):
    dispatch.architecture.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(gcnArchName="gfx942:sramecc+"))
    assert dispatch.architecture(0) == "gfx942"
    dispatch.architecture.cache_clear()


def test_the_compilers_settings_are_part_of_the_machine(monkeypatch):
    monkeypatch.setattr(self_check, "gpu_facts", lambda gpu: {"gpu": "Pretend"})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" not in self_check.machine(0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert self_check.machine(0)["TRITON_INTERPRET"] == "1"


def test_the_code_digest_covers_sources_and_measured_configurations(monkeypatch, tmp_path):
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path))
    self_check.code_digest.cache_clear()
    before = self_check.code_digest()
    cache.write("frame_attention_tuned.json", {"forward": 1})
    self_check.code_digest.cache_clear()
    assert self_check.code_digest() != before
    self_check.code_digest.cache_clear()
