"""A training process killed by SIGKILL at random moments, while it writes checkpoints among them, loses nothing."""

import contextlib
import random
import time

import pytest
from training import assert_same, finish, losses_of, start, state_of, trainer, write_samples

from lumos import Lumos
from lumos.train.state import checkpoint_step, complete_checkpoints

PACKED = {"token_budget": 400, "look_ahead": 6, "micro_batches": 2}


def unfinished(run):
    """What is being written, or was when a process was killed."""
    found = set()
    for path in (run / "state").glob(".step-*"):
        with contextlib.suppress(FileNotFoundError):
            found.add((path.name, path.stat().st_ino, path.stat().st_ctime_ns))
    return found


def lines(run):
    """Finished lines of the log; a run that was just started has yet to cut it."""
    try:
        return (run / "log.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def kill_somewhere(process, run, chance):
    """SIGKILL at a random moment: while starting, between steps, or while a checkpoint is being written."""
    begun, kind, older = time.monotonic(), chance.random(), unfinished(run)
    newest = max(map(checkpoint_step, complete_checkpoints(run / "state")), default=0)

    def reached():
        if kind < 0.15:  # anywhere, importing and building included
            return time.monotonic() - begun > delay
        if kind < 0.5:
            return any(checkpoint_step(path) > newest for path in complete_checkpoints(run / "state"))
        return bool(unfinished(run) - older)

    delay = chance.uniform(0, 1.5)
    while not reached():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() - begun < 60
        time.sleep(0.0005)
    if kind >= 0.15:
        time.sleep(chance.uniform(0, 0.1 if kind < 0.5 else 0.03))
    process.kill()
    process.join()
    assert process.exitcode == -9, "the run ended before it was killed"


@pytest.mark.parametrize(
    ("kills", "every", "steps"),
    [
        (3, 1, 24),
        pytest.param(20, 1, 120, marks=pytest.mark.slow),
        pytest.param(20, 5, 260, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_is_the_uninterrupted_one(tmp_path, kills, every, steps, record_property):
    options = {"data": (write_samples(tmp_path / "tokens"),), "steps": steps, "checkpoint_every": every, **PACKED}
    run, whole, chance = tmp_path / "run", tmp_path / "whole", random.Random(kills * every)
    trainer(**options, out=str(whole)).run()
    lost, hit = [], 0
    for _ in range(kills):
        older = unfinished(run)
        [process] = start({**options, "out": str(run)})
        kill_somewhere(process, run, chance)
        hit += bool(unfinished(run) - older)
        complete = complete_checkpoints(run / "state")
        for path in complete:
            state_of(path, tmp_path)
        newest = checkpoint_step(complete[-1]) if complete else 0
        lost.append(lines(run) - newest)
        assert 0 <= lost[-1] <= 2 * every, "one checkpoint may be in flight while the steps to the next are made"
    assert finish(start({**options, "out": str(run)})) == [0]
    print(f"killed {kills} times, {hit} during a write; steps lost {lost}")
    record_property("lost", lost)
    assert hit, "no kill struck a write: the test shows less than it should"
    assert not unfinished(run)
    assert losses_of(run) == losses_of(whole)
    assert_same(state_of(run, tmp_path), state_of(whole, tmp_path))
    weights, expected = (dict(Lumos.from_pretrained(out / "checkpoint").state_dict()) for out in (run, whole))
    assert_same(weights, expected)
