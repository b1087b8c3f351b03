"""The benchmarks themselves: what they compare is right, and who computes something else gets no figure."""

import argparse
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import save_file

from bench import __main__ as command
from bench import environment, formulas, measure, memory, real_sample, registry, report, timing, training_step
from bench.official_style import official_mask, official_style_loss
from bench.ops import frame_attention, mm_rope
from bench.registry import Contestant
from bench.shapes import VIDEO_256P, VIDEO_384P
from lumos import Lumos, LumosConfig, mask_tokens
from lumos_kernels import Frame, FrameLayout, Text
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.mm_rope import reference
from lumos_kernels.mm_rope.frequencies import inverse_frequencies
from lumos_kernels.testing import assert_bitwise_equal
from lumos_kernels.token_ids import MASK

ALL_CASES = registry.select((), "*")
SMOKE_CASES = [case for case in ALL_CASES if case.video.name == "smoke"]
ROPE_CASE = registry.find("mm_rope/tiny-smoke/fp32/forward+backward")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _one_thread():
    """Calls of microseconds: a second thread on a busy machine costs more than it gives."""
    with timing.torch_threads(1):
        yield


# The registry


def test_cases_have_unique_keys_and_are_found_by_them():
    keys = [case.key for case in ALL_CASES]
    assert len(set(keys)) == len(keys)
    assert all(registry.find(case.key) is case for case in ALL_CASES)
    assert {case.op for case in SMOKE_CASES} == set(registry.ops())


@pytest.mark.parametrize("case", ALL_CASES, ids=lambda case: case.key)
def test_case_is_well_formed(case):
    bench = registry.ops()[case.op]
    contestants = bench.contestants(case, "cpu")
    names = [contestant.name for contestant in contestants]
    assert len(set(names)) == len(names)
    assert contestants[0].role == registry.OURS
    assert "lumos reference" in names
    yardstick = next(c for c in contestants if c.name == bench.yardstick)
    assert yardstick.role == registry.RIVAL
    assert yardstick.memory(case) == 0
    assert bench.work(case).amount > 0


def test_selection_by_op_and_pattern():
    assert not any(case.slow for case in registry.select())
    assert {case.op for case in registry.select(["mm_rope"])} == {"mm_rope"}
    assert [case.key for case in registry.select(["mm_rope"], "tiny-smoke/fp32/forward")] == [
        "mm_rope/tiny-smoke/fp32/forward",
        "mm_rope/tiny-smoke/fp32/forward+backward",
    ]
    with pytest.raises(ValueError, match="no benchmark of op 'rope'"):
        registry.select(["rope"])
    with pytest.raises(ValueError, match="no benchmark case"):
        registry.find("mm_rope/none")


@pytest.mark.parametrize("video", [VIDEO_256P, VIDEO_384P], ids=lambda video: video.name)
def test_videos_have_the_sizes_of_the_released_model(video):
    frame = {"256p-7f": 1828, "384p-7f": 4084}[video.name]
    assert video.tokens == 266 + 7 * frame + 2 == video.layout.num_tokens
    assert int(video.layout.content.sum()) == 7 * (frame - 4)


def test_formulas_agree_with_the_models():
    config = LumosConfig.lumos_1b()
    layers, heads, head_dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    attention = config.forward_flops(10, 1000, 0) - config.forward_flops(10, 0, 0)
    assert formulas.attention_flops(1000, heads, head_dim, backward=False).amount * layers == attention
    loss = config.forward_flops(10, 0, 7) - config.forward_flops(10, 0, 0)
    assert formulas.loss_flops(7, config.hidden_size, config.num_classes, backward=False).amount == loss
    # 43.8 us at 3.0 TB/s for the 12,796 tokens of seven 256p frames: the floor that the targets are stated against.
    assert formulas.mm_rope_bytes(12796, 40, 64, 2, backward=False).amount / 3.0e12 == pytest.approx(43.7e-6, rel=1e-2)


# The rivals


@pytest.mark.parametrize("case", SMOKE_CASES, ids=lambda case: case.key)
def test_every_contestant_computes_the_op(case):
    bench = registry.ops()[case.op]
    verdicts = measure.check(bench, case, bench.contestants(case, "cpu"), "cpu")
    assert len(verdicts) >= 3
    assert all(error <= limit < 0.05 for error, limit in verdicts.values()), verdicts


def test_official_tables_are_the_references_angles():
    layout = FrameLayout.from_segments([[Text(5), Frame(4, 8), Frame(4, 8), Text(2)]])
    cos, sin = mm_rope.official_tables(layout.positions, layout.content, 10000.0, 64, torch.float32)
    angle = reference.angles(layout.positions, inverse_frequencies(10000.0, 64, torch.device("cpu"))).repeat(1, 2)
    assert_bitwise_equal(cos, angle.cos())
    assert_bitwise_equal(sin, angle.sin())


def test_frame_calls_cover_exactly_the_visible_pairs():
    segments = [[Text(7), Frame(4, 8), Frame(4, 8), Text(3)], [Frame(4, 4)], [Text(1), Frame(4, 4), Text(1)], [Text(4)]]
    limits = FrameLayout.from_segments(segments).limits
    covered = torch.zeros(limits.num_queries, limits.num_keys, dtype=torch.bool)
    for call in frame_attention.frame_calls(limits):
        visible = torch.ones(call.rows.stop - call.rows.start, call.keys.stop - call.keys.start, dtype=torch.bool)
        if isinstance(call.mask, torch.Tensor):
            visible = call.mask
        elif call.mask == "causal":
            visible = visible.tril()
        covered[call.rows, call.keys] = visible
    assert torch.equal(covered, limits.dense_mask())


# Measuring


def test_contestants_alternate_and_take_turns_at_the_first_place():
    order = []

    def clock(call, repeats):
        call()
        return 1.0

    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = timing.interleave(calls, seconds=0.0, clock=clock, min_rounds=4)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"  # a warm-up, then four rounds
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_slow_call_is_made_once():
    made = []

    def clock(call, repeats):
        made.append(call())
        return made[-1]

    calls = {"slow": lambda: 7.0, "quick": lambda: 4.0}
    assert timing.interleave(calls, 0.0, clock, min_rounds=3, slow=5.0) == {"slow": [7.0], "quick": [4.0, 4.0, 4.0]}
    assert made.count(7.0) == 1


def test_short_calls_are_repeated_within_a_sample():
    repeated = []

    def clock(call, repeats):
        repeated.append(repeats)
        return repeats * timing.MIN_SAMPLE / 10

    samples = timing.interleave({"a": lambda: None}, seconds=0.0, clock=clock, min_rounds=1)
    assert repeated[-1] == 10
    assert samples["a"] == [pytest.approx(timing.MIN_SAMPLE / 10)]


def _spoiled(change):
    """ours with its first output changed."""

    def run(inputs):
        q, k = mm_rope.ours(inputs, "reference")
        return change(q), k

    return Contestant("spoiled", run)


@pytest.mark.parametrize(
    "change",
    [lambda q: q * 1.0001, lambda q: q.flip(0), lambda q: q + math.nan, lambda q: q[:-1]],
    ids=["scaled", "flipped", "nan", "short"],
)
def test_a_wrong_contestant_gets_no_figure(change):
    case = registry.find("mm_rope/tiny-smoke/fp32/forward")
    contestants = [*registry.ops()["mm_rope"].contestants(case, "cpu"), _spoiled(change)]
    rows = {row.contestant: row for row in measure.measure_case(case, "cpu", 0.0, 1, False, contestants)}
    spoiled = rows.pop("spoiled")
    assert spoiled.status == "wrong"
    assert spoiled.reason
    assert spoiled.median_s is spoiled.rate is spoiled.ratio is None
    assert all(row.status == "ok" and row.median_s > 0 for row in rows.values())


def test_a_wrong_gradient_gets_no_figure():
    class DoubledGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    contestants = [*registry.ops()["mm_rope"].contestants(ROPE_CASE, "cpu"), _spoiled(DoubledGradient.apply)]
    rows = {row.contestant: row for row in measure.measure_case(ROPE_CASE, "cpu", 0.0, 1, False, contestants)}
    assert rows["spoiled"].status == "wrong"


def test_a_wrong_yardstick_sets_no_tolerance():
    with pytest.raises(ValueError, match="yardstick itself is wrong"):
        measure.error_limits([1e-3], torch.float32)


def test_a_contestant_that_does_not_fit_into_memory_is_left_out():
    greedy = Contestant("greedy", mm_rope.eager, memory=lambda case: 2**60)
    contestants = [*registry.ops()["mm_rope"].contestants(ROPE_CASE, "cpu"), greedy]
    rows = {row.contestant: row for row in measure.measure_case(ROPE_CASE, "cpu", 0.0, 1, False, contestants)}
    if environment.available_memory("cpu") is None:
        pytest.skip("the system does not tell its free memory")
    assert rows["greedy"].status == "no memory"
    assert rows["greedy"].median_s is None


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="peak memory needs Linux")
def test_peak_memory_counts_what_is_freed_again():
    size = 64 * 2**20

    def call():
        torch.ones(size, dtype=torch.uint8)

    peaks = [memory.peak_of(call, "cpu") for _ in range(2)]
    assert all(0.95 * size <= highest - before <= 1.25 * size for before, highest in peaks)


def test_a_case_whose_rivals_are_others_than_those_of_the_small_one_is_its_own():
    case = registry.find("mm_rope/1B-256p-1f/bf16/forward")
    small = mm_rope.BENCH.smoke(case)
    assert small.key == "mm_rope/tiny-smoke/bf16/forward"
    rivals = [Contestant(c.key, mm_rope.eager, available=lambda at, device, c=c: at == c) for c in (case, small)]
    assert dataclasses.replace(mm_rope.BENCH, rivals=rivals).smoke(case) == case


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="peak memory needs Linux")
def test_peak_memory_of_a_contestant_comes_from_a_child():
    peaks = memory.contestant_peaks(ROPE_CASE.key, ["eager", "official style"], threads=1)
    assert list(peaks) == ["eager", "official style"]
    assert min(peaks.values()) >= 0


def _kills_itself(case_key, threads, name):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_contestant_killed_while_its_memory_is_measured_is_named(monkeypatch):
    monkeypatch.setattr(memory, "_contestant_peak", _kills_itself)
    with pytest.raises(RuntimeError, match=re.escape(f"'eager' was killed in {ROPE_CASE.key}")):
        memory.main([ROPE_CASE.key, "eager", "--threads", "1"])


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="peak memory needs Linux")
def test_peak_memory_leaves_out_what_first_calls_keep(monkeypatch):
    size, kept = 64 * 2**20, []

    def run(inputs):
        if len(kept) < 2:  # in the small case, and in the first call of the case itself
            kept.append(torch.ones(size, dtype=torch.uint8))
        return mm_rope.eager(inputs)

    bench = dataclasses.replace(mm_rope.BENCH, rivals=[Contestant("keeps", run)])
    monkeypatch.setattr(registry, "ops", lambda: {"mm_rope": bench})
    assert memory._contestant_peak(ROPE_CASE.key, torch.get_num_threads(), "keeps") < size / 2


def test_a_child_that_fails_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)json\.tool no-such-file failed.*No such file"):
        memory.run_child("json.tool", ["no-such-file"])


# The command and its report


def test_sweeps_gather_cases_that_differ_in_tokens_alone():
    def record(tokens, contestants, size="a", dtype="bf16"):
        rows = [{"contestant": name, "role": role, "median_s": time} for name, (role, time) in contestants.items()]
        return {"op": "op", "model": {"name": size}, "dtype": dtype, "pass": "forward", "tokens": tokens, "rows": rows}

    ours, ceiling = {"ours": ("ours", 1.5)}, {"copy": ("ceiling", 1.0)}
    cases = [record(300, ours | {"rival": ("rival", None)}), record(100, ours | ceiling), record(200, ours)]
    cases += [record(100, ours, dtype="fp32"), record(200, ours, dtype="fp32"), record(100, ours, size="b")]
    groups = report.sweeps(cases)
    assert {title: [case["tokens"] for case in group] for title, group in groups.items()} == {
        "op/a/bf16/forward": [100, 200, 300]
    }
    table = report._sweep_table(groups["op/a/bf16/forward"])
    assert table == [
        "| contestant | 100 | 200 | 300 |",
        "| --- | ---: | ---: | ---: |",
        "| ours | 1,500 ms | 1,500 ms | 1,500 ms |",
        "| rival | - | - | - |",
    ]


def test_a_run_writes_json_markdown_and_a_picture(tmp_path, capsys):
    selection = ["mm_rope", "--cases", "tiny-smoke/fp32/*", "--device", "cpu", "--threads", "1"]
    assert command.main([*selection, "--seconds", "0", "--no-memory", "--out", str(tmp_path)]) == 0
    suffixes = {file.suffix: file for file in tmp_path.iterdir()}
    assert set(suffixes) == {".json", ".md", ".png"}
    assert len({file.stem for file in suffixes.values()}) == 1

    result = json.loads(suffixes[".json"].read_text())
    assert set(result) == {"schema", "environment", "settings", "cases"}
    assert {"cpu", "cores", "threads", "versions", "commit", "dirty", "date"} <= set(result["environment"])
    assert [case["case"] for case in result["cases"]] == [
        "mm_rope/tiny-smoke/fp32/forward",
        "mm_rope/tiny-smoke/fp32/forward+backward",
    ]
    for case in result["cases"]:
        assert case["rate_unit"] == "GB/s"
        rows = {row["contestant"]: row for row in case["rows"]}
        assert {"lumos reference", "eager", "official style", "copy"} <= set(rows)
        assert next(iter(rows.values()))["ratio"] == 1.0
        assert all(row["status"] == "ok" and row["min_s"] <= row["median_s"] for row in rows.values())
        assert 1.0 in [row["of_ceiling"] for row in rows.values() if row["role"] == "ceiling"]

    text = suffixes[".md"].read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "## mm_rope/tiny-smoke/fp32/forward+backward" in text
    assert "| eager |" in text
    assert suffixes[".png"].read_bytes().startswith(b"\x89PNG")


def test_the_list_names_cases_and_contestants(capsys):
    assert command.main(["frame_attention", "--list", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(case.op == "frame_attention" for case in ALL_CASES)
    assert all("SDPA per frame" in line for line in lines)
    with pytest.raises(SystemExit):
        command.main(["--cases", "nothing-like-it"])


@pytest.mark.slow
def test_pytest_benchmark_collects_the_registry():
    command_line = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-q", "--collect-only"]
    done = subprocess.run(command_line, cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "bench_mm_rope[tiny-smoke/fp32/forward-eager]" in done.stdout


# The whole model the official way


def _config(**changes):
    sizes = {"vocab_size": 9600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "model_parallel_size": 2}
    return LumosConfig(**{**sizes, **heads, "visual_start": 9216, **changes})


@pytest.fixture
def batch():
    """Two documents of two 4 x 8 frames, with texts of different length, the second one padded."""
    config = _config()

    def document(text):
        ids = torch.cat([torch.randint(1, 8000, (text,)), frame_skeleton(4, 8), frame_skeleton(4, 8)])
        return torch.where(ids == MASK, torch.randint(*config.classes, ids.shape), ids)

    ids = torch.nn.utils.rnn.pad_sequence([document(9), document(4)], batch_first=True)
    return mask_tokens(ids, seeds=[0, 1], classes=config.classes)


def test_official_mask_is_the_layouts(batch):
    dense = FrameLayout.from_tokens(batch.input_ids).dense_mask()
    length = batch.input_ids.shape[1]
    for number, mask in enumerate(official_mask(batch.input_ids)):
        own = slice(number * length, (number + 1) * length)
        assert torch.equal(mask[0] == 0, dense[own, own])
        assert mask.dtype == torch.float32


def _loss_and_gradients(model, loss):
    model.zero_grad()
    value = loss(model)
    value.backward()
    return {"loss": value.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("swin_norm", [False, True])
def test_official_style_loss_is_the_models(batch, swin_norm):
    def ours(model):
        return model(batch.input_ids, labels=batch.labels).loss

    def official(model):
        return official_style_loss(model, batch.input_ids, batch.labels)

    model = Lumos(_config(swin_norm=swin_norm))
    actual, low = _loss_and_gradients(model, ours), _loss_and_gradients(model, official)
    high = _loss_and_gradients(model.double(), official)
    assert high["loss"] > 1
    for name, exact in high.items():
        [error], [yardstick] = (measure.relative_errors((values[name],), (exact,)) for values in (actual, low))
        assert error <= 2 * yardstick + 4 * torch.finfo(torch.float32).eps, name
    # In fp64 the two differ by the order of their sums alone.
    for name, value in _loss_and_gradients(model, ours).items():
        assert float((value - high[name]).abs().max()) <= 1e-12 * float(high[name].abs().max()), name


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"z_loss_weight": 1e-4}])
def test_official_style_refuses_what_cannot_be_compared(batch, changes):
    with pytest.raises(ValueError, match="must be 0 to compare"):
        official_style_loss(Lumos(_config(**changes)), batch.input_ids, batch.labels)


@pytest.fixture
def comparison(batch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    tensors = {"input_ids": batch.input_ids, "labels": batch.labels, "rows": batch.rows}
    save_file(tensors, tmp_path / "batch.safetensors")
    options = {"model": tmp_path, "batch": tmp_path / "batch.safetensors", "dtype": "float32", "device": "cpu"}
    return training_step.Comparison(argparse.Namespace(**options, seed=0, impl="auto", optimizer=True))


def test_training_step_comparison(comparison, batch):
    weights = {name: p.detach().clone() for name, p in comparison.model.named_parameters()}
    result = training_step.time_both(comparison, "float32", seconds=0.0, rounds=2)
    assert result["tokens"] == batch.input_ids.numel()
    assert result["targets"] == batch.num_targets
    assert result["ours"]["samples"] == result["official"]["samples"] == 2
    assert result["loss_difference"] <= result["loss_limit"] < 1e-4
    assert result["speedup"] > 0
    for name, parameter in comparison.model.named_parameters():
        assert_bitwise_equal(parameter.detach(), weights[name], name)  # the optimizer's step changes nothing


def test_training_step_comparison_refuses_different_losses(comparison, monkeypatch):
    monkeypatch.setattr(training_step, "official_style_loss", lambda *args: official_style_loss(*args) * (1 + 1e-5))
    with pytest.raises(RuntimeError, match="the losses"):
        training_step.time_both(comparison, "float32", seconds=0.0, rounds=1)


def test_our_side_alone_where_the_official_way_does_not_fit(comparison):
    result = training_step.ours_alone(comparison)
    both = training_step.time_both(comparison, "float32", seconds=0.0, rounds=1)
    assert result.keys() == both.keys()
    assert result["ours"]["samples"] == 1
    assert result["ours"]["loss"] == both["ours"]["loss"]
    assert result["ours"]["peak_bytes"] > result["ours"]["extra_bytes"] >= 0
    assert result["official"] is result["speedup"] is result["loss_difference"] is None


@pytest.mark.parametrize(
    ("ours", "official", "accepted"),
    [
        (1.0, 1.0 + 7 * EPS, True),  # the order of the sums
        (1.0, 1.0 + 30 * EPS, True),  # fp64 says 1.0: the official way rounded more
        (1.0 + 4 * EPS, 1.0 - 20 * EPS, True),
        (1.0, 1.0 + 40 * EPS, False),  # too far from fp64 to be rounding
        (1.0 + 10 * EPS, 1.0, False),  # ours is the one that is off
        (math.nan, 1.0, False),
    ],
)
def test_fp64_judges_losses_that_differ(ours, official, accepted):
    exact = types.SimpleNamespace(exact_loss=lambda: (1.0, 4.0))
    losses = {"ours": ours, "official": official}
    if accepted:
        difference, limit = training_step.check_losses(exact, losses, "float32")
        assert difference == abs(ours - official)
        assert limit == pytest.approx(8 * EPS, rel=1e-4)
    else:
        with pytest.raises(RuntimeError, match="the losses"):
            training_step.check_losses(exact, losses, "float32")


def test_the_exact_loss_and_the_logsumexp_that_its_rounding_goes_by(batch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(_config().to_dict()))
    file = training_step._batch_file(batch, tmp_path)
    comparison = training_step.Comparison(training_step.parser().parse_args([str(tmp_path), str(file)]))
    loss, lse = comparison.exact_loss()
    assert loss == pytest.approx(comparison.loss("ours").item(), rel=1e-6)
    assert lse == pytest.approx(loss, rel=0.05)  # logits of fresh weights are near 0
    comparison.model.lm_head.weight.data *= 100
    loss, lse = comparison.exact_loss()
    assert lse > 1.5 * math.log(comparison.model.config.classes[1] - comparison.model.config.classes[0])


def test_the_first_frames_of_a_sample_are_a_sample():
    frames = [frame_skeleton(4, 8) for _ in range(3)]
    head, tail = [0, 5, 8710, 9004, 8806, 8816], [9005, 8710]
    ids = torch.cat([torch.tensor(head), *frames, torch.tensor(tail)])
    for count in (1, 3):
        cut = real_sample.first_frames(ids, count)
        assert torch.equal(cut, torch.cat([torch.tensor(head), *frames[:count], torch.tensor(tail)])[None])
    with pytest.raises(ValueError, match=r"1\.\.3, which the sample has; got 4"):
        real_sample.first_frames(ids, 4)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True], ids=["config", "checkpoint"])
def test_training_step_comparison_from_children(batch, tmp_path, saved):
    model = _config()
    if saved:
        Lumos(model).save_pretrained(tmp_path / "checkpoint")
        model = tmp_path / "checkpoint"
    result = training_step.compare_training_step(model, batch, dtype="bfloat16", seconds=0.0, rounds=1, threads=1)
    assert result["dtype"] == "bfloat16"
    for side in ("ours", "official"):
        assert result[side]["median_s"] > 0
        assert result[side]["peak_bytes"] > result[side]["extra_bytes"] >= 0
