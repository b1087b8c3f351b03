"""DDP, FSDP1, FSDP2 and activation offload around Lumos on two ranks: the gradients are those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import wrapper_runs
from wrapper_runs import CASES

SCRIPT = Path(wrapper_runs.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    paths = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, SCRIPT, out], env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "returned a view tensor" not in done.stderr, "FSDP2 loses the gather before backward of such an output"
    return out


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(folder, name):
    if "adapters" in name:
        pytest.importorskip("peft")
    ranks = [torch.load(folder / f"{name}.{rank}.pt") for rank in range(wrapper_runs.RANKS)]
    assert not any(isinstance(rank, str) for rank in ranks), ranks
    expected = wrapper_runs.alone(name)
    for rank in ranks:
        for step, found in enumerate(rank):
            assert {key for key, gradient in found.items() if gradient.any()} <= expected.keys()
            assert expected.keys() <= found.keys()
            if "bfloat16" not in name:
                for key, gradient in expected.items():
                    error = float((found[key] - gradient).norm() / gradient.norm())
                    assert error <= 1e-10, f"step {step}, {key} is {error:.1e} off"
                continue
            rounded = wrapper_runs.alone(name, torch.bfloat16)
            exact, ours, theirs = (
                torch.cat([grads[key].double().flatten() for key in expected]) for grads in (expected, found, rounded)
            )
            assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + torch.finfo(torch.bfloat16).eps * exact.norm()


def test_every_parameter_has_a_gradient_to_compare():
    assert all(gradient.any() for gradient in wrapper_runs.alone("ddp").values())
    assert len(wrapper_runs.alone("ddp")) == len(list(wrapper_runs.make_model().parameters()))
