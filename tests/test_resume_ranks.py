"""Resuming on several processes (gloo): the same number bit for bit, another to rounding; kills and signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training import (
    EXIT_STOPPED,
    REFUSED,
    UNSAVED,
    assert_same,
    fill_the_disk_of_the_last_process,
    finish,
    losses_of,
    start,
    state_of,
    tiny_model,
    write_samples,
)

from lumos import Lumos
from lumos.train import export
from lumos.train.state import newest_checkpoint, read_description

STEPS = 6


@pytest.fixture
def options(tmp_path):
    packed = {"token_budget": 400, "look_ahead": 6, "micro_batches": 4}
    saved = {"steps": STEPS, "checkpoint_every": 3, "keep_checkpoints": 9}
    return {"data": (write_samples(tmp_path / "tokens"),), "out": str(tmp_path / "run"), **packed, **saved}


def without_random_states(state):
    return {name: part for name, part in state.items() if name != "random"}


def test_two_processes_go_on_bit_for_bit(options, tmp_path):
    assert finish(start(options, ranks=2)) == [0, 0]
    again = {**options, "out": str(tmp_path / "again"), "resume": f"{options['out']}/state/step-00000003"}
    assert finish(start(again, ranks=2)) == [0, 0]
    assert losses_of(again["out"]) == losses_of(options["out"])[3:]
    assert_same(state_of(again["out"], tmp_path), state_of(options["out"], tmp_path))
    random = state_of(options["out"], tmp_path)["random"]
    assert sorted(random) == ["0", "1"]
    assert not torch.equal(random["0"]["cpu"], random["1"]["cpu"])


@pytest.mark.parametrize(
    ("before", "after", "grid"),
    [(2, 1, {}), (1, 2, {}), (2, 4, {}), (2, 4, {"replicate": 2, "context": 2})],
    ids=["2-1", "1-2", "2-4", "2-4-hsdp-context"],
)
def test_another_number_of_processes_goes_on_to_rounding(options, tmp_path, before, after, grid):
    model = tiny_model(dropout=0.0, kv_heads=2)
    assert set(finish(start(options, before, model))) == {0}
    assert read_description(newest_checkpoint(f"{options['out']}/state"))["world_size"] == before
    again = {**options, "out": str(tmp_path / "again"), "resume": f"{options['out']}/state/step-00000003", **grid}
    assert set(finish(start(again, after, model))) == {0}
    state, expected = (without_random_states(state_of(out, tmp_path)) for out in (again["out"], options["out"]))
    assert_same(state["batches"], expected["batches"])
    # Adam divides a gradient by its size: where the true one is nearly zero (k_norm.bias), its rounding is an update.
    assert_same(state, expected, rtol=1e-4)
    for line, whole in zip(losses_of(again["out"]), losses_of(options["out"])[3:], strict=True):
        assert line["step"] == whole["step"]
        assert line["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_a_checkpoint_of_two_processes_is_exported_by_one(options, tmp_path):
    assert finish(start({**options, "steps": 2}, ranks=2)) == [0, 0]
    exported = Lumos.from_pretrained(export(options["out"], tmp_path / "weights"))
    at_the_end = Lumos.from_pretrained(f"{options['out']}/checkpoint")
    assert_same(dict(exported.state_dict()), dict(at_the_end.state_dict()))
    assert_same(dict(exported.state_dict()), state_of(options["out"], tmp_path)["model"])


def test_all_processes_refuse_what_the_first_refuses(options):
    assert finish(start({**options, "steps": 1}, ranks=2)) == [0, 0]
    assert finish(start({**options, "steps": 1, "seed": 5}, ranks=2), seconds=60) == [REFUSED, REFUSED]


def test_what_one_process_cannot_write_ends_all_of_them(options):
    processes = start({**options, "steps": 9}, ranks=2, prepare=fill_the_disk_of_the_last_process)
    assert finish(processes, seconds=60) == [UNSAVED, UNSAVED]
    assert os.listdir(f"{options['out']}/state") == ["step-00000003"]


def test_a_signal_to_one_process_stops_all_of_them_at_one_step(options):
    processes = start({**options, "steps": 400, "checkpoint_every": 1000}, ranks=2)
    wait_for_lines(options["out"], 3)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes, seconds=60) == [EXIT_STOPPED, EXIT_STOPPED]
    steps = len(losses_of(options["out"]))
    assert newest_checkpoint(f"{options['out']}/state").name == f"step-{steps:08d}"
    assert steps < 400


def test_torchrun_restarts_a_run_of_which_a_process_was_killed(options, tmp_path):
    assert finish(start(options, ranks=2)) == [0, 0]
    killed = {**options, "out": str(tmp_path / "killed")}
    torchrun = run_torchrun({**killed, "dies_after": 4}, "--max-restarts", "1")
    assert wait_for(torchrun, 60) == 0
    assert losses_of(killed["out"]) == losses_of(options["out"])
    assert_same(state_of(killed["out"], tmp_path), state_of(options["out"], tmp_path))


def test_a_signal_to_torchrun_stops_the_run_behind_a_checkpoint(options, tmp_path):
    out = {**options, "steps": 4000, "checkpoint_every": 10000}
    torchrun = run_torchrun(out)
    wait_for_lines(options["out"], 3)
    torchrun.send_signal(signal.SIGTERM)
    assert wait_for(torchrun, 60) != 0
    steps = len(losses_of(options["out"]))
    assert newest_checkpoint(f"{options['out']}/state").name == f"step-{steps:08d}"


def wait_for(torchrun, seconds):
    """Its exit code; a run that hangs is ended with its processes."""
    try:
        return torchrun.wait(seconds)
    finally:
        if torchrun.poll() is None:
            torchrun.terminate()
            torchrun.wait(40)


def run_torchrun(options, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    script = str(Path(__file__).parent / "training.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([*command, script, json.dumps(options)], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_lines(out, count, seconds=60):
    end = time.monotonic() + seconds
    log = Path(out) / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end, f"no {count} lines in {log} after {seconds} s"
        time.sleep(0.005)
