"""lumos/train/nonfinite.py: planted NaNs leave no trace, are found again and named, on one process and on several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from host_syncs import HostSync, NoHostSync
from test_train import folder, tiny_preset  # noqa: F401

from lumos import Lumos, LumosConfig, mask_tokens
from lumos.data import collate
from lumos.tokens import ByteTokenizer, build_document
from lumos.train import MicroBatch, PackedBatches, TrainConfig, make_optimizer, read_log, train, training_step
from lumos.train.batches import open_sources
from lumos.train.nonfinite import StepGuard, explain
from lumos.train.state import checkpoint_step, newest_checkpoint
from lumos_kernels import FrameLayout

VISUAL_START, CODES = 65536, 40
BAD = 777  # the text that gives NaN


def small_model() -> Lumos:
    """Two layers; the embedding of BAD comes out as NaN."""
    torch.manual_seed(0)
    model = Lumos(LumosConfig(VISUAL_START + CODES, 64, 96, 2, 2, num_key_value_heads=1))

    def plant(module, arguments, output):
        return torch.where((arguments[0] == BAD)[:, None], torch.nan, output)

    model.model.embed_tokens.register_forward_hook(plant)
    return model


def document(text, frames=2):
    codes = torch.randint(CODES, (frames, 4, 8), generator=torch.Generator().manual_seed(int(text[0])))
    return build_document(list(text), codes, seconds=1, fps=4 * frames - 4)


def batch_of(*documents) -> MicroBatch:
    packed = collate(list(documents))
    layout = FrameLayout.from_tokens(packed.input_ids, packed.cu_seqlens)
    masked = mask_tokens(
        packed.input_ids, layout, seeds=range(len(documents)), classes=(VISUAL_START, VISUAL_START + CODES)
    )
    return MicroBatch(masked, layout)


GOOD_STEP = [batch_of(document([50]), document([51])), batch_of(document([52]))]
BAD_STEP = [batch_of(document([50]), document([51])), batch_of(document([52]), document([BAD]), document([53]))]
NAMES = [["a", "b"], ["c", "d", "e"]]
GOOD_NAMES = [["a", "b"], ["c"]]


class Run:
    def __init__(self, stop=None):
        self.model = small_model()
        self.optimizer = make_optimizer(self.model, 1e-2, 0.1)
        self.guard = None if stop is None else StepGuard(stop, "cpu")

    def step(self, batches):
        return training_step(self.model, self.optimizer, batches, 4.0, guard=self.guard)

    def everything(self):
        state = [x for s in self.optimizer.state.values() for x in s.values()]
        return [x.detach().clone() for x in [*self.model.parameters(), *state]]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_guard_changes_no_bit_of_good_steps():
    plain, guarded = Run(), Run(stop=True)
    for _ in range(3):
        assert not plain.step(GOOD_STEP).skipped
        assert not guarded.step(GOOD_STEP).skipped
    assert same(plain.everything(), guarded.everything())


def test_without_a_guard_the_planted_nan_destroys_the_weights():
    run = Run()
    run.step(BAD_STEP)
    assert not all(p.isfinite().all() for p in run.model.parameters())


def test_a_skipped_step_leaves_weights_and_optimizer_state_as_if_it_had_not_been():
    run, without = Run(stop=False), Run(stop=False)
    for step, skipped in ((GOOD_STEP, False), (BAD_STEP, True), (GOOD_STEP, False)):
        before = run.everything()
        stats = run.step(step)
        assert bool(stats.skipped) == skipped
        assert same(before, run.everything()) == skipped
        assert bool(stats.loss.isfinite()) != skipped
    for _ in range(2):
        without.step(GOOD_STEP)
    assert same(run.everything(), without.everything())


def test_a_bad_first_step_leaves_fresh_optimizer_state():
    run, without = Run(stop=False), Run(stop=False)
    run.step(BAD_STEP)
    assert not hasattr(run.optimizer, "found_inf"), "a step without a guard would be left out too"
    run.step(GOOD_STEP)
    without.step(GOOD_STEP)
    assert same(run.everything(), without.everything())


def test_stopping_keeps_the_weights_from_before_the_bad_step_whatever_follows():
    run = Run(stop=True)
    run.step(GOOD_STEP)
    before = run.everything()
    assert run.step(BAD_STEP).skipped
    assert run.step(GOOD_STEP).skipped
    assert same(before, run.everything())


def test_an_infinite_gradient_is_caught_though_the_loss_is_finite():
    run = Run(stop=False)
    run.model.model.norm.weight.register_hook(lambda grad: torch.full_like(grad, torch.inf))
    before = run.everything()
    stats = run.step(GOOD_STEP)
    assert stats.skipped
    assert stats.loss.isfinite()
    assert same(before, run.everything()[: len(before)])


def test_the_host_never_waits(monkeypatch):
    run = Run(stop=True)
    run.model.impl = "reference"  # the ops' own host code is left to their tests
    monkeypatch.setattr("lumos.model.frame_attention", lambda q, k, v, *_, **__: q)
    monkeypatch.setattr(FrameLayout, "num_frames", 2)  # read on the CPU, before the batch moves
    with NoHostSync():
        stats = run.step(GOOD_STEP)
        stats = run.step(BAD_STEP)
        with pytest.raises(HostSync):
            bool(stats.skipped)


def test_an_optimizer_that_cannot_leave_a_step_out_is_refused():
    model = small_model()
    with pytest.raises(ValueError, match="fused"):
        training_step(model, torch.optim.SGD(model.parameters()), GOOD_STEP, 4.0, guard=StepGuard(True, "cpu"))


def test_the_document_and_the_parameters_are_named():
    run = Run(stop=True)
    run.step(BAD_STEP)
    said = explain(run.model, BAD_STEP, NAMES, torch.float32)
    assert "the loss of d;" in said
    assert "model.layers.0.self_attn.q_proj.weight" in said
    assert all(p.grad is None for p in run.model.parameters())


def test_a_gradient_that_alone_is_bad_is_named_with_its_parameter():
    run = Run(stop=True)
    run.model.model.layers[1].mlp.up_proj.weight.register_hook(lambda grad: grad / 0)
    said = explain(run.model, GOOD_STEP, GOOD_NAMES, torch.float32)
    assert said == (
        "not finite: the gradient of a, b, c; first parameters with such gradients: model.layers.1.mlp.up_proj.weight"
    )


def test_bad_weights_are_named_first():
    run = Run(stop=True)
    with torch.no_grad():
        run.model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    assert explain(run.model, GOOD_STEP, GOOD_NAMES, torch.float32) == (
        "weights that are not finite before the step: model.layers.0.mlp.down_proj.weight; "
        "no step after it can be finite"
    )


def test_what_does_not_happen_again_is_said():
    assert "fault of the machine" in explain(Run().model, GOOD_STEP, GOOD_NAMES, torch.float32)


# In a run: the embedding of every ASCII digit 3 comes out as NaN, so that "clip 3" spoils its steps


@pytest.fixture
def planted(monkeypatch):
    make = Lumos.__init__

    def with_plant(self, *arguments, **options):
        make(self, *arguments, **options)
        bad = ByteTokenizer().encode("3")[0]
        self.model.embed_tokens.register_forward_hook(
            lambda module, ids, output: torch.where((ids[0] == bad)[:, None], torch.nan, output)
        )

    monkeypatch.setattr(Lumos, "__init__", with_plant)


def run_options(folder, out, **options):  # noqa: F811
    return TrainConfig(**{"data": (str(folder),), "out": str(out), "steps": 10, "text_drop": 0.0, **options})


def seed_that_begins_well(folder):  # noqa: F811
    """One whose first two steps are without sample 3."""
    for seed in range(100):
        config = run_options(folder, "unused", seed=seed)
        batches = PackedBatches(open_sources(config.data), config, (VISUAL_START, VISUAL_START + CODES))
        if all(draw.sample != 3 for _ in range(2) for stream in batches.next_plan() for draw in stream.documents):
            return seed
    raise AssertionError("sample 3 comes first whatever the seed")


def test_a_run_stops_and_names_step_document_and_parameter(folder, tmp_path, tiny_preset, planted):  # noqa: F811
    seed = seed_that_begins_well(folder)
    config = run_options(folder, tmp_path / "run", checkpoint_every=1, seed=seed)
    with pytest.raises(FloatingPointError, match=r"step \d: not finite: the loss of sample 3 of .*tokens; .*q_proj"):
        train(config, progress=False)
    lines = list(read_log(tmp_path / "run" / "log.jsonl"))
    assert [line["loss"] is None for line in lines] == [False] * (len(lines) - 1) + [True]
    # No checkpoint of the bad step, so that the run can go on without it.
    last = newest_checkpoint(tmp_path / "run" / "state")
    assert checkpoint_step(last) == len(lines) - 1
    goes_on = run_options(folder, tmp_path / "run", checkpoint_every=1, seed=seed, on_nonfinite="skip")
    train(goes_on, progress=False)
    assert len(list(read_log(tmp_path / "run" / "log.jsonl"))) == 10


def test_a_run_skips_and_counts(folder, tmp_path, tiny_preset, planted):  # noqa: F811
    summary = train(run_options(folder, tmp_path / "run", on_nonfinite="skip", ema=0.9), progress=False)
    lines = list(read_log(summary.log))
    bad = [line["step"] for line in lines if line["loss"] is None]
    assert len(bad) == 2, "ten documents of five samples: each twice"
    assert lines[-1]["skipped"] == 2
    weights = Lumos.from_pretrained(summary.checkpoint).parameters()
    assert all(p.isfinite().all() for p in weights)


@pytest.mark.parametrize("mode", ["stop", "skip"])
def test_all_ranks_decide_alike_and_know_the_document_of_one(mode, tmp_path):
    tests = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests.parent}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tests / "nonfinite_ranks.py", mode, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["skipped"] == [False, True, mode == "stop"]
        assert result["changed"] == [True, False, mode == "skip"]
        assert "the loss of rank 1;" in result["said"]
        assert "model.layers.0.self_attn.q_proj.weight" in result["said"]
