"""lumos/parallel.py: runs of 2 and 4 processes over gloo compute what one process computes."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import parallel_runs
import pytest
import torch
from parallel_runs import CASES, Case, micro_batch

from lumos.model import Lumos
from lumos.parallel import Parallel, check_heads
from lumos.scaling import Step

SCRIPT = Path(parallel_runs.__file__)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ALONE = Parallel(torch.device("cpu"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """results(name) -> what each rank of the case found. All cases of 2 and of 4 processes run once."""

    @functools.cache
    def folder(processes: int) -> Path:
        out = tmp_path_factory.mktemp(f"{processes}-processes")
        command = [*TORCHRUN, "2", SCRIPT, out] if processes == 2 else [sys.executable, SCRIPT, out, str(processes)]
        paths = os.pathsep.join([str(SCRIPT.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        return out

    def load(name: str) -> list[dict]:
        processes = CASES[name].processes
        return [torch.load(folder(processes) / f"{name}.{rank}.pt", weights_only=False) for rank in range(processes)]

    return load


@functools.cache
def _alone(loss: tuple, checkpointing: str, weights: torch.dtype, compute: torch.dtype) -> dict:
    case = Case(1, loss=dict(loss), checkpointing=checkpointing)
    return parallel_runs.run(case, ALONE, parallel_runs.make_model(case, weights), compute)


def alone(case: Case, exact: bool = False) -> dict:
    """The run of one process: in fp64, or in the precision of the case."""
    loss = tuple(case.loss.items())
    return _alone(loss, "none", *((torch.float64, torch.float32) if exact else (torch.float32, case.dtype)))


def check(name: str, ours: torch.Tensor, other: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """At most twice as far from fp64 as the run of one process, plus one rounding."""
    exact = exact.double()
    error, others = (float((x.double() - exact).norm()) for x in (ours, other))
    limit = 2 * others + float(exact.norm()) * torch.finfo(dtype).eps / 2
    assert error <= limit, f"{name}: error {error:.3e}, of one process {others:.3e}, limit {limit:.3e}"


@pytest.mark.parametrize("name", CASES)
def test_the_first_gradient_is_that_of_one_process(results, name):
    """... of every parameter, with unequal numbers of targets on the ranks."""
    case = CASES[name]
    ours, other, exact = results(name)[0], alone(case), alone(case, exact=True)
    assert ours["gradients"].keys() == exact["gradients"].keys()
    for key, gradient in exact["gradients"].items():
        assert gradient.any(), f"{key} has no gradient to compare"
        check(key, ours["gradients"][key], other["gradients"][key], gradient, case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_losses_and_norms_of_three_steps_are_those_of_one_process(results, name):
    case = CASES[name]
    ranks, other, exact = results(name), alone(case), alone(case, exact=True)
    for step in range(parallel_runs.STEPS):
        for rank in ranks[1:]:
            for field in dataclasses.fields(rank["stats"][step]):
                mine, first = (getattr(x["stats"][step], field.name) for x in (rank, ranks[0]))
                assert torch.equal(mine, first), f"{field.name} differs between ranks in step {step}"
        ours, others, exacts = (x["stats"][step] for x in (ranks[0], other, exact))
        assert ours.targets == exacts.targets
        assert ours.frame_losses.isfinite().all()
        vectors = (
            torch.cat([s.loss[None].double(), s.grad_norm[None].double(), s.frame_losses.double()])
            for s in (ours, others, exacts)
        )
        check(f"step {step}", *vectors, case.dtype)


@pytest.mark.parametrize("name", CASES)
def test_weights_after_three_steps_are_those_of_one_process(results, name):
    """All weights as one vector: AdamW divides each element's rounding errors by its own gradient."""
    case = CASES[name]
    runs = results(name)[0], alone(case), alone(case, exact=True)
    check("weights", *(torch.cat([w.flatten() for w in run["weights"].values()]) for run in runs), torch.float32)


def test_micro_batches_are_as_unequal_as_the_tests_need():
    counts = [micro_batch(number).num_targets for number in range(8)]
    assert 0 in counts
    assert len(set(counts)) == len(counts)
    assert len({micro_batch(number).layout.num_frames for number in range(8)}) > 2
    assert any(micro_batch(number).num_tokens % 4 for number in range(8)), "nothing to pad"
    assert any(micro_batch(number).masked.input_ids[0] != 0 for number in range(8)), "no text dropped"
    first_quarter = micro_batch(1).masked.rows < micro_batch(1).num_tokens // 4
    assert not first_quarter.any(), "every rank of a context group has targets"


def test_ranks_find_their_place(results):
    places = [rank["place"] for rank in results("hsdp 2 x context 2, full")]
    assert places == [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]
    assert [rank["place"] for rank in results("fsdp 2")] == [(0, 2, 0, 1), (1, 2, 0, 1)]
    assert all(rank["any"] == (True, False) for name in ("fsdp 2", "fsdp 4") for rank in results(name))


def test_weights_are_gathered_as_often_as_needed(results):
    """The lm_head that the loss reads comes with the rest of the model, once a micro-batch; a layer comes for forward
    and for backward, which for the last one is the same time. Gradients are reduced once a step.
    """
    calls = [name for name, _ in results("fsdp 4")[0]["collectives"]]
    layers, micro_batches, steps = parallel_runs.config().num_hidden_layers, 2, parallel_runs.STEPS
    assert calls.count("_allgather_base_") == steps * micro_batches * (1 + 2 * layers - 1)
    assert calls.count("_reduce_scatter_base_") == steps * (1 + layers)


def step_of(case: Case, data_rank: int, data_size: int) -> Step:
    batches = [micro_batch(number) for number in range(data_rank, case.micro_batches, data_size)]
    layouts, targets = zip(*((batch.layout, batch.num_targets) for batch in batches), strict=True)
    degrees = case.processes, case.replicate, case.context
    return Step(parallel_runs.config(), layouts, targets, *degrees, case.checkpointing, case.dtype.itemsize)


@pytest.mark.parametrize("name", CASES)
def test_bytes_on_the_wire_are_those_of_the_formulas(results, name):
    """Exactly, of every kind of collective; besides, each step adds up its statistics: counts, loss, frame losses."""
    for rank in results(name):
        step = step_of(CASES[name], *rank["place"][:2])
        expected = {key: parallel_runs.STEPS * value for key, value in vars(step.collectives()).items()}
        expected["all_reduce"] += parallel_runs.STEPS * (8 + 8 + 8 * (1 + 2 * 4))
        kinds = ("_allgather_base_", "_reduce_scatter_base_", "allreduce_", "alltoall_base_")
        counted = {kind: sum(size for call, size in rank["collectives"] if call == kind) for kind in kinds}
        assert list(counted.values()) == list(expected.values())
        assert {call for call, _ in rank["collectives"]} <= set(kinds)


@pytest.mark.parametrize("name", CASES)
def test_parameters_gradients_and_optimizer_of_a_rank_are_those_of_the_formulas(results, name):
    ranks = results(name)
    memory = step_of(CASES[name], *ranks[0]["place"][:2]).memory()
    assert ranks[0]["bytes"] == [memory.parameters, memory.gradients, memory.optimizer]
    for rank in ranks[1:]:  # FSDP2 gives the last ranks what is left
        assert all(own <= first for own, first in zip(rank["bytes"], ranks[0]["bytes"], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_memory_formula_bounds_the_peak_of_a_step(results, name):
    for rank in results(name):
        memory = step_of(CASES[name], *rank["place"][:2]).memory()
        assert rank["peak"] <= memory.total <= 1.45 * rank["peak"]


def test_one_process_is_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    parallel = Parallel.start("cpu")
    assert (parallel.rank, parallel.world_size, parallel.data_size, parallel.context_size) == (0, 1, 1, 1)
    assert parallel.is_main
    assert parallel.mesh is None
    assert parallel.any(True)
    assert not parallel.any(False)
    x = torch.ones(2)
    assert parallel.sum(x) is x
    batch = micro_batch(0)
    assert parallel.split(batch) is batch
    parallel.barrier()
    parallel.close()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("world_size", "options", "message"),
    [
        (1, {"context": 2}, "context must divide the number of processes, 1, got 2"),
        (4, {"replicate": 3}, "replicate must divide the number of processes, 4, got 3"),
        (4, {"context": 0}, "context must divide .* got 0"),
        (8, {"replicate": 4, "context": 4}, r"replicate \* context must divide .* 8, got 4 \* 4"),
        (1, {"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_degrees_that_do_not_fit_are_named(monkeypatch, world_size, options, message):
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with pytest.raises(ValueError, match=message):
        Parallel.start(**{"device": "cpu", **options})


def test_heads_that_context_does_not_divide_are_named():
    check_heads(parallel_runs.config(), 4)
    with pytest.raises(ValueError, match=r"context must divide the 4 key/value heads .*\(8 query heads\), got 8"):
        check_heads(parallel_runs.config(), 8)


def test_a_shared_stream_needs_its_layout():
    class TwoRanks:
        size = 2

    model = Lumos(parallel_runs.config())
    ids = micro_batch(0).masked.input_ids
    with pytest.raises(ValueError, match="context needs layout"):
        model(ids[None], context=TwoRanks())
    with pytest.raises(ValueError, match="on each of the 2 ranks of context"):
        model(ids, layout=micro_batch(0).layout, context=TwoRanks())
