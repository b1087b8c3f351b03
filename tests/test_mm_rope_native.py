"""mm_rope in C++: every instruction set this CPU runs, against the fp64 reference with computed tolerances."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lumos_kernels import library, mm_rope
from lumos_kernels.mm_rope import native
from lumos_kernels.mm_rope.contract import Inputs
from lumos_kernels.mm_rope.frequencies import inverse_frequencies
from lumos_kernels.mm_rope.reference import angles
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, awkward_gradients

THETA = 10000.0
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCK = 64  # kMMRopeBlock: tokens whose gradients of the norms form one partial sum
NAMES = ("q", "k", "dq", "dk", "dq_weight", "dq_bias", "dk_weight", "dk_bias")

pytestmark = [
    pytest.mark.skipif(library.refusal() is not None, reason=str(library.refusal())),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=library.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("LUMOS_CPU_ISA", request.param)
    return request.param


@dataclass(frozen=True)
class Case:
    q: Tensor
    k: Tensor
    positions: Tensor
    q_norm: tuple[Tensor, Tensor] | None
    k_norm: tuple[Tensor, Tensor] | None
    grad_q: Tensor
    grad_k: Tensor


def make_case(
    tokens: int = BLOCK + 1,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    norm_dtype: torch.dtype = torch.float32,
    norm_rows: tuple[int, int] = (1, 1),
    max_position: int = 3000,
) -> Case:
    """Random inputs; a norm with 0 rows is absent."""
    shapes = [(tokens, count, head_dim) for count in heads]
    norms = [
        (1 + 0.3 * torch.randn(rows, head_dim), 0.3 * torch.randn(rows, head_dim)) if rows else None
        for rows in norm_rows
    ]
    return Case(
        *(torch.randn(shape).to(dtype) for shape in shapes),
        torch.randint(0, max_position + 1, (3, tokens), dtype=torch.int32),
        *((norm[0].to(norm_dtype), norm[1].to(norm_dtype)) if norm else None for norm in norms),
        *(torch.randn(shape).to(dtype) for shape in shapes),
    )


def run(case: Case, impl: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name. dtype: run everything in it instead of the case's own dtypes."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)

    norms = [norm and tuple(cast(p).detach().requires_grad_() for p in norm) for norm in (case.q_norm, case.k_norm)]
    q, k = (cast(x).detach().requires_grad_() for x in (case.q, case.k))
    outputs = mm_rope(q, k, case.positions, theta=THETA, q_norm=norms[0], k_norm=norms[1], impl=impl)
    leaves = [q, k, *(p for norm in norms if norm for p in norm)]
    grads = torch.autograd.grad(outputs, leaves, (cast(case.grad_q), cast(case.grad_k)))
    names = ["dq", "dk"] + ["dq_weight", "dq_bias"] * bool(norms[0]) + ["dk_weight", "dk_bias"] * bool(norms[1])
    return {name: t.detach() for name, t in zip(["q", "k", *names], [*outputs, *grads], strict=True)}


def check(case: Case) -> dict[str, Tensor]:
    """Native against the reference, forward and backward; returns native's results."""
    actual, low, high = run(case, "native"), run(case, "reference"), run(case, "reference", torch.float64)
    for name in actual:
        assert actual[name].dtype == low[name].dtype, name
        assert_close_to_reference(actual[name], low[name], high[name], name)
    return actual


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in actual:
        assert_bitwise_equal(actual[name], expected[name], name)


# 160 takes the general path everywhere; the smaller ones fit registers on some instruction sets.
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_the_reference(isa, dtype, head_dim):
    check(make_case(dtype=dtype, head_dim=head_dim))


@pytest.mark.parametrize("tokens", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 1])
def test_lengths_around_the_block(isa, tokens):
    results = check(make_case(tokens))
    if tokens == 0:
        assert not results["dq_weight"].any()


# Heads go in groups of 4; the rest one by one.
@pytest.mark.parametrize("heads", [(1, 1), (3, 2), (4, 1), (5, 3), (7, 7), (32, 8)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 160])
def test_head_counts_around_the_group(isa, heads, head_dim):
    check(make_case(7, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("norm_rows", [(0, 0), (1, 0), (0, 1), (2, 1), (2, 2), (12, 3)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 160])
def test_norms(isa, norm_rows, head_dim):
    check(make_case(heads=(12, 6), head_dim=head_dim, norm_rows=norm_rows))


@pytest.mark.parametrize("norm_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_norm_dtypes(dtype, norm_dtype):
    case = make_case(dtype=dtype, norm_dtype=norm_dtype)
    assert check(case)["dq_weight"].dtype == norm_dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_a_fused_projection(isa, dtype):
    """q and k as slices of a wider buffer that holds NaN everywhere else."""
    case = make_case(dtype=dtype)
    fused = torch.full((2 * len(case.q), 16, 80), torch.nan, dtype=dtype)
    q, k = fused[::2, 1:9, :64], fused[1::2, 10:16:4, 8:72]
    q.copy_(case.q)
    k.copy_(case.k)
    assert_same_bits(check(replace(case, q=q, k=k)), run(case, "native"))


def test_heads_before_tokens(isa):
    case = make_case()
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (case.q, case.k))
    positions = case.positions.T.contiguous().T
    assert_same_bits(check(replace(case, q=q, k=k, positions=positions)), run(case, "native"))


@pytest.mark.parametrize("kind", [name for name, _ in awkward_gradients((2, 8, 64), torch.float32)])
def test_upstream_gradients_with_awkward_strides(isa, kind):
    case = make_case(heads=(8, 8))
    grad = dict(awkward_gradients(case.q.shape, case.q.dtype))[kind]
    case = replace(case, grad_q=grad, grad_k=grad.flip(0))
    dense = replace(case, grad_q=case.grad_q.contiguous(), grad_k=case.grad_k.contiguous())
    assert_same_bits(check(case), run(dense, "native"))


@pytest.mark.parametrize("trained", NAMES[2:])
def test_all_frozen_but_one(trained):
    case = make_case()
    expected = run(case, "native")[trained]
    inputs = dict(zip(NAMES[2:], (case.q, case.k, *case.q_norm, *case.k_norm), strict=True))
    leaves = {name: x.detach().requires_grad_(name == trained) for name, x in inputs.items()}
    q, k, *norms = leaves.values()
    outputs = mm_rope(
        q, k, case.positions, theta=THETA, q_norm=tuple(norms[:2]), k_norm=tuple(norms[2:]), impl="native"
    )
    torch.autograd.backward(outputs, (case.grad_q, case.grad_k))
    assert_bitwise_equal(leaves[trained].grad, expected)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


@pytest.mark.parametrize("tokens", [BLOCK - 1, 5 * BLOCK + 3])
def test_threads_and_runs_give_the_same_bits(isa, tokens):
    case = make_case(tokens)
    expected = run(case, "native")
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for _ in range(3):
            assert_same_bits(run(case, "native"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_positions(isa, dtype):
    check(make_case(dtype=dtype, max_position=90_000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 160])
def test_extreme_values(isa, dtype, head_dim):
    """A large mean costs a one-pass variance all its digits."""
    case = make_case(dtype=dtype, head_dim=head_dim)
    check(replace(case, q=case.q * 5 + 100, k=case.k * 3 - 100, grad_q=case.grad_q * 100))


def test_constant_heads(isa):
    """No variance at all: eps alone keeps the result finite."""
    case = make_case(dtype=torch.float32)
    check(replace(case, q=torch.full_like(case.q, 3.0), k=torch.zeros_like(case.k)))


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160])
def test_constant_heads_are_as_exact_as_their_mean(isa, head_dim):
    """The norm's eps^-1/2 enlarges what the rounded mean leaves of a constant head, and of a constant gradient.

    Many heads of many values: the largest error of a few is luck.
    """
    case = make_case(6 * BLOCK, head_dim=head_dim, dtype=torch.float32, max_position=0)
    q, k, grad_q, grad_k = (x[..., :1].expand_as(x).contiguous() for x in (case.q, case.k, case.grad_q, case.grad_k))
    heads = replace(case, q=q, k=k)
    actual, low, high = run(heads, "native"), run(heads, "reference"), run(heads, "reference", torch.float64)
    for name in ("q", "k", "dq", "dk"):
        assert_close_to_reference(actual[name], low[name], high[name], name)
    for name in ("q", "k"):  # what is left is the bias
        assert (actual[name] - high[name]).abs().max() < 1e-6
    ones = torch.ones(1, head_dim)
    flat = replace(heads, q_norm=(ones, ones), k_norm=(ones, ones), grad_q=grad_q, grad_k=grad_k)
    gradients = run(flat, "native")
    for name in ("dq", "dk"):  # a gradient without variance moves nothing
        assert gradients[name].abs().max() < 1e-6


def rotations(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The cosines and sines that the kernel uses: it turns heads of (1, 0) in fp32."""
    unit = torch.zeros(positions.shape[1], 1, head_dim)
    unit[..., : head_dim // 2] = 1
    turned, _ = mm_rope(unit, unit, positions, theta=THETA, impl="native")
    return turned[:, 0].chunk(2, dim=-1)


def test_cosines_and_sines_are_rounded_correctly(isa):
    """Within 0.51 units in the last place of fp32, at every position up to 90,000 and at the largest int32 ones."""
    steps = torch.cat([torch.arange(90_001), 2**31 - 1 - torch.arange(2000)]).int()
    positions = torch.stack([steps, steps.flip(0), steps.roll(777)])
    angle = angles(positions, inverse_frequencies(THETA, 32, steps.device)).double()
    for actual, exact in zip(rotations(positions, 32), (angle.cos(), angle.sin()), strict=True):
        unit = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
        assert ((actual - exact).abs() <= 0.51 * unit).all()


def test_rotations_are_the_same_on_every_instruction_set(monkeypatch):
    positions = torch.randint(0, 90_001, (3, 500), dtype=torch.int32)
    results = []
    for name in library.isas():
        monkeypatch.setenv("LUMOS_CPU_ISA", name)
        results.append(torch.cat(rotations(positions, 96)))
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_finite_value_passes_unchanged_without_rotation(isa, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    q = values.where(values.isfinite(), 0).view(-1, 1, 32)
    positions = torch.zeros(3, len(q), dtype=torch.int32)
    for out in mm_rope(q, q, positions, impl="native"):
        assert torch.equal(out, q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even_and_keeps_nan(isa, dtype):
    """With a weight of 0 and no rotation the output is the bias, rounded once: as torch rounds it."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()]
    below = torch.nextafter(values, torch.tensor(-torch.inf))
    ties = (values[:-1] + values[1:]) / 2
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 1e-8, -0.0])
    # Rounding up the bits of a NaN whose payload is all ones would make it -0 or 0.
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    bias = torch.cat([values, below, ties, special, payloads])
    bias = torch.nn.functional.pad(bias, (0, -len(bias) % 16)).view(-1, 16)
    rows = len(bias)
    norm = torch.zeros(2, rows, 32)
    norm[1, :, :16] = bias  # the second half stays 0: inf * sin(0) is NaN
    q = torch.randn(1, rows, 32).to(dtype)
    q_norm = (norm[0], norm[1])
    out, _ = mm_rope(q, q, torch.zeros(3, 1, dtype=torch.int32), q_norm=q_norm, k_norm=q_norm, impl="native")
    actual, expected = out[0, :, :16], norm[1, :, :16].to(dtype)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("head_dim", [64, 160])
def test_nan_stays_in_its_head(isa, head_dim):
    case = make_case(9, head_dim=head_dim)
    case.q[4, 5, 17] = torch.nan
    poisoned = torch.zeros(case.q.shape[:2], dtype=torch.bool)
    poisoned[4, 5] = True
    results = run(case, "native")
    for name in ("q", "dq"):
        assert torch.equal(results[name].isnan().all(-1), poisoned)
        assert torch.equal(results[name].isnan().any(-1), poisoned)
    assert not results["k"].isnan().any()


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("norm_rows", [(1, 1), (0, 0)], ids=str)
def test_every_element_is_written(isa, head_dim, norm_rows):
    """In deterministic mode torch fills new tensors, also those that C++ asks for, with NaN."""
    case = make_case(BLOCK + 1, heads=(5, 3), head_dim=head_dim, norm_rows=norm_rows)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        results = run(case, "native")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(results, run(case, "native"))
    assert not any(result.isnan().any() for result in results.values())


def test_outputs_are_contiguous():
    case = make_case()
    q = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    frequencies = inverse_frequencies(THETA, 64, q.device)
    outputs = native.forward(Inputs(q, case.k, case.positions, None, None, frequencies, 1e-5))
    assert all(out.is_contiguous() for out in outputs)


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("LUMOS_CPU_ISA", "avx1024")
    case = make_case(1)
    with pytest.raises(ValueError, match="LUMOS_CPU_ISA=avx1024 is not one of"):
        mm_rope(case.q, case.k, case.positions, impl="native")


def test_float64_is_refused_with_the_reason():
    case = make_case(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="computes bfloat16, float16 and float32, not float64"):
        mm_rope(case.q, case.k, case.positions, impl="native")
