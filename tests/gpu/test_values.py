"""Values and structure at real sizes: against fp64, and by changing only what must not matter."""

from dataclasses import replace

import pytest
import torch
from gpu_examples import dense_sdpa, example, sizes
from gpu_settings import device

from bench.gpu.fused import attention_fused
from lumos_kernels import frame_attention
from lumos_kernels.masked_sample.philox import exponentials
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, eager_loss

SIZES = sizes(device())
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
LARGE = 300.0  # finite in every dtype, and no rounding could hide it


def compare(names, actual, low, high):
    assert len(names) == len(actual) == len(low) == len(high)
    for name, ours, eager, exact in zip(names, actual, low, high, strict=True):
        assert_close_to_reference(ours, eager.to(ours.dtype), exact, name)


@pytest.mark.ops("mm_rope")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_size
def test_rope_is_as_close_to_fp64_as_eager_code(op, impl, size, dtype, device):
    one = example(op, size, device, dtype)
    names = ("q", "k", "dq", "dk", "dq_weight", "dq_bias", "dk_weight", "dk_bias")
    compare(
        names,
        one.with_gradients(impl),
        one.with_gradients("reference"),
        one.to(torch.float64).with_gradients("reference"),
    )


def _heads(one, kv_heads):
    """The same attention of some kv heads and the query heads that read them."""
    group = one.args["q"].shape[1] // one.args["k"].shape[1]
    queries = [head * group + member for head in kv_heads for member in range(group)]
    parts = {name: one.args[name][:, queries if name == "q" else kv_heads] for name in ("q", "k", "v")}
    return queries, one.replace(**parts, upstream=[g[:, queries] for g in one.upstream])


@pytest.mark.ops("frame_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_size
def test_attention_is_as_close_to_fp64_as_sdpa(op, impl, size, dtype, device):
    """All heads are computed; the first and the last kv head with their query heads are compared."""
    one = example(op, size, device, dtype)
    o, lse, dq, dk, dv = one.with_gradients(impl)
    kv_heads = [0, size.kv_heads - 1]
    queries, part = _heads(one, kv_heads)
    ours = o[:, queries], lse[queries], dq[:, queries], dk[:, kv_heads], dv[:, kv_heads]

    leaves = [part.args[name].clone().requires_grad_() for name in ("q", "k", "v")]
    sdpa = dense_sdpa(*leaves, part.args["limits"])
    low = [sdpa.detach(), part.call("reference")[1], *torch.autograd.grad(sdpa, leaves, part.upstream)]
    compare(("o", "lse", "dq", "dk", "dv"), ours, low, part.to(torch.float64).with_gradients("reference"))


@pytest.mark.ops("frame_attention")
@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: size.name)
def test_the_fused_backward_is_as_close_to_fp64_as_sdpa(op, impl, size, device):
    """The fused backward by its name, and deterministic=False, which takes it where the tuned table says so. Both may
    sum in any order; their forward stays bitwise that of the deterministic one.
    """
    one = example(op, size, device)
    kv_heads = [0, size.kv_heads - 1]
    queries, part = _heads(one, kv_heads)
    leaves = [part.args[name].clone().requires_grad_() for name in ("q", "k", "v")]
    low = torch.autograd.grad(dense_sdpa(*leaves, part.args["limits"]), leaves, part.upstream)
    exact = part.to(torch.float64).with_gradients("reference")[2:]
    forward = one.call(impl)
    for call in (attention_fused, None):
        chosen = one if call is None else replace(one, call_op=call)
        o, lse, dq, dk, dv = chosen.with_gradients(impl, **({} if call else {"deterministic": False}))
        assert_bitwise_equal(o, forward[0], "o")
        assert_bitwise_equal(lse, forward[1], "lse")
        compare(("dq", "dk", "dv"), (dq[:, queries], dk[:, kv_heads], dv[:, kv_heads]), low, exact)


@pytest.mark.ops("frame_attention")
def test_gradient_of_lse(op, impl, device):
    one = example(op, SIZES[0], device)
    _, one = _heads(one, [0])
    upstream = (one.upstream[0], torch.randn(one.call("reference")[1].shape, device=device))
    one = one.replace(upstream=upstream)
    compare(
        ("o", "lse", "dq", "dk", "dv"),
        one.with_gradients(impl),
        one.with_gradients("reference"),
        one.to(torch.float64).with_gradients("reference"),
    )


@pytest.mark.ops("tube_masked_loss")
@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: size.name)
def test_loss_is_as_close_to_fp64_as_the_official_way(op, impl, size, device):
    one = example(op, size, device)
    args = {**one.args, "rows": one.args["rows"][:2048]}
    keep = torch.zeros_like(args["labels"], dtype=torch.bool).index_fill_(0, args["rows"].long(), True)
    args["labels"] = torch.where(keep, args["labels"], -100)
    one = one.replace(**args)
    leaves = [one.args[name].clone().requires_grad_() for name in one.leaves]
    low = torch.autograd.grad(eager_loss(*leaves, one.args["labels"], one.args["classes"]), leaves, one.upstream)
    ours, exact = one.with_gradients(impl), one.to(torch.float64).with_gradients("reference")
    compare(("dhidden", "dweight"), ours[4:], low, exact[4:])
    compare(("nll", "lse"), ours[1:3], _eager_rows(one)[1:3], exact[1:3])
    # One number says little of an error: the mean is compared with its own rows.
    mean = float(ours[1].double().sum()) / len(one.args["rows"])
    assert abs(float(ours[0]) - mean) <= 1e-6 * mean
    # A row whose two best logits are a rounding apart may go either way; no more than a few of 2,048 do.
    assert int((ours[3] != exact[3]).sum()) <= 2


def _eager_rows(one, z_loss_weight=0.0):
    """Row losses, nll and lse [T] from logits rounded to the dtype of hidden, as a model's lm_head gives them."""
    first, last = one.args["classes"]
    rows = one.args["rows"].long()
    logits = torch.nn.functional.linear(one.args["hidden"][rows], one.args["weight"][first:last]).float()
    lse = logits.logsumexp(1)
    nll = lse - logits.gather(1, one.args["labels"][rows, None] - first)[:, 0]
    spread = nll.new_zeros(len(one.args["labels"]))
    return [spread.index_put((rows,), x) for x in (nll + z_loss_weight * lse.square(), nll, lse)]


@pytest.mark.ops("tube_masked_loss")
def test_row_losses_and_z_loss(op, impl, device):
    one = example(op, SIZES[0], device)
    rows = one.args["labels"].shape[0]
    one = one.replace(reduction="none", z_loss_weight=1e-3, upstream=[torch.randn(rows, device=device)])
    names = ("loss", "nll", "lse", "dhidden", "dweight")
    leaves = [one.args[name].clone().requires_grad_() for name in one.leaves]
    low = _eager_rows(one.replace(**dict(zip(one.leaves, leaves, strict=True))), z_loss_weight=1e-3)
    low = [*(x.detach() for x in low), *torch.autograd.grad(low[0], leaves, one.upstream)]
    ours, high = one.with_gradients(impl), one.to(torch.float64).with_gradients("reference")
    compare(names, *([r[0], r[1], r[2], r[4], r[5]] for r in (ours,)), low, [*high[:3], *high[4:]])


def _scores(one):
    """fp64 or fp32 logits [N, K] and what Gumbel-max compares."""
    first, last = one.args["classes"]
    weight = one.args["weight"][first:last]
    cond, uncond = one.args["hidden_cond"] @ weight.T, one.args["hidden_uncond"] @ weight.T
    logits = (uncond + one.args["guidance_scale"] * (cond - uncond)) / one.args["temperature"]
    return logits, logits - exponentials(one.args["row_keys"], last - first).log()


@pytest.mark.ops("masked_sample")
@pytest.mark.parametrize("size", SIZES[:2], ids=lambda size: size.name)
def test_draws_are_the_keys_and_confidence_their_probability(op, impl, size, device):
    one = example(op, size, device)
    rows = min(256, len(one.args["row_keys"]))
    one = one.replace(**{name: one.args[name][:rows] for name in ("hidden_cond", "hidden_uncond", "row_keys")})
    ids, confidence = one.call(impl)
    logits, scores = _scores(one.to(torch.float64))
    rounding = 2 * float((_scores(one.to(torch.float32))[1] - scores).abs().max())
    drawn = (ids - one.args["classes"][0])[:, None]
    short = scores.max(1).values - scores.gather(1, drawn)[:, 0]
    assert float(short.max()) <= 2 * rounding, "a draw that no rounding explains"
    probability = logits.log_softmax(1).gather(1, drawn)[:, 0]
    assert float((confidence.double().log() - probability).abs().max()) <= 2 * rounding + 1e-6
    greedy, _ = one.call(impl, greedy=True)
    short = logits.max(1).values - logits.gather(1, (greedy - one.args["classes"][0])[:, None])[:, 0]
    assert float(short.max()) <= 2 * rounding


# Structure


@pytest.mark.ops("mm_rope")
@every_size
def test_a_token_is_rotated_by_itself_alone(op, impl, size, device):
    one = example(op, size, device)
    tokens = one.args["q"].shape[0]
    changed = slice(tokens // 3, tokens // 2)
    other = one.replace(q=_filled(one.args["q"], changed), k=_filled(one.args["k"], changed))
    for name, before, after in zip(
        ["q", "k", "dq", "dk"], one.with_gradients(impl), other.with_gradients(impl), strict=False
    ):
        for part in (slice(0, changed.start), slice(changed.stop, tokens)):
            assert_bitwise_equal(after[part], before[part], name)


def _filled(x, rows):
    """x with some rows replaced by large values of changing sign."""
    x = x.clone()
    x[rows] = LARGE * torch.randn_like(x[rows]).sign()
    return x


@pytest.mark.ops("frame_attention")
@pytest.mark.parametrize("frame", [1, 2])
@every_size
def test_later_frames_and_other_documents_do_not_matter(op, impl, size, frame, device):
    """Everything from frame `frame` of the first document on is changed, and the gradient enters before it."""
    one = example(op, size, device)
    text, *frames = (segment.length for segment in size.documents[0])
    cut = text + sum(frames[:frame])
    first_document = text + sum(frames)
    before, after = slice(0, cut), slice(cut, None)
    upstream = one.upstream[0].clone()
    upstream[after] = 0
    one = one.replace(upstream=[upstream])
    plain = one.with_gradients(impl)
    later = {name: _filled(one.args[name], after) for name in ("q", "k", "v")}
    changed = one.replace(**later).with_gradients(impl)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), plain, changed, strict=True):
        rows = (slice(None), before) if name == "lse" else before
        assert_bitwise_equal(y[rows], x[rows], name)
        assert bool(x[rows].any())
        if name.startswith("d"):
            assert not x[after].any(), f"{name}: a gradient reached what those rows may not see"
            assert not y[after].any(), f"{name}: a gradient reached what those rows may not see"

    # The second document does not see the first.
    own = slice(first_document, None)
    earlier = {name: _filled(one.args[name], slice(0, first_document)) for name in ("q", "k", "v")}
    x, y = one.call(impl), one.replace(**earlier).call(impl)
    assert_bitwise_equal(y[0][own], x[0][own], "o")
    assert_bitwise_equal(y[1][:, own], x[1][:, own], "lse")


@pytest.mark.ops("tube_masked_loss")
@pytest.mark.parametrize("size", SIZES[::2], ids=lambda size: size.name)
def test_ignored_rows_and_other_classes_do_not_matter(op, impl, size, device):
    one = example(op, size, device)
    first, last = one.args["classes"]
    ignored = one.args["labels"] == -100
    other = one.replace(
        hidden=_filled(one.args["hidden"], ignored), weight=_filled(one.args["weight"], slice(0, first))
    )
    plain, changed = one.with_gradients(impl), other.with_gradients(impl)
    for name, x, y in zip(("loss", "nll", "lse", "correct", "dhidden"), plain, changed, strict=False):
        assert_bitwise_equal(y, x, name)
    for _, _, _, _, dhidden, dweight in (plain, changed):
        assert not dhidden[ignored].any()
        assert not dweight[:first].any()
        assert not dweight[last:].any()
    assert_bitwise_equal(changed[5], plain[5], "dweight")


@pytest.mark.ops("masked_sample")
@every_size
def test_a_row_is_drawn_by_itself_alone(op, impl, size, device):
    one = example(op, size, device)
    rows = one.args["row_keys"].shape[0]
    changed = slice(rows // 3, rows // 2)
    first, _ = one.args["classes"]
    other = one.replace(
        hidden_cond=_filled(one.args["hidden_cond"], changed),
        hidden_uncond=_filled(one.args["hidden_uncond"], changed),
        weight=_filled(one.args["weight"], slice(0, first)),
    )
    for name, x, y in zip(("ids", "confidence"), one.call(impl), other.call(impl), strict=True):
        for part in (slice(0, changed.start), slice(changed.stop, rows)):
            assert_bitwise_equal(y[part], x[part], name)


@pytest.mark.ops("frame_attention")
def test_rows_without_keys_give_zero(op, impl, device):
    from lumos_kernels import RowLimits

    one = example(op, SIZES[0], device)
    limits = one.args["limits"]
    empty = torch.zeros(limits.num_queries, dtype=torch.bool, device=device)
    empty[: limits.num_queries // 5] = True  # the rows at the start: limits must not fall
    kv_end = torch.where(empty, 0, limits.kv_end)
    one = one.replace(limits=RowLimits.from_kv(limits.kv_start, kv_end, limits.num_keys))
    o, lse, dq, *_ = one.with_gradients(impl)
    assert not o[empty].any()
    assert not dq[empty].any()
    assert bool((lse[:, empty] == -torch.inf).all())
    assert bool(lse[:, ~empty].isfinite().all())
    assert all(bool(x.isfinite().all()) for x in one.with_gradients(impl)[2:])
    q, k, v = (one.args[name] for name in ("q", "k", "v"))
    assert not frame_attention(q, k, v, one.args["limits"], impl=impl)[empty].any()
