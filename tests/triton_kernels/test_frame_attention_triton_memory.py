"""How frame_attention's Triton kernels reach memory: strides, every element written, 64-bit offsets, the same bits in
each run, and no value read on the host.
"""

from __future__ import annotations

import contextlib
import importlib
from unittest import mock

import pytest
import torch
from frame_attention_cases import (
    ARCHS,
    BF16,
    DECODING,
    FP16,
    FP32,
    INTERPRETED,
    SMALL,
    VIDEO,
    as_on,
    assert_same_bits,
    check,
    fields,
    keyless,
    leaves_of,
    limits_kv,
    limits_of,
    measured_as,
    run,
    upstream_of,
)
from host_syncs import NoHostSync
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from lumos_kernels import RowLimits, Text, tensors
from lumos_kernels.frame_attention import triton as kernels
from lumos_kernels.frame_attention.contract import Inputs, OutputGradients
from lumos_kernels.frame_attention.triton import configs

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.mark.parametrize("layout", ["fused", "heads first", "every second token", "channels last", "shifted by one"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_strides(layout, arch, device):
    dense = leaves_of(SMALL, (4, 2), 32, FP16, device)
    upstream = upstream_of(dense)
    if layout == "fused":  # with NaN behind every row
        fused = torch.full((SMALL.num_queries, 9, 32), torch.nan, dtype=FP16, device=device)
        strided = list(fused[:, :8].split([4, 2, 2], 1))
    elif layout == "heads first":
        strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in dense]
    elif layout == "every second token":
        strided = [x.repeat_interleave(2, dim=0)[::2] for x in dense]
    elif layout == "channels last":
        strided = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in dense]
    else:  # not aligned to 16 bytes
        strided = [x.new_empty(x.numel() + 1)[1:].view(x.shape) for x in dense]
    for into, x in zip(strided, dense, strict=True):
        into.copy_(x)
    with as_on(arch):
        assert_same_bits(run(strided, SMALL, upstream), run(dense, SMALL, upstream))


@pytest.mark.skipif(ARCHS == ("sm_80",), reason="there are no descriptors on this GPU")
def test_one_kernel_may_load_by_pointers_and_the_next_by_descriptors(device):
    leaves = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in leaves_of(SMALL, (2, 1), 32, BF16, device)]
    with as_on("sm_90"), measured_as({("dkdv", "sm_90", 32): fields(64, 64, 4, 2, False)}):
        assert not configs.choose("dkdv", leaves[0]).descriptors
        assert configs.choose("dq", leaves[0]).descriptors
        check(leaves, SMALL, upstream_of(leaves))


def test_limits_with_strides(device):
    every_second = RowLimits(*(torch.stack([x, -x], 1)[:, 0] for x in vars(SMALL).values()))
    leaves = leaves_of(SMALL, (1, 1), 32, BF16, device)
    upstream = upstream_of(leaves)
    assert_same_bits(run(leaves, every_second, upstream), run(leaves, SMALL, upstream))


def direct(leaves, limits, upstream, deterministic=True) -> list[Tensor]:
    """o, lse and the gradients, called without torch.library between."""
    limits = limits.to(leaves[0].device)
    inputs = Inputs(*leaves, limits, 0.2)
    outputs = kernels.forward(inputs)
    gradients = kernels.backward(inputs, outputs, OutputGradients(*upstream), deterministic=deterministic)
    return [*outputs, *gradients]


GUARDED = [
    (VIDEO, 64, BF16, "sm_90", False),
    (VIDEO, 96, FP16, "sm_80", False),
    (VIDEO, 96, BF16, "sm_90", True),
    (DECODING, 64, BF16, "sm_80", True),
    (keyless(), 128, BF16, "sm_90", False),
    (limits_kv([0, 0], [0, 0], 0), 64, FP32, "sm_90", False),
]


@pytest.mark.parametrize("case", GUARDED, ids=lambda case: "-".join(map(str, case[1:])))
def test_writes_every_element_and_nothing_around(case, device, guarded_allocations):
    limits, head_dim, dtype, arch, fused = case
    leaves = leaves_of(limits, (2, 1), head_dim, dtype, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch, fused), guarded_allocations():
        results = direct(leaves, limits, upstream, deterministic=not fused)
    assert all(x.is_contiguous() and not x.isnan().any() for x in results)


@pytest.mark.parametrize(("arch", "fused"), [("sm_80", False), ("sm_80", True), ("sm_90", False), ("sm_90", True)])
def test_64_bit_offsets_give_the_same_bits(arch, fused, device):
    leaves = leaves_of(SMALL, (4, 2), 32, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    asked = []

    def always(*tensors: Tensor) -> bool:
        asked.append(tensors)
        return True

    with as_on(arch, fused):
        expected = direct(leaves, SMALL, upstream, deterministic=not fused)
        with mock.patch.object(tensors, "needs_int64_offsets", always):
            actual = direct(leaves, SMALL, upstream, deterministic=not fused)
    if INTERPRETED or not fused:
        assert_same_bits(actual, expected)
    # Each kernel is asked about everything it reads or writes by an offset.
    q, k, v = leaves
    of_o, of_lse = upstream
    o, lse, dq, dk, dv = actual
    keys = (q, k, v, of_o, dk, dv)
    wanted = [(q, k, v, o, lse), (of_o, o, lse, of_lse), *([keys, (dq,)] if fused else [keys, (q, k, v, of_o, dq)])]
    assert len(asked) == len(wanted)
    for used, seen in zip(wanted, asked, strict=True):
        assert {x.data_ptr() for x in used} <= {x.data_ptr() for x in seen}


def test_the_deterministic_backward_is_taken_unless_the_fused_one_is_measured_faster(device):
    leaves = leaves_of(SMALL, (1, 1), 32, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    passes = importlib.import_module("lumos_kernels.frame_attention.triton.backward")

    def is_fused(deterministic: bool) -> bool:
        with mock.patch.object(passes, "_key_pass", wraps=passes._key_pass) as key_pass:
            direct(leaves, SMALL, upstream, deterministic)
        (_, _, _, dq_sum), _ = key_pass.call_args
        return dq_sum is not None

    measured = configs.family(configs.architecture(leaves[0])), 32
    with measured_as():
        assert not is_fused(deterministic=False)
    with measured_as(fused=frozenset([measured])):
        assert is_fused(deterministic=False)
        assert not is_fused(deterministic=True)
        leaves, upstream = [leaf.float() for leaf in leaves], [grad.float() for grad in upstream]
        assert not is_fused(deterministic=False)  # fp32 was not measured


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_deterministic_runs_give_the_same_bits(arch, device):
    leaves = leaves_of(SMALL, (3, 1), 64, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(arch, fused=True):  # asked for, and refused
        first = direct(leaves, SMALL, upstream)
        for _ in range(2 if INTERPRETED else 50):
            assert_same_bits(direct(leaves, SMALL, upstream), first)


@pytest.mark.parametrize("fused", [False, True])
def test_the_host_reads_no_value_and_launches_the_same_for_other_limits(fused, device):
    """What a CUDA graph captures serves every layout of the same sizes: grids and arguments come from shapes."""
    launches = []

    def record(self, *args, grid, warmup, **options):
        tensors = [x for x in args if isinstance(x, Tensor)]
        launches.append((self.fn.__name__, grid, {**options, "grid": None}, [x.shape for x in tensors]))

    video, other = VIDEO.to(device), limits_of([Text(VIDEO.num_queries)]).to(device)
    leaves = leaves_of(VIDEO, (4, 2), 64, BF16, device)
    upstream = upstream_of(leaves, lse=True)
    with as_on(fused=fused), NoHostSync(), contextlib.ExitStack() as stack:
        for owner in (JITFunction, InterpretedFunction):
            stack.enter_context(mock.patch.object(owner, "run", record, create=True))
        direct(leaves, video, upstream, deterministic=False)
        first, launches = launches, []
        direct(leaves, other, upstream, deterministic=False)
    assert first == launches
    assert len(first) == 4
