"""mm_rope: every implementation against an independent oracle, and the contracts of its public function.

An implementation that runs CPU tensors joins by being registered in dispatch; Triton has a file of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from golden import TRAINING, load
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from lumos_kernels import Frame, FrameLayout, Text, dispatch, mm_rope
from lumos_kernels.dispatch import Problem
from lumos_kernels.mm_rope import reference
from lumos_kernels.mm_rope.frequencies import inverse_frequencies, pair_axes
from lumos_kernels.testing import (
    assert_bitwise_equal,
    assert_close_to_reference,
    awkward_gradients,
    poisoned_allocations,
)

OP = dispatch.ops()["mm_rope"]
LOW = (torch.bfloat16, torch.float16, torch.float32)


def runs(impl, dtype):
    return impl != "triton" and OP.refusal(impl, Problem("cpu", dtype, 64)) is None


IMPLS = [impl for impl in OP.implementations if runs(impl, torch.float32)]
CASES = [(impl, dtype) for impl in IMPLS for dtype in LOW if runs(impl, dtype)]
EXACT = [impl for impl in IMPLS if runs(impl, torch.float64)]
# T, Hq, Hkv, D, rows of the norms (None: no norm)
SHAPES = [(40, 4, 2, 64, 1), (1, 1, 1, 32, None), (33, 3, 3, 96, 3), (7, 6, 2, 128, 2), (515, 5, 1, 32, 1)]

# SEMANTICS 2, written out: the axis (t, h, w = 0, 1, 2) of channel d % 16.
AXIS = dict.fromkeys(range(4), 0) | dict.fromkeys((4, 5, 8, 9, 12, 13), 1) | dict.fromkeys((6, 7, 10, 11, 14, 15), 2)


def oracle_angles(positions, theta, head_dim):
    """fp32 [T, D/2], channel by channel."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return torch.stack([positions[AXIS[d % 16]].float() * frequencies[d] for d in range(head_dim // 2)], -1)


def oracle(x, positions, norm=None, theta=10000.0, eps=1e-5):
    """torch's layer_norm head by head, then complex multiplication by e^(i angle), in x's precision."""
    if norm is not None:
        weight, bias = (p.to(x.dtype).repeat_interleave(x.shape[1] // p.shape[0], 0) for p in norm)
        heads = enumerate(x.unbind(1))
        x = torch.stack([F.layer_norm(head, x.shape[2:], weight[h], bias[h], eps) for h, head in heads], 1)
    angles = oracle_angles(positions, theta, x.shape[2])[:, None].to(torch.promote_types(x.dtype, torch.float32))
    if x.dtype == torch.float64:
        turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)  # as the official code rounds them
    real, imag = x.chunk(2, -1)
    return torch.cat([real * cos - imag * sin, imag * cos + real * sin], -1)


def by_oracle(q, k, positions, q_norm=None, k_norm=None):
    return oracle(q, positions, q_norm), oracle(k, positions, k_norm)


def layout_positions(tokens):
    """Positions of a text, frames and a text, cut to the given length."""
    frames = tokens // 40
    return FrameLayout.from_segments([[Text(11), *[Frame(4, 8)] * frames, Text(40)]]).positions[:, :tokens].contiguous()


def problem(shape=SHAPES[0], dtype=torch.float32, norm_dtype=None):
    """Leaves q, k, q_norm weight and bias, k_norm weight and bias; the norms' values are far from one and zero."""
    tokens, q_heads, kv_heads, head_dim, rows = shape
    leaves = [torch.randn(tokens, heads, head_dim).mul(2).add(0.5).to(dtype) for heads in (q_heads, kv_heads)]
    if rows is not None:
        leaves += [torch.randn(rows, head_dim).add(1).to(norm_dtype or dtype) for _ in range(4)]
    return [leaf.requires_grad_() for leaf in leaves]


def call(function, leaves, positions, **options):
    q, k, *norms = leaves
    norms = {"q_norm": tuple(norms[:2]), "k_norm": tuple(norms[2:])} if norms else {}
    return function(q, k, positions, **norms, **options)


def with_gradients(function, leaves, positions, upstream, **options):
    """Outputs, then the gradients of the leaves, under the given gradients of q and k."""
    outputs = call(function, leaves, positions, **options)
    needing = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, needing, upstream)]


def copies(leaves, dtype):
    return [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]


def random_upstream(leaves):
    return [torch.randn_like(leaf) for leaf in leaves[:2]]


def yardstick(impl):
    """The eager low-precision rival: for the reference the oracle, for everything else the reference."""
    return (by_oracle, {}) if impl == "reference" else (mm_rope, {"impl": "reference"})


def assert_as_close_as_eager(impl, leaves, positions, upstream):
    rival, options = yardstick(impl)
    actual = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    dtypes = {leaf.dtype for leaf in leaves}
    low_leaves = copies(leaves, leaves[0].dtype) if impl == "reference" and len(dtypes) > 1 else leaves
    low = with_gradients(rival, low_leaves, positions, upstream, **options)
    high = with_gradients(by_oracle, copies(leaves, torch.float64), positions, [u.double() for u in upstream])
    names = ("q", "k", "dq", "dk", "dq_weight", "dq_bias", "dk_weight", "dk_bias")
    for name, a, lo, hi in zip(names, actual, low, high, strict=False):
        assert_close_to_reference(a, lo, hi, name)


def fp64_rounding(expected):
    """What a few hundred fp64 operations in another order may differ by."""
    return 1000 * torch.finfo(torch.float64).eps * float(expected.abs().max().clamp_min(1))


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp64_equals_the_oracle(impl, shape):
    leaves, positions = problem(shape, torch.float64), layout_positions(shape[0])
    upstream = random_upstream(leaves)
    ours = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    for actual, expected in zip(ours, with_gradients(by_oracle, leaves, positions, upstream), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=fp64_rounding(expected))


@pytest.mark.parametrize("name", TRAINING)
def test_cos_and_sin_are_the_official_ones_bit_for_bit(name):
    golden, _ = load(name)
    positions = FrameLayout.from_tokens(golden["masked_input_ids"]).positions
    cos, sin = (golden[f"rope.{part}"].flatten(0, 1) for part in ("cos", "sin"))
    half = cos.shape[1] // 2
    frequencies = inverse_frequencies(10000.0, 2 * half, torch.device("cpu"))
    angles = reference.angles(positions, frequencies)
    assert_bitwise_equal(torch.cat([angles, angles], -1).cos(), cos, "cos")
    assert_bitwise_equal(torch.cat([angles, angles], -1).sin(), sin, "sin")
    unit = F.pad(torch.ones(cos.shape[0], 1, half), (0, half))  # 1 + 0i, which turns into cos + i sin
    turned, _ = mm_rope(unit, unit, positions, impl="reference")
    assert_bitwise_equal(turned[:, 0], torch.cat([cos[:, :half], sin[:, :half]], -1))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_within_twice_the_eager_one(impl, dtype, shape):
    leaves = problem(shape, dtype)
    assert_as_close_as_eager(impl, leaves, layout_positions(shape[0]), random_upstream(leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_norms_keep_their_own_dtype(impl):
    leaves, positions = problem(dtype=torch.bfloat16, norm_dtype=torch.float32), layout_positions(40)
    upstream = random_upstream(leaves)
    assert_as_close_as_eager(impl, leaves, positions, upstream)
    *_, dweight, dbias = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    assert dweight.dtype == dbias.dtype == torch.float32


@pytest.mark.parametrize("impl", EXACT)
@pytest.mark.parametrize("norms", ["both", "q", "k", "none"])
def test_gradcheck(impl, norms):
    q, k, *parameters = problem((3, 2, 1, 32, 1), torch.float64)
    positions = layout_positions(40)[:, [3, 15, 30]].contiguous()
    q_norm, k_norm = norms in ("both", "q"), norms in ("both", "k")

    def function(q, k, *parameters):
        q_pair, k_pair = tuple(parameters[:2]), tuple(parameters[2:])
        return mm_rope(
            q,
            k,
            positions,
            theta=100.0,
            q_norm=q_pair if q_norm else None,
            k_norm=k_pair if k_norm else None,
            impl=impl,
        )

    assert torch.autograd.gradcheck(function, (q, k, *parameters))


@pytest.mark.parametrize("impl", IMPLS)
def test_options_reach_the_kernel(impl):
    """theta and eps are those of the call."""
    leaves, positions = problem((9, 2, 1, 32, 1)), layout_positions(9)
    leaves[0].data.mul_(1e-3)  # a variance near eps
    q, _ = call(mm_rope, leaves, positions, theta=77.0, eps=1e-4, impl=impl)
    q_leaf, norm = leaves[0].detach(), [p.detach() for p in leaves[2:4]]
    low = oracle(q_leaf, positions, norm, 77.0, 1e-4)
    high = oracle(q_leaf.double(), positions, [p.double() for p in norm], 77.0, 1e-4)
    assert_close_to_reference(q.detach(), low, high)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_depends_on_itself_alone(impl):
    leaves, positions = problem((40, 4, 2, 64, 1)), layout_positions(40)
    kept = torch.arange(40) % 3 == 0
    outputs = call(mm_rope, leaves, positions, impl=impl)
    upstream = [u * kept[:, None, None] for u in random_upstream(leaves)]
    dq, dk, *_ = torch.autograd.grad(outputs, leaves, upstream)
    assert not dq[~kept].any()
    assert not dk[~kept].any()

    others = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    for leaf in others[:2]:
        leaf.data[~kept] = 1e4
    changed_positions = positions.clone()
    changed_positions[:, ~kept] = 77777
    changed = call(mm_rope, others, changed_positions, impl=impl)
    gradients = torch.autograd.grad(changed, others, upstream)
    for name, a, b in zip(("q", "k"), outputs, changed, strict=True):
        assert_bitwise_equal(b[kept], a[kept], name)
    for name, a, b in zip(("dq", "dk"), (dq, dk), gradients, strict=False):
        assert_bitwise_equal(b[kept], a[kept], name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", ["q", "k"])
def test_awkward_gradients(impl, which):
    leaves, positions = problem((12, 6, 2, 32, 2)), layout_positions(12)
    shape = leaves["qk".index(which)].shape
    for _, grad in awkward_gradients(shape, torch.float32):
        other = torch.randn_like(leaves[1 - "qk".index(which)])
        assert_as_close_as_eager(impl, leaves, positions, [grad, other] if which == "q" else [other, grad])


@pytest.mark.parametrize("impl", IMPLS)
def test_one_output_may_go_unused(impl):
    leaves, positions = problem(), layout_positions(40)
    upstream = random_upstream(leaves)
    both = with_gradients(mm_rope, leaves, positions, [upstream[0], torch.zeros_like(upstream[1])], impl=impl)
    rotated, _ = call(mm_rope, leaves, positions, impl=impl)
    alone = torch.autograd.grad(rotated, leaves, upstream[0], allow_unused=True, materialize_grads=True)
    for a, b in zip(alone, both[2:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_two_backward_passes_give_the_same_gradients(impl):
    leaves, positions = problem(), layout_positions(40)
    outputs, upstream = call(mm_rope, leaves, positions, impl=impl), random_upstream(leaves)
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, upstream)
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_gradients_accumulated_over_8_steps(impl, dtype):
    rival, options = yardstick(impl)
    first, positions = problem(dtype=dtype), layout_positions(40)
    steps = [(problem(dtype=dtype)[:2], random_upstream(first)) for _ in range(8)]

    def accumulate(function, dtype, **options):
        parameters = copies(first[2:], dtype)
        for inputs, upstream in steps:
            outputs = call(function, [*copies(inputs, dtype), *parameters], positions, **options)
            torch.autograd.backward(outputs, [u.to(dtype) for u in upstream])
        return [p.grad for p in parameters]

    actual, low = accumulate(mm_rope, dtype, impl=impl), accumulate(rival, dtype, **options)
    for name, a, lo, hi in zip(
        ("dq_weight", "dq_bias", "dk_weight", "dk_bias"), actual, low, accumulate(by_oracle, torch.float64), strict=True
    ):
        assert_close_to_reference(a, lo, hi, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3, 4, 5), (0, 1), (0, 3), (1, 2, 4, 5)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(impl, frozen):
    leaves, positions = problem(), layout_positions(40)
    upstream = random_upstream(leaves)
    every = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)[2:]
    for index in frozen:
        leaves[index].requires_grad_(False)
    outputs = call(mm_rope, leaves, positions, impl=impl)
    torch.autograd.backward(
        [o for o in outputs if o.requires_grad], [u for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    )
    for index, leaf in enumerate(leaves):
        if index in frozen:
            assert leaf.grad is None
        else:
            assert_bitwise_equal(leaf.grad, every[index])


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("rows", [None, 1])
def test_no_tokens(impl, dtype, rows):
    leaves = problem((0, 2, 1, 32, rows), dtype)
    positions = torch.empty(3, 0, dtype=torch.int32)
    q, k, dq, dk, *dnorms = with_gradients(mm_rope, leaves, positions, random_upstream(leaves), impl=impl)
    assert q.shape == dq.shape == (0, 2, 32)
    assert k.shape == dk.shape == (0, 1, 32)
    assert not any(grad.any() for grad in dnorms)


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_slices_of_a_fused_projection(impl, dtype):
    """q and k as a model makes them: slices of one [T, (Hq + 2 Hkv) D] tensor, whose gradient collects theirs."""
    fused = torch.randn(37, (6 + 2 + 2) * 32).to(dtype)
    positions, upstream = layout_positions(37), [torch.randn(37, 6, 32).to(dtype), torch.randn(37, 2, 32).to(dtype)]

    def split(leaf):
        q, k, _ = leaf.split([6 * 32, 2 * 32, 2 * 32], dim=-1)
        return q.unflatten(-1, (6, 32)), k.unflatten(-1, (2, 32))

    def run(function, dtype, contiguous=False, **options):
        leaf = fused.to(dtype).requires_grad_()
        q, k = (x.contiguous() if contiguous else x for x in split(leaf))
        assert q.is_contiguous() == contiguous
        outputs = function(q, k, positions, **options)
        (grad,) = torch.autograd.grad(outputs, leaf, [u.to(dtype) for u in upstream])
        return [*outputs, grad]

    for strided, dense in zip(
        run(mm_rope, dtype, impl=impl), run(mm_rope, dtype, contiguous=True, impl=impl), strict=True
    ):
        assert_bitwise_equal(strided, dense)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (0, 2, 1)])
def test_any_strides(impl, order):
    """Transposed inputs, also with a last stride other than one, and outputs that are contiguous all the same."""
    leaves, positions = problem((12, 6, 4, 32, 2)), layout_positions(12)
    upstream = random_upstream(leaves)
    dense = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    inverse = [order.index(axis) for axis in range(3)]
    strided = [leaf.detach().permute(order).contiguous().permute(inverse).requires_grad_() for leaf in leaves[:2]]
    ours = with_gradients(mm_rope, strided + leaves[2:], positions, upstream, impl=impl)
    assert not strided[0].is_contiguous()
    for a, b in zip(ours, dense, strict=True):
        assert_bitwise_equal(a, b)
    assert all(output.is_contiguous() for output in call(mm_rope, strided + leaves[2:], positions, impl=impl))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_positions_to_90000(impl, dtype):
    leaves = problem((64, 3, 1, 128, 1), dtype)
    positions = torch.randint(0, 90001, (3, 64), dtype=torch.int32)
    positions[:, 0] = 90000
    assert_as_close_as_eager(impl, leaves, positions, random_upstream(leaves))


@pytest.mark.parametrize(("impl", "dtype"), CASES)
def test_extreme_values(impl, dtype):
    """Large and small heads, and one that is constant, so that its variance is zero."""
    leaves, positions = problem((40, 4, 2, 64, 1), dtype), layout_positions(40)
    with torch.no_grad():
        leaves[0][0::4] *= 5
        leaves[0][1::4] *= 1e-3
        leaves[0][2::4] = 3.0
        leaves[1][0::2] *= 1000
    assert_as_close_as_eager(impl, leaves, positions, random_upstream(leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_alone(impl):
    leaves, positions = problem(), layout_positions(40)
    before = [leaf.detach().clone() for leaf in leaves]
    with_gradients(mm_rope, leaves, positions, random_upstream(leaves), impl=impl)
    for leaf, copy in zip(leaves, before, strict=True):
        assert_bitwise_equal(leaf.detach(), copy)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [None, 2])
def test_every_output_element_is_written(impl, rows):
    leaves, positions = problem((33, 4, 2, 32, rows)), layout_positions(33)
    upstream = random_upstream(leaves)
    expected = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    with poisoned_allocations():
        poisoned = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    for a, b in zip(poisoned, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_fifty_runs_give_the_same_bits(impl):
    leaves, positions = problem(), layout_positions(40)
    upstream = random_upstream(leaves)
    first = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    for _ in range(50):
        for a, b in zip(with_gradients(mm_rope, leaves, positions, upstream, impl=impl), first, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    leaves, positions = problem(), layout_positions(40)
    upstream = random_upstream(leaves)
    expected = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        ours = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
    for a, b in zip(ours, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(impl, reentrant):
    leaves, positions = problem(), layout_positions(40)
    upstream = random_upstream(leaves)
    expected = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)[2:]
    outputs = checkpoint(lambda *args: call(mm_rope, args, positions, impl=impl), *leaves, use_reentrant=reentrant)
    torch.autograd.backward(outputs, upstream)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert_bitwise_equal(leaf.grad, grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_inference_mode_leaves_nothing_behind_that_training_trips_over(impl):
    inverse_frequencies.cache_clear()
    pair_axes.cache_clear()
    leaves, positions = problem(), layout_positions(40)
    with torch.inference_mode():
        call(mm_rope, leaves, positions, impl=impl)
    with_gradients(mm_rope, leaves, positions, random_upstream(leaves), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [None, 2])
def test_opcheck(impl, rows):
    tensors = [leaf.detach() for leaf in problem((9, 4, 2, 32, rows))]
    q, k, *norms = tensors
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    arguments = (q, k, layout_positions(9), *(norms or [None] * 4), 10000.0, 1e-5, impl)
    opcheck(torch.ops.lumos_kernels.mm_rope.default, arguments)
    grads = torch.randn(4, 9, 32).transpose(0, 1), torch.randn(9, 2, 1).expand(9, 2, 32)
    opcheck(torch.ops.lumos_kernels.mm_rope_backward.default, (*grads, *arguments))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_takes_a_second_length(impl, backend):
    def function(q, k, qw, qb, kw, kb, positions):
        return mm_rope(q, k, positions, q_norm=(qw, qb), k_norm=(kw, kb), impl=impl)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def check(tokens):
        leaves, positions = problem((tokens, 4, 2, 32, 2)), layout_positions(tokens)
        upstream = random_upstream(leaves)
        expected = with_gradients(mm_rope, leaves, positions, upstream, impl=impl)
        outputs = compiled(*leaves, positions)
        for a, b in zip([*outputs, *torch.autograd.grad(outputs, leaves, upstream)], expected, strict=True):
            assert_bitwise_equal(a, b)

    check(40)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(57)


BAD = {
    "q without heads": ("q", {"q": torch.zeros(8, 64)}),
    "q of integers": ("q", {"q": torch.zeros(8, 4, 64, dtype=torch.int64)}),
    "head_dim 48": ("head_dim", {"q": torch.zeros(8, 4, 48), "k": torch.zeros(8, 2, 48)}),
    "k of other tokens": ("k", {"k": torch.zeros(7, 2, 64)}),
    "k of another head_dim": ("k", {"k": torch.zeros(8, 2, 32)}),
    "k of another dtype": ("k", {"k": torch.zeros(8, 2, 64, dtype=torch.bfloat16)}),
    "k elsewhere": ("k", {"k": torch.zeros(8, 2, 64, device="meta")}),
    "positions of two axes": ("positions", {"positions": torch.zeros(2, 8, dtype=torch.int32)}),
    "positions of other tokens": ("positions", {"positions": torch.zeros(3, 9, dtype=torch.int32)}),
    "positions int64": ("positions", {"positions": torch.zeros(3, 8, dtype=torch.int64)}),
    "positions elsewhere": ("positions", {"positions": torch.zeros(3, 8, dtype=torch.int32, device="meta")}),
    "norm weight of another head_dim": ("q_norm weight", {"q_norm": (torch.zeros(1, 32), torch.zeros(1, 32))}),
    "norm weight without rows": ("q_norm weight", {"q_norm": (torch.zeros(64), torch.zeros(64))}),
    "norm bias of another shape": ("k_norm bias", {"k_norm": (torch.zeros(2, 64), torch.zeros(1, 64))}),
    "norm of three rows": ("k_norm", {"k_norm": (torch.zeros(3, 64), torch.zeros(3, 64))}),
    "norm of no rows": ("q_norm", {"q_norm": (torch.zeros(0, 64), torch.zeros(0, 64))}),
    "norm of integers": ("q_norm weight", {"q_norm": (torch.zeros(1, 64).int(), torch.zeros(1, 64).int())}),
    "norm elsewhere": ("k_norm bias", {"k_norm": (torch.zeros(1, 64), torch.zeros(1, 64, device="meta"))}),
    "unknown implementation": ("impl='fastest'", {"impl": "fastest"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, change = BAD[case]
    arguments = {
        "q": torch.zeros(8, 4, 64),
        "k": torch.zeros(8, 2, 64),
        "positions": torch.zeros(3, 8, dtype=torch.int32),
    }
    mm_rope(**arguments, impl="reference")
    with pytest.raises(ValueError, match=rf"(^|: ){name} "):
        mm_rope(**(arguments | change))


@pytest.mark.parametrize("options", [{"theta": 0.0}, {"theta": float("nan")}, {"eps": -1e-5}, {"eps": float("nan")}])
def test_theta_and_eps_are_checked(options):
    q, k, positions = torch.zeros(2, 2, 32), torch.zeros(2, 1, 32), torch.zeros(3, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="theta must be > 0 and eps >= 0"):
        mm_rope(q, k, positions, **options)
