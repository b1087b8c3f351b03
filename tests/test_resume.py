"""lumos/train/{state,resume,signals,export,loop}.py: a run that stopped goes on as if it had not."""

import json
import os
import resource
import signal
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
from training import assert_same, finish, get_stuck, losses_of, start, state_of, tiny_model, trainer, write_samples

from lumos import Lumos
from lumos.cli import main
from lumos.train import EXIT_STOPPED, ResumeError, SaveError, StoppedError, export, state
from lumos.train.state import checkpoint_step, complete_checkpoints, newest_checkpoint


class Crash(Exception):
    pass


@pytest.fixture
def options(tmp_path):
    packed = {"token_budget": 400, "look_ahead": 6, "micro_batches": 2}
    return {"data": (write_samples(tmp_path / "tokens"),), "out": str(tmp_path / "run"), **packed}


def crash_after(run, steps):
    """Runs until so many steps are done; what they did is left as a killed process would leave it."""

    def check(stats):
        if run.step + 1 == steps:
            raise Crash

    run.after_step.append(check)
    with pytest.raises(Crash):
        run.run()


@pytest.mark.parametrize("more", [{}, {"ema": 0.9, "schedule": "cosine"}, {"lora_rank": 2, "ema": 0.5}])
def test_a_continued_run_is_the_uninterrupted_one_bit_for_bit(options, tmp_path, more):
    if "lora_rank" in more:
        trainer(**{**options, "out": str(tmp_path / "begin")}, steps=1).run()
        more = {**more, "init": str(tmp_path / "begin" / "checkpoint")}
    options = {**options, **more}
    whole = {**options, "out": str(tmp_path / "whole")}
    trainer(**whole, steps=11, checkpoint_every=4).run()
    crash_after(trainer(**options, steps=11, checkpoint_every=4), 7)
    assert [line["step"] for line in losses_of(options["out"])] == list(range(6))
    run = trainer(**options, steps=11, checkpoint_every=4)
    seen = []
    run.after_step.append(lambda stats: seen.append(run.step))
    run.run()
    assert seen == list(range(4, 11)), "continued from the checkpoint of 4 steps"
    assert losses_of(options["out"]) == losses_of(whole["out"])
    assert_same(state_of(options["out"], tmp_path), state_of(whole["out"], tmp_path))
    weights, expected = (Lumos.from_pretrained(f"{out}/checkpoint") for out in (options["out"], whole["out"]))
    assert_same(dict(weights.state_dict()), dict(expected.state_dict()))


def test_a_finished_run_can_be_made_longer(options, tmp_path):
    whole = {**options, "out": str(tmp_path / "whole")}
    trainer(**whole, steps=6).run()
    trainer(**options, steps=4).run()
    summary = trainer(**options, steps=6).run()
    assert summary.steps == 6
    assert losses_of(options["out"]) == losses_of(whole["out"])
    assert_same(state_of(options["out"], tmp_path), state_of(whole["out"], tmp_path))
    with pytest.raises(ValueError, match="steps 3 lies before the 6 steps"):
        trainer(**options, steps=3).run()


def test_each_process_draws_its_own_dropout(options):
    run, states = trainer(**options), []
    for run.parallel in (replace(run.parallel, rank=rank) for rank in (0, 1, 0)):
        run._seed_process()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


def test_a_longer_run_follows_its_own_schedule(options):
    falling = {**options, "schedule": "linear", "warmup": 0}
    trainer(**falling, steps=2).run()
    trainer(**falling, steps=5).run()
    assert [line["lr"] for line in losses_of(options["out"])] == pytest.approx([0.005, 0, 0.004, 0.002, 0])


def test_another_run_is_refused_and_what_differs_is_named(options):
    trainer(**options, steps=2).run()
    log = losses_of(options["out"])
    with pytest.raises(ValueError, match=r"lr was 0.01 and is now 0.02; ") as refused:
        trainer(**{**options, "seed": 3, "lr": 0.02}, steps=2).run()
    assert "seed was 0 and is now 3" in str(refused.value)
    with pytest.raises(ValueError, match="resume is never"):
        trainer(**options, steps=2, resume="never").run()
    assert losses_of(options["out"]) == log
    trainer(**options, steps=1, seed=3, overwrite=True).run()
    assert losses_of(options["out"]) != log[:1]
    assert [path.name for path in complete_checkpoints(f"{options['out']}/state")] == ["step-00000001"]


def test_a_restart_by_torchrun_goes_on_where_overwrite_would_start_anew(options, monkeypatch):
    crash_after(trainer(**options, steps=4, checkpoint_every=2, overwrite=True), 4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = trainer(**options, steps=4, checkpoint_every=2, overwrite=True)
    seen = []
    run.after_step.append(lambda stats: seen.append(run.step))
    run.run()
    assert seen == [2, 3]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_restart_by_torchrun_goes_on_where_a_named_checkpoint_would_start_again(
    options, tmp_path, monkeypatch, overwrite
):
    trainer(**options, steps=2).run()
    branch = {**options, "out": str(tmp_path / "branch"), "resume": options["out"], "overwrite": overwrite}
    crash_after(trainer(**branch, steps=8, checkpoint_every=2), 7)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run, seen = trainer(**branch, steps=8, checkpoint_every=2), []
    run.after_step.append(lambda stats: seen.append(run.step))
    run.run()
    assert seen == [6, 7]
    assert [line["step"] for line in losses_of(branch["out"])] == list(range(2, 8))


def test_a_checkpoint_can_be_named(options, tmp_path):
    trainer(**options, steps=6, checkpoint_every=2, keep_checkpoints=9).run()
    whole, last = losses_of(options["out"]), state_of(options["out"], tmp_path)
    run = trainer(**options, steps=6, resume=f"{options['out']}/state/step-00000002")
    seen = []
    run.after_step.append(lambda stats: seen.append(complete_checkpoints(f"{options['out']}/state")))
    run.run()
    assert len(seen) == 4
    assert [path.name for path in seen[0]] == ["step-00000002"], "those of later steps are no longer of this run"
    assert losses_of(options["out"]) == whole
    assert_same(state_of(options["out"], tmp_path), last)

    branch = {**options, "out": str(tmp_path / "branch"), "lr": 0.03}
    with pytest.warns(UserWarning, match="lr was 0.01 and is now 0.03"):
        trainer(**branch, steps=8, resume=options["out"]).run()
    assert [(line["step"], line["lr"]) for line in losses_of(branch["out"])] == [(6, 0.03), (7, 0.03)]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        trainer(**branch, steps=8, resume=str(tmp_path / "nowhere")).run()
    with pytest.raises(ValueError, match="none of its checkpoints"):
        trainer(**branch, steps=9, resume=options["out"]).run()


def test_a_renamed_checkpoint_can_be_named_and_replaces_another_run(options, tmp_path):
    trainer(**options, steps=4).run()
    os.rename(f"{options['out']}/state/step-00000004", tmp_path / "best")
    other = {**options, "out": str(tmp_path / "other")}
    trainer(**other, seed=3, steps=5).run()
    assert trainer(**other, steps=6, resume=str(tmp_path / "best"), overwrite=True).run().steps == 6
    assert [line["step"] for line in losses_of(other["out"])] == [4, 5], "no line of the run that was replaced"


def test_weights_that_no_checkpoint_goes_on_from_are_not_replaced_unasked(options, tmp_path):
    trainer(**options, steps=2, checkpoint_every=0).run()
    with pytest.raises(ValueError, match="has ended and kept no checkpoint to go on from"):
        trainer(**options, steps=2, checkpoint_every=0).run()
    assert Lumos.from_pretrained(tmp_path / "run" / "checkpoint")
    assert trainer(**options, steps=2, checkpoint_every=0, overwrite=True).run().steps == 2


def test_a_log_of_which_a_power_failure_left_zeros_is_cut_there(options):
    crash_after(trainer(**options, steps=6, checkpoint_every=2), 6)
    newest = checkpoint_step(newest_checkpoint(f"{options['out']}/state"))
    with open(f"{options['out']}/log.jsonl", "rb+") as log:
        lines = log.readlines()
        log.seek(sum(map(len, lines[:newest])))
        log.write(bytes(len(lines[newest]) - 20))
    trainer(**options, steps=6, checkpoint_every=2).run()
    assert [line["step"] for line in losses_of(options["out"])] == list(range(6))


def test_a_checkpoint_of_another_device_is_continued(options, monkeypatch):
    """... without its random states."""
    trainer(**options, steps=2).run()
    run = trainer(**options, steps=3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(16, dtype=torch.uint8))
    run.device = torch.device("cuda")
    run._resume(newest_checkpoint(f"{options['out']}/state"))
    assert run.step == 2


def test_what_a_kill_left_is_no_checkpoint_and_goes_at_the_next_save(options):
    crash_after(trainer(**options, steps=6, checkpoint_every=2), 4)
    folder = f"{options['out']}/state"
    for name in (".step-00000004.partial", ".step-00000001.old"):
        os.makedirs(f"{folder}/{name}/sub")
    with open(f"{folder}/.step-00000004.partial/__0_0.distcp", "w") as file:
        file.write("torn")
    with open(f"{options['out']}/log.jsonl", "a") as log:
        log.write('{"step": 3, "lo')
    os.makedirs(f"{options['out']}/.checkpoint.new-1")
    assert newest_checkpoint(folder).name == "step-00000002"
    trainer(**options, steps=4, checkpoint_every=2).run()
    assert sorted(os.listdir(folder)) == ["step-00000002", "step-00000004"]
    assert [line["step"] for line in losses_of(options["out"])] == [0, 1, 2, 3]
    assert ".checkpoint.new-1" not in os.listdir(options["out"])


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(options, keep):
    trainer(**options, steps=7, checkpoint_every=1, keep_checkpoints=keep).run()
    names = [path.name for path in complete_checkpoints(f"{options['out']}/state")]
    assert names == [f"step-{step:08d}" for step in range(8 - keep, 8)]
    assert len(os.listdir(f"{options['out']}/state")) == keep


def test_two_runs_do_not_share_a_folder(options):
    [process] = start({**options, "steps": 10**6}, prepare=get_stuck)
    wait_for_lines(options["out"], 2)
    log = losses_of(options["out"])
    try:
        with pytest.raises(ValueError, match="another process is training in"):
            trainer(**options, steps=4).run()
    finally:
        process.kill()
        process.join()
    assert losses_of(options["out"]) == log
    assert trainer(**options, steps=4).run().steps == 4


def test_a_disk_that_takes_no_more_gives_a_named_error_and_leaves_the_checkpoint_before(options):
    run = trainer(**options, steps=9, checkpoint_every=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(stats):
        if run.step == 4:  # files end at a megabyte from here on, as at a full disk
            while newest_checkpoint(run.out / "state") is None:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))

    run.after_step.append(fill)
    try:
        with pytest.raises(SaveError, match=r"step-00000006 could not be written: .*step-00000003 is complete"):
            run.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(f"{options['out']}/state") == ["step-00000003"], "the failed one frees its space"
    assert trainer(**options, steps=9, checkpoint_every=3).run().steps == 9


def test_a_folder_that_cannot_be_written_gives_a_named_error(options):
    run = trainer(**options, steps=4, checkpoint_every=2)
    run.out.mkdir()

    def block(stats):
        (run.out / "state").touch()

    run.after_step.append(block)
    with pytest.raises(SaveError, match=r"state/step-00000002 could not be written: .*there is no earlier one"):
        run.run()


def test_steps_go_on_while_a_checkpoint_is_written_and_it_holds_the_state_of_its_step(options, tmp_path, monkeypatch):
    trainer(**options, steps=2, export="none").run()
    expected = state_of(options["out"], tmp_path)

    written, steps = threading.Event(), []
    write_data = state._Writer.write_data

    def slow(self, plan, planner):
        assert written.wait(60)
        return write_data(self, plan, planner)

    monkeypatch.setattr(state._Writer, "write_data", slow)
    run = trainer(**{**options, "out": str(tmp_path / "slow")}, steps=6, checkpoint_every=2, keep_checkpoints=9)

    def release(stats):
        steps.append(run.step)
        if run.step == 3:
            assert complete_checkpoints(tmp_path / "slow" / "state") == []
            written.set()

    run.after_step.append(release)
    run.run()
    assert steps == list(range(6))
    assert_same(state_of(tmp_path / "slow" / "state" / "step-00000002", tmp_path), expected)


def test_nothing_is_complete_before_it_is_synced(options, monkeypatch):
    """Every file of a checkpoint, its folder and the log are synced before the rename, the parent after it."""
    synced, renamed = [], []
    fsync, rename = os.fsync, os.rename

    def note_sync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def note_rename(source, target):
        if str(source).endswith(".partial"):
            renamed.append((set(os.listdir(source)), list(synced)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    trainer(**options, steps=1, export="none").run()
    [(files, before)] = renamed
    partial = f"{options['out']}/state/.step-00000001.partial"
    assert {"run.json", ".metadata", "__0_0.distcp"} == files
    for path in ("run.json", "__0_0.distcp"):
        assert f"{partial}/{path}" in before
    assert any(path.startswith(f"{partial}/.metadata") for path in before)  # written under another name
    assert before.index(partial) > max(before.index(f"{partial}/{name}") for name in ("run.json", "__0_0.distcp"))
    assert f"{options['out']}/log.jsonl" in before
    assert synced[-1] == f"{options['out']}/state"


def test_a_checkpoint_half_removed_is_none(options, monkeypatch):
    trainer(**options, steps=2, checkpoint_every=1, keep_checkpoints=9).run()
    first, second = complete_checkpoints(f"{options['out']}/state")

    def killed(path, **_):
        os.remove(path / "__0_0.distcp")
        raise Crash

    monkeypatch.setattr(state.shutil, "rmtree", killed)
    with pytest.raises(Crash):
        state.remove_checkpoint(first)
    assert complete_checkpoints(first.parent) == [second]


def test_options_are_written_whole_or_not_at_all(options, monkeypatch):
    trainer(**options, steps=1).run()

    def killed(path, content):
        path.write_text('{"lr":')
        raise Crash

    monkeypatch.setattr("lumos.train.resume.write_options", killed)
    with pytest.raises(Crash):
        trainer(**options, steps=2).run()
    monkeypatch.undo()
    assert trainer(**options, steps=2).run().steps == 2


def test_damaged_checkpoints_are_named(options):
    trainer(**options, steps=2).run()
    checkpoint = newest_checkpoint(f"{options['out']}/state")
    data = (checkpoint / "__0_0.distcp").read_bytes()
    (checkpoint / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    with pytest.raises(ResumeError, match="step-00000002 cannot be continued from"):
        trainer(**options, steps=3).run()
    (checkpoint / "run.json").write_text("{")
    with pytest.raises(ResumeError, match=r"run.json cannot be read"):
        trainer(**options, steps=3).run()


def test_a_part_that_is_added_is_kept(options):
    class Counter:
        count = 0

        def state_dict(self):
            return {"count": torch.tensor(self.count)}

        def load_state_dict(self, state):
            self.count = int(state["count"])

    def add(run):
        run.parts["counter"] = counter = Counter()
        run.after_step.append(lambda stats: setattr(counter, "count", counter.count + 1))
        return counter

    run = trainer(**options, steps=5, checkpoint_every=3)
    add(run)
    crash_after(run, 5)
    run = trainer(**options, steps=5, checkpoint_every=3)
    counter = add(run)
    run.run()
    assert counter.count == 5


def test_runs_do_without_checkpoints(options):
    trainer(**options, steps=2, checkpoint_every=0).run()
    assert sorted(os.listdir(options["out"])) == [
        ".lock",
        "checkpoint",
        "log.jsonl",
        "log_header.json",
        "train.json",
        "train.yaml",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_the_official_layout(options, tmp_path, dtype, capsys):
    trainer(**options, steps=2, export="none").run()
    assert not (tmp_path / "run" / "checkpoint").exists()
    assert main(["export", options["out"], "--out", str(tmp_path / "weights"), "--dtype", dtype]) == 0
    assert str(tmp_path / "weights") in capsys.readouterr().out
    weights = Lumos.from_pretrained(tmp_path / "weights").state_dict()
    expected = state_of(options["out"], tmp_path)["model"]
    assert_same(dict(weights), {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()})
    config = json.loads((tmp_path / "weights" / "config.json").read_text())
    assert (config["torch_dtype"], config["hidden_size"]) == (dtype, 8)
    assert main(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2


def test_export_takes_the_tokenizer_along(options, tmp_path):
    trainer(**options, steps=1).run()
    begin = tmp_path / "run" / "checkpoint"
    for name in ("tokenizer.json", "notes.txt"):
        (begin / name).write_text("{}")
    trainer(**{**options, "out": str(tmp_path / "tuned")}, steps=1, init=str(begin)).run()
    for out in (tmp_path / "tuned" / "checkpoint", export(tmp_path / "tuned", tmp_path / "again")):
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_behind_a_checkpoint(options, tmp_path, number):
    whole = {**options, "out": str(tmp_path / "whole")}
    trainer(**whole, steps=40, checkpoint_every=1000).run()
    [process] = start({**options, "steps": 40, "checkpoint_every": 1000})
    wait_for_lines(options["out"], 3)
    os.kill(process.pid, number)
    assert finish([process]) == [EXIT_STOPPED]
    steps = len(losses_of(options["out"]))
    assert 3 <= steps < 40
    assert newest_checkpoint(f"{options['out']}/state").name == f"step-{steps:08d}"
    trainer(**options, steps=40, checkpoint_every=1000).run()
    assert losses_of(options["out"]) == losses_of(whole["out"])
    assert_same(state_of(options["out"], tmp_path), state_of(whole["out"], tmp_path))


def test_a_second_signal_stops_at_once(options):
    [process] = start({**options, "steps": 10**6}, prepare=get_stuck)
    wait_for_lines(options["out"], 2)
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGTERM)  # as torchrun hands on a signal of the terminal: the same request
    time.sleep(1.2)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], 10) == [-signal.SIGTERM]


def test_a_document_that_is_too_long_for_the_model_is_named(options):
    """... from its index, on every process: a layout on a GPU is not looked at."""
    with pytest.raises(ValueError, match=r"sample \d of .*tokens has \d+ tokens, more than max_position_embeddings 90"):
        trainer(replace(tiny_model(), max_position_embeddings=90), **options, steps=1).run()


def test_a_run_that_ends_early_closes_its_board(options, monkeypatch):
    board = mock.Mock()
    monkeypatch.setattr("lumos.train.loop.open_board", lambda folder, step: board)
    crash_after(trainer(**options, steps=3, tensorboard=True), 2)
    board.close.assert_called_once_with()


@pytest.mark.parametrize("anew", [{"overwrite": True}, {"resume": "never"}])
def test_a_stopped_run_tells_what_to_change_in_a_command_that_would_start_anew(options, anew):
    run = trainer(**options, steps=9, **anew)
    run.after_step.append(lambda stats: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match=r"the command with resume auto and without overwrite goes on from .*00001"):
        run.run()


def test_the_command_line_stops_with_its_own_exit_code(options, monkeypatch, capsys):
    def stop_early(stats):
        os.kill(os.getpid(), signal.SIGTERM)

    run = trainer(**options, steps=9)
    run.after_step.append(stop_early)
    monkeypatch.setattr("lumos.train.train", lambda config: run.run())
    assert main(["train", "--data", *options["data"], "--steps", "9"]) == EXIT_STOPPED == 75
    error = capsys.readouterr().err
    assert "stopped after 1 of 9 steps" in error
    assert "the same command goes on from" in error
    assert "step-00000001" in error
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def wait_for_lines(out, count, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"{out}/log.jsonl") as log:
                if sum(line.endswith("\n") for line in log) >= count:
                    return
        except FileNotFoundError:
            pass
        time.sleep(0.005)
    raise AssertionError(f"no {count} lines in {out}/log.jsonl after {seconds} s")
