"""Tiny training runs for the tests of resuming and crashing, in this process or in processes of their own."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from lumos import LumosConfig
from lumos.data import SampleWriter
from lumos.tokens import VISUAL_START, ByteTokenizer, build_document
from lumos.train import EXIT_STOPPED, SaveError, StoppedError, TrainConfig, Trainer, read_log
from lumos.train.state import find_checkpoint, newest_checkpoint

CODES = 40
REFUSED, UNSAVED = 11, 12
TIMINGS = ("seconds", "tokens_per_s", "mfu", "peak_memory_gb")


def tiny_model(dropout: float = 0.1, kv_heads: int = 1) -> LumosConfig:
    """A million parameters, nearly all of them rows of the vocabulary; dropout draws from torch's random state."""
    return LumosConfig(
        vocab_size=VISUAL_START + CODES,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=32,
        dropout=dropout,
    )


def write_samples(folder: Path) -> str:
    """Five clips of 2 to 3 frames on a 4 x 8 grid."""
    with SampleWriter(folder) as writer:
        for number in range(5):
            frames = 2 + number % 2
            codes = (torch.arange(32).view(4, 8) + torch.arange(frames)[:, None, None] + number) % CODES
            writer.add(build_document(ByteTokenizer().encode(f"clip {number}"), codes, seconds=1, fps=4 * frames - 4))
    return str(folder)


@contextmanager
def preset(config: LumosConfig):
    """LumosConfig.preset gives `config` under every name."""
    saved = LumosConfig.__dict__["preset"]
    LumosConfig.preset = classmethod(lambda cls, name: config)
    try:
        yield
    finally:
        LumosConfig.preset = saved


def trainer(model: LumosConfig | None = None, **options) -> Trainer:
    with preset(model or tiny_model()):
        return Trainer(TrainConfig(**{"lr": 1e-2, "warmup": 4, "device": "cpu", **options}), progress=False)


def losses_of(run: str | Path) -> list[dict]:
    """The log without what depends on the clock."""
    lines = list(read_log(Path(run) / "log.jsonl"))
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def state_of(checkpoint: str | Path, scratch: Path) -> dict:
    """Everything that a checkpoint, or the newest of a run, holds, put together from the shards."""
    file = scratch / f"state-{os.getpid()}.pt"
    dcp_to_torch_save(find_checkpoint(checkpoint), file)
    state = torch.load(file, weights_only=False)
    file.unlink()
    return state


def assert_same(actual, expected, where="state", rtol: float | None = None):
    """Equal bit for bit, or tensors to a relative tolerance of their largest element."""
    assert type(actual) is type(expected), where
    if isinstance(expected, dict):
        assert sorted(map(str, actual)) == sorted(map(str, expected)), where
        for key, value in expected.items():
            assert_same(actual[key], value, f"{where}.{key}", rtol)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for place, value in enumerate(expected):
            assert_same(actual[place], value, f"{where}.{place}", rtol)
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        if rtol is None:
            assert torch.equal(actual, expected), where
        else:
            error = (actual.double() - expected.double()).abs().max()
            assert error <= rtol * expected.double().abs().max(), (where, float(error))
    elif isinstance(expected, float) and rtol is not None:
        assert abs(actual - expected) <= rtol * abs(expected), (where, actual, expected)
    else:
        assert actual == expected, where


# Processes that are forked from one that has imported everything: half of a tiny run would be importing torch.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lumos.train", "torch.distributed.checkpoint.format_utils"])


def start(
    options: dict,
    ranks: int = 1,
    model: LumosConfig | None = None,
    prepare: Callable[[Trainer], None] | None = None,
) -> list[multiprocessing.Process]:
    """A run in `ranks` processes of its own, joined as torchrun would; Process.kill() is SIGKILL.

    prepare: called with the Trainer before it runs; a function of a module. The exit code is REFUSED after a ValueError
    and UNSAVED after a SaveError.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        _context.Process(target=_run, args=(options, rank, ranks, port, model, prepare)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[multiprocessing.Process], seconds: float = 120) -> list[int]:
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "a process of the run hangs"
    return [process.exitcode for process in processes]


def get_stuck(run: Trainer) -> None:
    """It never comes to the end of its third step."""
    run.after_step.append(lambda stats: time.sleep(600 if run.step == 2 else 0))


def fill_the_disk_of_the_last_process(run: Trainer) -> None:
    """From the fifth step on, files of the process end at a megabyte."""

    def fill(stats):
        if run.step == 4 and run.parallel.rank == run.parallel.world_size - 1:
            while newest_checkpoint(run.out / "state") is None:
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    run.after_step.append(fill)


def _run(options: dict, rank: int, ranks: int, port: int, model: LumosConfig | None, prepare: Callable | None) -> None:
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        run = trainer(model, **options)
        if prepare is not None:
            prepare(run)
        run.run()
    except StoppedError:
        os._exit(EXIT_STOPPED)
    except SaveError:
        os._exit(UNSAVED)
    except ValueError:
        os._exit(REFUSED)


def _under_torchrun(options: dict) -> None:
    """A run that dies, once, after options["dies_after"] steps on its second process."""
    torch.set_num_threads(1)
    dies_after = options.pop("dies_after", None)
    run = trainer(tiny_model(), **options)

    def die(stats):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and (run.parallel.rank, run.step) == (1, dies_after):
            os.kill(os.getpid(), signal.SIGKILL)

    run.after_step.append(die)
    try:
        run.run()
    except StoppedError:
        sys.exit(EXIT_STOPPED)


if __name__ == "__main__":
    _under_torchrun(json.loads(sys.argv[1]))
