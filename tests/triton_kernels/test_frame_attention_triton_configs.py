"""The order of frame_attention's Triton programs, what they run, and their configurations."""

from __future__ import annotations

import importlib

import pytest
import torch
import triton
import triton.language as tl
from frame_attention_cases import (
    BF16,
    INTERPRETED,
    as_on,
    config,
    fields,
    limits_of,
    measured_as,
)

from lumos_kernels import Frame, Text, cache, dispatch, self_check
from lumos_kernels.dispatch import Problem
from lumos_kernels.frame_attention.contract import Inputs
from lumos_kernels.frame_attention.triton import configs, measured, primitives, tune

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
    assert op.refusal("triton", Problem("cuda", BF16, 160, "sm_90")) == "computes head sizes up to 128, not 160"
    assert "float64" in op.refusal("triton", Problem("cuda", torch.float64, 64, "sm_90"))
    for head_dim in (*configs.HEAD_DIMS, 1, 48, 80):  # the last three are padded
        assert op.refusal("triton", Problem("cuda", BF16, head_dim, "sm_90")) is None


def test_every_kernel_has_a_configuration_everywhere_and_measured_ones_come_first(device):
    for kernel in configs.KERNELS:
        for arch in configs.ARCHS:
            assert set(configs.DEFAULTS[kernel, arch]) == set(configs.HEAD_DIMS)
            for head_dim in configs.HEAD_DIMS:
                for found in tune.candidates(kernel, arch, head_dim):
                    assert measured.checked(kernel, arch, head_dim, measured.fields_of(found)) == found
    q = torch.empty(1, 1, 64, dtype=BF16, device=device)
    with as_on("sm_90"):
        assert configs.choose("dq", q) == configs.DEFAULTS["dq", "sm_90"][64]
        with measured_as({("dq", "sm_90", 64): fields(64, 64, 4, 3, False)}):
            assert configs.choose("dq", q) == config(64, 64, 4, 3, False)
            assert configs.choose("dkdv", q) == configs.DEFAULTS["dkdv", "sm_90"][64]
            assert configs.choose("dq", q.float()) == configs.FP32
    for arch, family in {"sm_86": "sm_80", "sm_90": "sm_90", "sm_103": "sm_100", "sm_120": "sm_80"}.items():
        assert configs.family(arch) == family


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LUMOS_CACHE_DIR", str(tmp_path))
    configs.table.cache_clear()
    yield tmp_path
    configs.table.cache_clear()


def test_the_users_table_comes_before_the_committed_one_and_serves_one_machine(cache_folder, monkeypatch):
    ours, theirs = config(64, 64, 4, 3, True), config(128, 64, 4, 2, True)
    assert measured.save("GPU A, torch 1, triton 1", measured.Table({("dq", 64): ours}, {64: True, 128: False}))
    assert measured.save("GPU A, torch 1, triton 1", measured.Table({("dq", 128): ours}, {}))
    assert measured.save("GPU B, torch 1, triton 1", measured.Table({("forward", 64): ours}, {}))
    committed = {("dq", "sm_90", 64): fields(128, 64, 4, 2, True), ("dkdv", "sm_90", 64): fields(128, 64, 4, 2, True)}
    monkeypatch.setattr(measured, "machine", lambda gpu: f"GPU {'AB'[gpu]}, torch 1, triton 1")
    with measured_as(committed, frozenset([("sm_90", 128)])):
        found = configs.table(0, "sm_90")
        assert found.configs == {("dq", 64): ours, ("dq", 128): ours, ("dkdv", 64): theirs}
        assert found.fused == {64: True, 128: False}
        assert configs.table(1, "sm_90") == (
            {("dq", 64): theirs, ("dkdv", 64): theirs, ("forward", 64): ours}, {128: True},
        )  # fmt: skip
        assert configs.table(None, "sm_90") == ({("dq", 64): theirs, ("dkdv", 64): theirs}, {128: True})
        # Read once a process: no call opens the file again.
        measured.path().unlink()
        assert configs.table(0, "sm_90") is found


BROKEN = {
    "no power of two": fields(96, 64, 4, 2, True),
    "larger than a tile may be": fields(256, 64, 4, 2, True),
    "too many keys": fields(64, 256, 4, 2, True),
    "too small": fields(8, 64, 4, 2, True),
    "a text": {**fields(64, 64, 4, 2, True), "block_m": "64"},
    "a bool": {**fields(64, 64, 4, 2, True), "num_warps": True},
    "3 warps": fields(64, 64, 3, 2, True),
    "no stages": fields(64, 64, 4, 0, True),
    "a missing field": {"block_m": 64, "block_n": 64, "num_warps": 4},
    "an unknown field": {**fields(64, 64, 4, 2, True), "clusters": 2},
    "no fields": 7,
}


@pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN)
def test_a_broken_entry_is_ignored_with_a_warning(entry, cache_folder, caplog):
    good = fields(64, 64, 4, 2, True)
    stored = {"configs": {"dq": {"64": entry, "128": good}}, "fused_backward": {"64": True}}
    assert cache.write(measured.NAME, {"here": stored})
    assert measured.of_user("here", "sm_90") == ({("dq", 128): config(64, 64, 4, 2, True)}, {64: True})
    assert "is ignored" in caplog.text
    caplog.clear()
    with measured_as({("dq", "sm_90", 64): entry, ("dq", "sm_90", 128): good}):
        assert measured.committed("sm_90").configs == {("dq", 128): config(64, 64, 4, 2, True)}
    assert "tuned.py" in caplog.text


def test_a_broken_table_is_ignored_with_a_warning(cache_folder, caplog):
    kernels = {"warp": {"64": fields(64, 64, 4, 2, True)}, "dq": [], "forward": {"48": fields(64, 64, 4, 2, True)}}
    verdicts = {"64": "yes", "sixty": True, "128": True}
    for stored in ({"configs": kernels, "fused_backward": verdicts}, {"configs": [], "fused_backward": {"128": True}}):
        assert cache.write(measured.NAME, {"here": stored})
        assert measured.of_user("here", "sm_90") == ({}, {128: True})
    assert len(caplog.records) == 6
    with pytest.raises(ValueError, match="no tensor descriptors"):
        measured.checked("dq", "sm_80", 64, fields(64, 64, 4, 2, True))
    for text in ("{", "[]", '{"here": 3}'):
        caplog.clear()
        measured.path().write_text(text)
        assert measured.of_user("here", "sm_90") == ({}, {})
        assert "ignored" in caplog.text
        assert measured.save("here", measured.Table({("dq", 64): config(64, 64, 4, 2, True)}, {}))
        assert measured.of_user("here", "sm_90").configs == {("dq", 64): config(64, 64, 4, 2, True)}
    measured.path().unlink()
    caplog.clear()
    assert measured.of_user("here", "sm_90") == ({}, {})
    assert not caplog.records


@pytest.mark.parametrize(
    ("allowed", "deterministic", "ran"),
    [(True, False, "fused"), (False, False, "deterministic"), (True, True, "deterministic")],
)
def test_the_fused_backward_needs_its_self_check_and_nobody_who_asks_for_equal_bits(
    allowed, deterministic, ran, monkeypatch, device
):
    module = importlib.import_module("lumos_kernels.frame_attention.triton.backward")  # the name is the function's too
    q = torch.empty(1, 1, 64, dtype=BF16, device=device)
    called = []
    monkeypatch.setattr(configs, "fuses_backward", lambda q: True)
    asked = "frame_attention", "triton", Problem.of(q, 64), "fused"
    monkeypatch.setattr(self_check, "allows", lambda op, *rest: (op.name, *rest) == asked and allowed)
    for name in ("fused", "deterministic"):
        monkeypatch.setattr(module, f"backward_{name}", lambda *_, name=name: called.append(name))
    module.backward(Inputs(q, q, q, limits_of([Text(1)]), 0.125), None, None, deterministic=deterministic)
    assert called == [ran]
