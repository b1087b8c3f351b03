"""The order of frame_attention's Triton programs, what they run, their configurations and the tuner."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from frame_attention_cases import (
    BF16,
    INTERPRETED,
    SMALL,
    as_on,
    config,
    fields,
    leaves_of,
    limits_of,
)

from lumos_kernels import Frame, Text, dispatch
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_attention.contract import Inputs
from lumos_kernels.frame_attention.triton import configs, primitives, tune

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@triton.jit
def _work_kernel(tile_ptr, head_ptr, tiles, heads, per_section):
    pid = tl.program_id(0)
    tile, head = primitives.work_item(pid, tiles, heads, per_section)
    tl.store(tile_ptr + pid, tile)
    tl.store(head_ptr + pid, head)


@pytest.mark.parametrize(("tiles", "heads", "per_section"), [(3, 8, 4), (1, 5, 2), (4, 6, 6), (5, 6, 4), (2, 3, 1)])
def test_every_tile_of_every_head_is_one_work_item(tiles, heads, per_section, device):
    work = [torch.empty(tiles * heads, dtype=torch.int32, device=device) for _ in range(2)]
    _work_kernel[(tiles * heads,)](*work, tiles, heads, per_section)
    items = list(zip(*(x.tolist() for x in work), strict=True))
    sections = [range(first, min(first + per_section, heads)) for first in range(0, heads, per_section)]
    assert items == [(tile, head) for section in sections for tile in range(tiles) for head in section]


def test_the_heaviest_tiles_of_a_video_come_first(device):
    """In the order of the programs, per head: a tile of queries sees no more keys than the one before, a tile of keys
    is seen by no more queries.
    """
    limits = limits_of([Text(5), *[Frame(4, 8)] * 12])
    work = [torch.empty(6, dtype=torch.int32, device=device) for _ in range(2)]
    _work_kernel[(6,)](*work, 6, 1, 1)
    tile = work[0].tolist()
    pairs = limits.dense_mask()[:384, :384].view(6, 64, -1)
    queries = [int(pairs[6 - 1 - t].sum()) for t in tile]
    keys = [int(limits.dense_mask()[:, 64 * t : 64 * t + 64].sum()) for t in tile]
    assert queries == sorted(queries, reverse=True)
    assert keys == sorted(keys, reverse=True)


def test_sections_hold_the_heads_whose_keys_fit_the_cache():
    assert primitives.heads_per_section(8, 12_796, 64, 2) == 3
    assert primitives.heads_per_section(8, 1_000, 64, 2) == 8
    assert primitives.heads_per_section(8, 89_848, 128, 2) == 1


def test_only_some_head_sizes_and_dtypes_are_run():
    op = dispatch.ops()["frame_attention"]
    assert op.refusal("triton", Problem("cuda", BF16, 48, "sm_90")) == (
        "computes head sizes 32, 64, 96 and 128, not 48"
    )
    assert "float64" in op.refusal("triton", Problem("cuda", torch.float64, 64, "sm_90"))
    for head_dim in configs.HEAD_DIMS:
        assert op.refusal("triton", Problem("cuda", BF16, head_dim, "sm_90")) is None
    assert "not yet proven" in op.refusal("triton", Problem("cuda", BF16, 64, "sm_90"), automatic=True)


def test_every_kernel_has_a_configuration_everywhere_and_measured_ones_come_first(device):
    for kernel in configs.KERNELS:
        for arch in configs.ARCHS:
            assert set(configs.DEFAULTS[kernel, arch]) == set(configs.HEAD_DIMS)
            assert all(primitives.MAX_BLOCK % c.block_m == 0 for c in configs.DEFAULTS[kernel, arch].values())
    q = torch.empty(1, 1, 64, dtype=BF16, device=device)
    with as_on("sm_90"):
        assert configs.choose("dq", q) == configs.DEFAULTS["dq", "sm_90"][64]
        with mock.patch.object(configs.tuned, "CONFIGS", {("dq", "sm_90", 64): fields(64, 64, 4, 3, False)}):
            assert configs.choose("dq", q) == config(64, 64, 4, 3, False)
            assert configs.choose("dkdv", q) == configs.DEFAULTS["dkdv", "sm_90"][64]
            assert configs.choose("dq", q.float()) == configs.FP32
    for arch, family in {"sm_86": "sm_80", "sm_90": "sm_90", "sm_103": "sm_100", "sm_120": "sm_80"}.items():
        assert configs.family(arch) == family


def tuning(times: dict, wrong=(), todo=None, minutes=1.0):
    """tune() with made-up times for configurations; kernels do not run. Returns its entries and its report."""
    lines: list[str] = []
    current: list = []

    def runner(subject, data):
        def call():
            config = configs.choose(subject.kernel, None)
            current[:] = [subject.kernel, config]
            if config in wrong:
                if wrong[config] is None:
                    return (torch.full((4,), torch.nan),)
                raise wrong[config]
            return (torch.ones(4),)

        return call

    def measure(call) -> float:
        call()
        return times.get(tuple(current), 1.0)

    with mock.patch.object(tune, "runner", runner):
        entries, fused = tune.tune(
            "sm_90", minutes, measure=measure, report=lines.append, make=lambda shape, device: None, todo=todo
        )
    return entries, fused, lines


def test_the_tuner_takes_the_fastest_right_configuration():
    subject = tune.Subject("forward", tune.SHAPES[0])
    default, *others = tune.candidates("forward", "sm_90", 64)
    assert len(set(others)) == len(others) > 5
    times = {("forward", c): t for c, t in zip(others, (0.5, 0.6, 0.7, 0.8, 0.99), strict=False)}
    wrong = {others[0]: RuntimeError("out of resource: shared memory\nmore"), others[1]: None}
    entries, fused, lines = tuning(times, wrong, [subject])
    assert entries == {**configs.tuned.CONFIGS, ("forward", "sm_90", 64): tune.fields_of(others[2])}
    assert fused == configs.tuned.FUSED_BACKWARD
    assert f"    refused {others[0]}: RuntimeError: out of resource: shared memory" in lines
    assert f"    refused {others[1]}: wrong result" in lines
    # 1 % is not enough to leave the default
    entries, _, _ = tuning({("forward", others[4]): 0.99}, {}, [subject])
    assert entries["forward", "sm_90", 64] == tune.fields_of(default)


@pytest.mark.parametrize("seconds", [0.5, 0.99])
def test_the_tuner_fuses_the_backward_where_it_is_faster(seconds):
    shape = tune.SHAPES[1]
    todo = [tune.Subject(kernel, shape) for kernel in ("dkdv", "dq", "fused")]
    _, fused, _ = tuning({("fused", c): seconds for c in tune.candidates("fused", "sm_90", 128)}, {}, todo)
    assert (("sm_90", 128) in fused) == (seconds < 0.98)


def test_the_tuner_stops_in_time_and_keeps_what_it_did_not_reach():
    with mock.patch.object(configs.tuned, "CONFIGS", {("dq", "sm_80", 64): fields(64, 64, 4, 1, False)}):
        entries, _, lines = tuning({}, minutes=0.0)
    assert entries == {("dq", "sm_80", 64): fields(64, 64, 4, 1, False)}
    assert lines == ["time is up: 16 of 16 keep their entries"]


def test_the_tuner_leaves_a_kernel_when_its_share_of_the_time_is_up():
    subject = tune.Subject("forward", tune.SHAPES[0])
    with mock.patch.object(tune, "runner", return_value=lambda: (torch.ones(4),)):
        verdict = tune.decide(subject, "sm_90", None, deadline=-1.0, measure=lambda call: 1.0)
    assert verdict.config == configs.DEFAULTS["forward", "sm_90"][64]
    assert verdict.tried == 1


def test_the_tuners_table_reads_back():
    entries = {("forward", "sm_90", 64): fields(128, 128, 4, 2, True), ("dq", "sm_80", 32): fields(64, 32, 4, 2, False)}
    for fused in (frozenset(), frozenset({("sm_90", 64), ("sm_90", 128)})):
        read: dict = {}
        exec(tune.source(entries, fused, "Last run: nowhere."), read)
        assert read["CONFIGS"] == entries
        assert read["FUSED_BACKWARD"] == fused


def test_the_tuner_runs_the_kernels_it_measures(device):
    """On small inputs: a result of each kernel, in a configuration that is not its default."""
    limits = SMALL.to(device)
    q, k, v = leaves_of(SMALL, (2, 1), 32, BF16, device)
    data = tune.Data(Inputs(q, k, v, limits, 32**-0.5), torch.randn_like(q))
    for kernel in configs.KERNELS:
        subject = tune.Subject(kernel, tune.Shape(32, 2, 1))
        other = config(64, 64, 4, 2, False)
        call = tune.runner(subject, data)
        expected = call()
        with tune.using(subject, other):
            assert configs.choose(kernel, q) == other
            assert tune.agrees(call(), expected)


def test_a_dry_run_lists_the_candidates(capsys):
    tune.main(["--dry-run", "--arch", "sm_90"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(configs.KERNELS) * len(tune.SHAPES)
    assert lines[0].startswith("forward D=64: ")
