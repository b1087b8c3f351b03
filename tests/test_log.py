"""lumos/train/log.py and peak.py: what the lines say, when values are read, and what MFU is measured against."""

import io
import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from host_syncs import HostSync, NoHostSync
from test_nonfinite import BAD_STEP, GOOD_STEP, Run, small_model
from test_train import folder, tiny_preset  # noqa: F401

from lumos.parallel import Parallel
from lumos.train import TrainConfig, read_log, train
from lumos.train.log import RunLog, open_board
from lumos.train.peak import PUBLISHED, Peak, measured_flops
from lumos.train.step import StepStats

CPU = Parallel(torch.device("cpu"))


def stats(loss=2.0, frames=(1.0, math.nan), norm=3.0, targets=5, skipped=False):
    return StepStats(
        torch.tensor(loss),
        torch.tensor(frames),
        torch.tensor(norm),
        torch.tensor(targets, dtype=torch.float64),
        torch.tensor(skipped),
    )


def run_log(every=1, **options):
    log = RunLog(small_model().config, CPU, every)
    log.open(Peak(1e12, "a test's"), io.StringIO(), **options)
    return log


def add(log, number, **values):
    log.begin_step()
    return log.end_step(number, 1e-3 * number, stats(**values), GOOD_STEP, 0.25, [f"stream {number}"])


def lines(log):
    return [json.loads(line) for line in log.file.getvalue().splitlines()]


def test_a_line_says_what_the_step_measured():
    log = run_log()
    [line] = add(log, 7)
    assert lines(log) == [line]
    tokens = sum(batch.num_tokens for batch in GOOD_STEP)
    assert (line["step"], line["loss"], line["grad_norm"], line["lr"]) == (7, 2.0, 3.0, 7e-3)
    assert line["frame_losses"] == [1.0, None]
    assert (line["tokens"], line["targets"], line["skipped"], line["waste"]) == (tokens, 5, 0, 0.25)
    assert line["tokens_per_s"] == pytest.approx(tokens / line["seconds"], rel=0.5)
    assert line["peak_memory_gb"] > 0.01


def test_mfu_is_useful_flops_over_time_and_peak(monkeypatch):
    times = iter([10.0, 10.5])
    monkeypatch.setattr("lumos.train.log.time.perf_counter", lambda: next(times))
    log = run_log()
    [line] = add(log, 0)
    config = log.model
    flops = sum(config.training_flops(batch.layout, batch.num_targets) for batch in GOOD_STEP)
    assert line["seconds"] == 0.5
    assert line["mfu"] == pytest.approx(flops / 0.5 / 1e12, rel=1e-3)


def test_padding_is_no_useful_work(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr("lumos.train.log.time.perf_counter", lambda: next(times))
    log, padded = run_log(), [replace(batch, padding=20) for batch in GOOD_STEP]
    [with_padding, without] = (
        (log.begin_step(), log.end_step(0, 0.1, stats(), batches, 0.0, []))[1][0] for batches in (padded, GOOD_STEP)
    )
    assert without["tokens"] - with_padding["tokens"] == 40
    unused = 3 * log.model.forward_flops(40, 0, 0)
    assert (without["mfu"] - with_padding["mfu"]) * 1e12 == pytest.approx(unused, rel=1e-2)


def test_training_flops_of_frozen_weights_leave_their_gradients_out():
    config, batch = small_model().config, GOOD_STEP[0]
    pairs, targets, tokens = batch.layout.limits.visible_pairs(), batch.num_targets, batch.num_tokens
    matmuls = config.forward_flops(tokens, 0, targets)
    attention = config.forward_flops(0, pairs, 0)
    assert config.training_flops(batch.layout, targets) == 3 * matmuls + 3 * attention
    assert config.training_flops(batch.layout, targets, frozen=True) == 2 * matmuls + 3 * attention


def test_values_are_read_once_a_window_and_at_flush():
    log = run_log(every=3)
    assert add(log, 0) == add(log, 1) == []
    assert [line["step"] for line in add(log, 2)] == [0, 1, 2]
    assert add(log, 3) == []
    assert [line["step"] for line in lines(log)] == [0, 1, 2]
    assert [line["step"] for line in log.flush()] == [3]
    assert log.flush() == []
    assert [line["step"] for line in lines(log)] == [0, 1, 2, 3]


def test_steps_of_different_numbers_of_frames_share_a_window():
    log = run_log(every=3)
    add(log, 0, frames=(1.0,))
    add(log, 1, frames=(2.0, 3.0, 4.0), loss=9.0)
    got = add(log, 2, frames=(5.0, 6.0))
    assert [line["frame_losses"] for line in got] == [[1.0], [2.0, 3.0, 4.0], [5.0, 6.0]]
    assert [line["loss"] for line in got] == [2.0, 9.0, 2.0]


def test_skipped_steps_are_counted_and_the_first_is_kept():
    log = run_log(every=2)
    add(log, 0)
    add(log, 1, loss=math.nan, norm=math.inf, skipped=True)
    add(log, 2, skipped=True)
    log.flush()
    assert [line["skipped"] for line in lines(log)] == [0, 1, 2]
    assert lines(log)[1]["loss"] is None
    assert lines(log)[1]["grad_norm"] is None
    assert (log.bad.number, log.bad.batches) == (1, ["stream 1"])
    again = run_log()
    again.load_state_dict(json.loads(json.dumps(log.state_dict())))
    assert add(again, 3)[0]["skipped"] == 2


def test_no_step_of_a_window_waits_for_the_device():
    run, log = Run(stop=True), run_log(every=10)
    run.model.impl = "reference"
    values = [run.step(step) for step in (GOOD_STEP, BAD_STEP)]
    batches = [step[0].to("cpu") for step in (GOOD_STEP, BAD_STEP)]
    for batch in batches:
        batch.layout.limits.visible_pairs()
    log.model = FakeConfig()  # whose FLOPs are of the batches on the CPU, where reading costs nothing
    with NoHostSync():
        for number, value in enumerate(values):
            log.begin_step()
            assert log.end_step(number, 0.1, value, GOOD_STEP, 0.0, []) == []
        log._send()
        with pytest.raises(HostSync):
            float(values[0].loss)
    assert [line["step"] for line in log.flush()] == [0, 1]


class FakeConfig:
    def training_flops(self, layout, num_targets, frozen):
        return 1

    def forward_flops(self, tokens, pairs, targets):
        return 0


def test_the_board_gets_every_number():
    class Board:
        def __init__(self):
            self.seen = {}

        def add_scalar(self, tag, value, step):
            self.seen[tag] = (value, step)

    board = Board()
    log = run_log(board=board)
    [line] = add(log, 4)
    assert board.seen["loss"] == (2.0, 4)
    assert board.seen["frame_losses/0"] == (1.0, 4)
    assert "frame_losses/1" not in board.seen
    assert {name for name in board.seen if "/" not in name} == set(line) - {"step", "frame_losses"}


def test_tensorboard_reads_what_a_run_wrote(folder, tmp_path, tiny_preset):  # noqa: F811
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"data": (str(folder),), "out": str(tmp_path), "tensorboard": True}
    for steps in (2, 3):  # the second run goes on with the first
        lines = list(read_log(train(TrainConfig(**options, steps=steps), progress=False).log))
    board = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    seen = {event.step: event.value for event in board.Scalars("loss")}
    assert seen == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-5)
    header = json.loads((tmp_path / "log_header.json").read_text())
    assert (header["processes"], header["mfu_is_against"]) == (1, "matmul rate measured on this machine, float32")


def test_a_missing_tensorboard_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r"pip install 'lumos-kernels\[tensorboard\]'"):
        open_board(tmp_path, 0)


def test_peak_of_known_gpus_is_published(monkeypatch):
    def peak(name):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name)
        return Peak.of(torch.device("cuda"), torch.bfloat16)

    assert peak("NVIDIA H100 80GB HBM3") == Peak(989.4e12, "published dense bf16 peak of H100")
    assert peak("NVIDIA H100 PCIe").flops == 756e12
    assert peak("NVIDIA H200").flops == 989.4e12
    assert peak("NVIDIA H20").flops == 148e12
    assert peak("NVIDIA L40S").flops > peak("NVIDIA L40").flops > peak("NVIDIA L4").flops
    assert peak("NVIDIA GB200").flops == 2500e12


def test_every_published_name_is_reached():
    for name in PUBLISHED:
        assert next(known for known in PUBLISHED if known in name) == name


def test_elsewhere_the_peak_is_measured_and_says_so():
    peak = Peak.of(torch.device("cpu"), torch.float32)
    assert peak.source == "matmul rate measured on this machine, float32"
    assert 1e9 < peak.flops < 1e14
    assert measured_flops(torch.device("cpu"), torch.float32, seconds=0.0) > 0
