"""mm_rope's Triton kernels against the fp64 reference, at the shapes, strides and positions where they could go wrong.

conftest.py says where they run. Programs are few: the interpreter runs them one after another.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from lumos_kernels import tensors
from lumos_kernels.mm_rope import triton as kernels
from lumos_kernels.mm_rope.api import mm_rope
from lumos_kernels.mm_rope.contract import Inputs, Norm, Rotated
from lumos_kernels.mm_rope.frequencies import AXES, inverse_frequencies
from lumos_kernels.mm_rope.triton import configs, primitives
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, awkward_gradients

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

MAX_POSITION = 90_000
NAMES = ("q", "k", "q weight", "q bias", "k weight", "k bias")


@dataclass(frozen=True)
class Problem:
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    tokens: int = 33
    q_heads: int = 4
    kv_heads: int = 2
    q_rows: int = 1  # of q's norm; 0 for none
    k_rows: int = 1
    norm_dtype: torch.dtype | None = None  # that of q where None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}-D{self.head_dim}-T{self.tokens}-H{self.q_heads}.{self.kv_heads}-mp{self.q_rows}.{self.k_rows}"

    def make(self, device: str) -> dict:
        """mm_rope's arguments: q and k are slices of one projection, as in the model."""
        qkv = torch.randn(self.tokens, self.q_heads + 2 * self.kv_heads, self.head_dim) * 2 + 0.5
        q, k, _ = qkv.to(device, self.dtype).split([self.q_heads, self.kv_heads, self.kv_heads], dim=1)
        positions = torch.randint(0, MAX_POSITION + 1, (3, self.tokens), dtype=torch.int32)
        positions[:, :1], positions[:, 1:2] = 0, MAX_POSITION

        def norm(rows: int) -> tuple[Tensor, Tensor] | None:
            if not rows:
                return None
            weight, bias = 1 + torch.randn(rows, self.head_dim) / 2, torch.randn(rows, self.head_dim)
            return tuple(p.to(device, self.norm_dtype or self.dtype) for p in (weight, bias))

        norms = {"q_norm": norm(self.q_rows), "k_norm": norm(self.k_rows)}
        return {"q": q, "k": k, "positions": positions.to(device), **norms}


def leaves(arguments: dict) -> list[Tensor]:
    """The differentiable arguments in the order of NAMES, None for the absent."""
    norms = (arguments[name] or (None, None) for name in ("q_norm", "k_norm"))
    return [arguments["q"], arguments["k"], *itertools.chain(*norms)]


def run(arguments: dict, grads: tuple[Tensor, Tensor], impl: str, need=NAMES) -> dict[str, Tensor]:
    """Both outputs and the gradients named by `need`, by name."""
    named = {
        name: x.detach().requires_grad_(name in need)
        for name, x in zip(NAMES, leaves(arguments), strict=True)
        if x is not None
    }
    norms = {
        f"{side}_norm": (named[f"{side} weight"], named[f"{side} bias"]) if f"{side} weight" in named else None
        for side in "qk"
    }
    outputs = mm_rope(named["q"], named["k"], arguments["positions"], **norms, impl=impl)
    wanted = [name for name in named if name in need]
    got = torch.autograd.grad(outputs, [named[name] for name in wanted], grads, allow_unused=True)
    return {
        "output q": outputs[0],
        "output k": outputs[1],
        **{f"gradient of {name}": grad for name, grad in zip(wanted, got, strict=True)},
    }


def upstream(arguments: dict) -> tuple[Tensor, Tensor]:
    return torch.randn_like(arguments["q"]), torch.randn_like(arguments["k"])


def in_fp64(value):
    if isinstance(value, tuple):
        return tuple(map(in_fp64, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def assert_matches_reference(arguments: dict, grads: tuple[Tensor, Tensor]) -> None:
    low = run(arguments, grads, "reference")
    high = run({name: in_fp64(value) for name, value in arguments.items()}, in_fp64(grads), "reference")
    for name, actual in run(arguments, grads, "triton").items():
        assert actual.dtype == low[name].dtype
        assert_close_to_reference(actual, low[name], high[name], name)


PROBLEMS = [
    Problem(torch.float32, 64, 34, 6, 2, 2, 2),
    Problem(torch.bfloat16, 64, 65, 9, 3, 3, 1),  # 65 tokens: two blocks and one token
    Problem(torch.float16, 128, 17, 4, 4, 2, 0),
    Problem(torch.bfloat16, 128, 17, 3, 1, 0, 1),
    Problem(torch.bfloat16, 96, 17, 5, 1, 0, 0),
    Problem(torch.float32, 96, 9, 4, 2, 2, 1),  # 48 pairs in a tile of 64
    Problem(torch.float16, 32, 65, 10, 10, 1, 5),
    Problem(torch.float32, 32, 33, 17, 1, 1, 1),  # groups of 8, 8 and 1 heads
    Problem(torch.bfloat16, 256, 9, 2, 2, 1, 2),
    Problem(torch.bfloat16, 64, 33, 2, 1, 1, 1, norm_dtype=torch.float32),
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_matches_reference(problem, device):
    arguments = problem.make(device)
    assert_matches_reference(arguments, upstream(arguments))


@pytest.mark.parametrize("tokens", [0, 1, 31, 32, 33])
def test_token_counts_around_a_block(tokens, device):
    arguments = Problem(torch.bfloat16, 64, tokens, 2, 1).make(device)
    assert_matches_reference(arguments, upstream(arguments))


def test_no_query_heads_or_no_key_heads(device):
    for q_heads, kv_heads in ((0, 2), (2, 0)):
        arguments = Problem(tokens=3, q_heads=q_heads, kv_heads=kv_heads).make(device)
        assert_matches_reference(arguments, upstream(arguments))


def test_several_blocks_of_tokens_in_a_split(device):
    """7 blocks in at most 2 splits: 4 and 3."""
    arguments = Problem(torch.float32, 64, 100, 2, 1).make(device)
    with mock.patch.object(configs, "MAX_SPLITS", 2):
        assert_matches_reference(arguments, upstream(arguments))


def test_second_stage_walks_over_more_partials_than_a_tile(device):
    arguments = Problem(torch.float32, 64, 65, 9, 1).make(device)  # 10 partials for q, 5 for k
    with mock.patch.object(configs, "SUM_PARTIALS", 4):
        assert_matches_reference(arguments, upstream(arguments))


@pytest.mark.parametrize("layout", ["heads first", "every second token", "channels last", "shifted by one"])
def test_strides(layout, device):
    problem = Problem(torch.float16, 64, 5, 4, 2)
    arguments = problem.make(device)
    for name in ("q", "k"):
        dense = arguments[name].contiguous()
        tokens, heads, head_dim = dense.shape
        if layout == "heads first":
            strided = dense.transpose(0, 1).contiguous().transpose(0, 1)
        elif layout == "every second token":
            strided = dense.repeat_interleave(2, dim=0)[::2]
        elif layout == "channels last":
            strided = dense.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        else:  # not aligned to 16 bytes
            strided = dense.new_empty(dense.numel() + 1)[1:].view(tokens, heads, head_dim).copy_(dense)
        assert torch.equal(strided, dense)
        arguments[name] = strided
    assert_matches_reference(arguments, upstream(arguments))


def test_awkward_upstream_gradients(device):
    arguments = Problem(torch.bfloat16, 64, 4, 4, 2, 2, 2).make(device)
    q_grads, k_grads = (awkward_gradients(arguments[name].shape, torch.bfloat16) for name in "qk")
    for (kind, grad_q), (_, grad_k) in zip(q_grads, k_grads, strict=True):
        grads = grad_q.to(device), grad_k.to(device)
        expected = run(arguments, tuple(g.clone(memory_format=torch.contiguous_format) for g in grads), "triton")
        for name, actual in run(arguments, grads, "triton").items():
            assert_bitwise_equal(actual, expected[name], f"{name}, upstream {kind}")


def test_frozen_inputs_do_not_change_the_other_gradients(device):
    arguments = Problem(torch.bfloat16, 64, 3, 2, 1).make(device)
    grads = upstream(arguments)
    full = run(arguments, grads, "triton")
    for need in (["q"], ["k weight"], ["q bias", "k"]):
        for name, actual in run(arguments, grads, "triton", need).items():
            assert_bitwise_equal(actual, full[name], name)


def test_a_head_of_a_token_depends_on_nothing_else(device):
    """Head 1 of token 2 becomes huge: every other output and gradient of q and k keeps its bits."""
    arguments = Problem(torch.bfloat16, 96, 5, 3, 2, 1, 2).make(device)
    grads = upstream(arguments)
    before = run(arguments, grads, "triton", ("q", "k"))
    arguments["q"][2, 1], grads[0][2, 1] = 1e30, -1e30
    after = run(arguments, grads, "triton", ("q", "k"))
    for name, x in before.items():
        if name.endswith("q"):
            assert not torch.equal(after[name][2, 1], x[2, 1])
            after[name][2, 1] = x[2, 1]
        assert_bitwise_equal(after[name], x, name)


def test_extreme_values(device):
    """Rows whose mean is 1,000 times their spread, constant rows, rows of zeros."""
    arguments = Problem(torch.float32, 64, 4, 2, 1).make(device)
    q = arguments["q"]
    q[0], q[1], q[2] = q[0] * 1e-3 + 3.0, 5.0, 0.0
    assert_matches_reference(arguments, upstream(arguments))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_constant_heads_are_as_exact_as_their_mean(head_dim, device):
    """The norm's eps^-1/2 enlarges what the rounded mean leaves of a constant head, and of a constant gradient."""
    arguments = Problem(torch.float32, head_dim, 64, 4, 2).make(device)
    arguments["positions"].zero_()
    for name in ("q", "k"):
        arguments[name] = arguments[name][..., :1].expand_as(arguments[name]).contiguous()
        arguments[f"{name}_norm"][0].fill_(1.0)
    grads = tuple(grad[..., :1].expand_as(grad).contiguous() for grad in upstream(arguments))
    results = run(arguments, grads, "triton", ("q", "k"))
    for name in ("q", "k"):
        assert (results[f"output {name}"] - arguments[f"{name}_norm"][1]).abs().max() < 1e-6  # the bias is left
        assert results[f"gradient of {name}"].abs().max() < 1e-6


def test_masked_rows_do_not_reach_the_norms_gradient_without_eps(device):
    """A masked row has no variance: with eps = 0 its rstd would be infinite."""
    arguments = Problem(torch.float32, 64, 3, 2, 1).make(device)
    weight, bias = (p.requires_grad_() for p in arguments["q_norm"])
    out, _ = mm_rope(**{**arguments, "q_norm": (weight, bias)}, eps=0.0, impl="triton")
    for grad in torch.autograd.grad(out.sum(), (weight, bias)):
        assert grad.isfinite().all()


def direct(arguments: dict, grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Everything that the implementation returns, called without torch.library between."""
    q, k, positions, q_norm, k_norm = arguments.values()
    frequencies = inverse_frequencies(10000.0, q.shape[-1], q.device)
    norms = (None if norm is None else Norm(*norm) for norm in (q_norm, k_norm))
    inputs = Inputs(q, k, positions, *norms, frequencies, 1e-5)
    outputs = kernels.forward(inputs)
    dq, dk, *dnorms = kernels.backward(inputs, Rotated(*grads))
    return [*outputs, dq, dk, *(p for norm in dnorms if norm is not None for p in norm)]


GUARDED = [
    Problem(torch.bfloat16, 96, 33, 3, 1, 1, 1),
    Problem(torch.float32, 64, 17, 9, 2, 0, 2),
    Problem(torch.float16, 128, 0, 2, 1, 1, 1),
    Problem(torch.float16, 32, 3, 2, 1, 0, 0),
]


@pytest.mark.parametrize("problem", GUARDED, ids=str)
def test_writes_every_element_and_nothing_around(problem, device, guarded_allocations):
    arguments = problem.make(device)
    with guarded_allocations():
        results = direct(arguments, upstream(arguments))
    assert all(x.is_contiguous() and not x.isnan().any() for x in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_64_bit_offsets_give_the_same_bits(dtype, device):
    arguments = Problem(dtype, 64, 33, 9, 2, 3, 1).make(device)
    grads = upstream(arguments)
    expected = direct(arguments, grads)
    asked = []

    def always(*tensors: Tensor) -> bool:
        asked.append({id(x) for x in tensors})
        return True

    with mock.patch.object(tensors, "needs_int64_offsets", always):
        for actual, wanted in zip(direct(arguments, grads), expected, strict=True):
            assert_bitwise_equal(actual, wanted)
    q, k = arguments["q"], arguments["k"]
    assert len(asked) == 2
    for used, seen in zip(([q, k], [q, k, *grads]), asked, strict=True):
        assert {id(x) for x in used} <= seen
        assert len(seen) == len(used) + 3  # positions and both outputs


def test_deterministic(device):
    arguments = Problem(torch.bfloat16, 64, 70, 3, 1).make(device)
    grads = upstream(arguments)
    first, second = direct(arguments, grads), direct(arguments, grads)
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)


@triton.jit
def _cos_sin_kernel(angle_ptr, cos_ptr, sin_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    cos, sin = primitives.cos_sin(tl.load(angle_ptr + i))
    tl.store(cos_ptr + i, cos)
    tl.store(sin_ptr + i, sin)


def test_cos_and_sin_are_right_to_one_unit_in_the_last_place_of_one(device):
    """Up to 100,000 rad: all integer angles, the fp32 neighbours of multiples of pi/4, and random ones; both signs."""
    size = 2**20
    multiples = (torch.arange(130_000, dtype=torch.float64) * (math.pi / 4)).float()
    angles = torch.cat(
        [
            torch.arange(100_000).float(),
            multiples,
            torch.nextafter(multiples, torch.tensor(torch.inf)),
            torch.nextafter(multiples, torch.tensor(0.0)),
            torch.rand(100_000),
            torch.rand(size) * 1e5,
        ]
    )[:size]
    angles[1::2].neg_()
    angles = angles.to(device)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    _cos_sin_kernel[(size // 1024 if device == "cuda" else 1,)](angles, cos, sin, 1024 if device == "cuda" else size)
    for ours, exact in ((cos, angles.double().cos()), (sin, angles.double().sin())):
        assert (ours - exact).abs().max() <= 2**-23


def test_angles_are_the_rounded_products_of_the_reference(device):
    """At position 90,000 an angle that is one unit in the last place off turns a pair by up to 8e-3."""
    problem = Problem(torch.float32, 128, 16, 1, 1, 0, 0)
    arguments = problem.make(device)
    arguments["positions"] = MAX_POSITION - torch.arange(48, dtype=torch.int32, device=device).view(3, 16)
    assert_matches_reference(arguments, upstream(arguments))


def test_every_pair_takes_its_axis(device):
    """One axis at a time moves: exactly the pairs of that axis turn."""
    arguments = Problem(torch.float32, 96, 1, 1, 1, 0, 0).make(device)
    for axis in range(3):
        arguments["positions"] = torch.zeros(3, 1, dtype=torch.int32, device=device)
        arguments["positions"][axis] = 1000
        out, _ = mm_rope(**arguments, impl="triton")
        turned = (out != arguments["q"]).flatten().tolist()
        assert turned == [AXES[d % 48 % 16] == axis for d in range(96)]
