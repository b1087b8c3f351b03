"""The calls of other libraries' functions are glued rightly: stand-ins with their signatures, computed by plain torch,
give our results.
"""

import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench import measure, registry, rivals_attention, rivals_loss
from bench.registry import Contestant
from lumos_kernels import Frame, RowLimits


@pytest.fixture
def stand_in(monkeypatch):
    def install(name, **functions):
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            module = ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
        vars(sys.modules[name]).update(functions)

    return install


def cross_entropy(hidden, weight, targets):
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def agrees(op, case, run, prepare=None, slack=1.0):
    bench, case = registry.ops()[op], registry.find(f"{op}/{case}")
    contestants = [c for c in bench.contestants(case, "cpu") if c.name == bench.yardstick]
    rival = Contestant("rival", run, prepare=prepare, slack=slack)
    error, limit = measure.check(bench, case, [*contestants, rival], "cpu")["rival"]
    assert error <= limit


@pytest.mark.parametrize("case", ["tiny-smoke/bf16/forward", "tiny-smoke/bf16/forward+backward"])
def test_liger(stand_in, case):
    def liger(input, weight, target, bias=None, ce_weight=None, ignore_index=-100, accum_dtype=None):
        assert accum_dtype in (None, torch.float32)
        return cross_entropy(input, weight, target)

    stand_in("liger_kernel.transformers.functional", liger_fused_linear_cross_entropy=liger)
    for accumulate in (None, torch.float32):
        agrees("tube_masked_loss", case, rivals_loss.liger(accumulate))


def test_cut_cross_entropy(stand_in):
    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        assert filter_eps is None, "the filter would drop what nearly uniform codes need"
        return cross_entropy(e, c, targets)

    stand_in("cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    agrees("tube_masked_loss", "tiny-smoke/bf16/forward+backward", rivals_loss.cut_cross_entropy)


def test_quack_gets_rows_in_eights(stand_in):
    def chunked(x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True):
        assert len(x) % 8 == 0
        return F.cross_entropy(F.linear(x, weight).float(), target, ignore_index=ignore_index)

    stand_in("quack.linear_cross_entropy", chunked_linear_cross_entropy=chunked)
    case = registry.find("tube_masked_loss/tiny-smoke/bf16/forward+backward")
    assert case.video.targets % 8, "the case must leave a remainder"
    agrees("tube_masked_loss", "tiny-smoke/bf16/forward+backward", rivals_loss.quack)


def flash_attn_func(q, k, v, causal=False):
    """[B, L, H, D]; a causal mask ends at the last key, as flash-attn's does."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1]) if causal else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("version", [2, 4])
def test_flash_attn(stand_in, version):
    from bench.ops import frame_attention

    shapes = []

    def recorded(q, k, v, causal=False):
        shapes.append((q.shape[1], k.shape[1], causal))
        return flash_attn_func(q, k, v, causal)

    if version == 4:  # returns (o, lse)
        stand_in("flash_attn.cute", flash_attn_func=lambda *args, causal: (recorded(*args, causal=causal), None))
    else:
        stand_in("flash_attn", flash_attn_func=recorded)
    run = rivals_attention.flash_per_frame(version)
    agrees("frame_attention", "tiny-smoke/bf16/forward+backward", run, frame_attention._with_calls)
    frame, text = Frame(4, 8).length, 9  # text, two frames, two tokens: a frame is a rectangle without a mask
    ends = text + frame, text + 2 * frame, text + 2 * frame + 2
    assert set(shapes) == {(text, text, True), (frame, ends[0], False), (frame, ends[1], False), (2, ends[2], True)}
    bench = registry.ops()["frame_attention"]
    inputs = bench.build(registry.find("frame_attention/tiny-smoke/bf16/forward"), "cpu", torch.bfloat16)
    [o] = rivals_attention.flash_causal(version)(inputs)
    expected = flash_attn_func(*(inputs.args[name][None] for name in "qkv"), causal=True)[0]
    assert torch.equal(o, expected)


class MaskPlan:
    """The plan that create_mask_plan of nvidia-cudnn-frontend 1.32.0 returns, as far as flex_attn_func checks it."""

    def __init__(self, mask, shapes, dtype, has_backward):
        self.mask, self.shapes, self.dtype, self.has_backward = mask, shapes, dtype, has_backward


def create_mask_plan(
    mask_func,
    q,
    k,
    v,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    pack_gqa=None,
    build_backward=None,
    _fwd_variant=None,
):
    """The signature and the checks of nvidia-cudnn-frontend 1.32.0: [0, F0) and [F1, F2) of each query."""
    assert build_backward is None or type(build_backward) is bool
    assert cu_seqlens_q is None, "fixed lengths are [B, T, H, D]"
    assert all(x.ndim == 4 and x.dtype in (torch.float16, torch.bfloat16) and x.stride(-1) == 1 for x in (q, k, v))
    assert mask_func.dtype == torch.int32
    assert mask_func.is_contiguous()
    hmask, nfunc, total_q = mask_func.shape
    assert hmask in (1, q.shape[2])
    assert nfunc % 2 == 1
    assert total_q == q.shape[0] * q.shape[1]
    ends = torch.cat([torch.zeros_like(mask_func[:, :1]), mask_func], 1)
    assert (ends.diff(dim=1) >= 0).all()
    assert ends.max() <= k.shape[1]
    keys = torch.arange(k.shape[1])
    intervals = zip(ends[0, ::2, :, None], ends[0, 1::2, :, None], strict=True)
    mask = sum((keys >= begin) & (keys < end) for begin, end in intervals).bool()
    return MaskPlan(mask, [x.shape for x in (q, k, v)], q.dtype, bool(build_backward))


def flex_attn_func(
    q, k, v, *, mask_plan, softmax_scale=None, deterministic=False, return_lse=False, return_max_logit=False
):
    """The signature and the checks of nvidia-cudnn-frontend 1.32.0; returns o alone."""
    assert isinstance(mask_plan, MaskPlan)
    assert [x.shape for x in (q, k, v)] == mask_plan.shapes
    assert q.dtype == mask_plan.dtype
    needs_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    assert mask_plan.has_backward or not needs_backward, "MaskPlan was built without backward payloads"
    heads = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask_plan.mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("case", ["tiny-smoke/bf16/forward", "tiny-smoke/bf16/forward+backward"])
def test_cudnn_flex_attention(stand_in, case):
    stand_in("cudnn.flex_attention", create_mask_plan=create_mask_plan, flex_attn_func=flex_attn_func)
    agrees("frame_attention", case, rivals_attention.cudnn_flex, rivals_attention.cudnn_flex_prepare)


@pytest.mark.parametrize(
    ("kv_start", "kv_end", "endpoints"),
    [
        ([0, 0, 0, 0], [1, 4, 4, 4], 1),
        ([0, 0, 2, 2], [2, 2, 4, 4], 3),  # two documents
        ([0, 1, 1, 4], [1, 1, 4, 4], 3),  # queries without keys
    ],
)
def test_row_intervals_are_the_limits(kv_start, kv_end, endpoints):
    limits = RowLimits.from_kv(torch.tensor(kv_start), torch.tensor(kv_end), 4, check=True)
    intervals = rivals_attention.row_intervals(limits)
    assert intervals.shape == (1, endpoints, 4)
    x = torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)
    assert torch.equal(create_mask_plan(intervals, x, x, x).mask, limits.dense_mask())


@pytest.mark.parametrize(
    ("installed", "capability", "reason"),
    [
        ({"nvidia-cudnn-frontend": "1.32.1", "nvidia-cutlass-dsl": "4.8.1"}, (9, 0), None),
        ({"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "5.0.0"}, (10, 3), None),
        ({"nvidia-cudnn-frontend": "1.33.0", "nvidia-cutlass-dsl": "4.8.1"}, (9, 0), "nvidia-cudnn-frontend is 1.33"),
        ({"nvidia-cutlass-dsl": "4.8.1"}, (9, 0), "nvidia-cudnn-frontend is not installed"),
        ({"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "4.7.2"}, (9, 0), "nvidia-cutlass-dsl is 4.7"),
        ({"nvidia-cudnn-frontend": "1.32.0"}, (9, 0), "nvidia-cutlass-dsl is not installed"),
        ({"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "4.8.1"}, (8, 0), "the GPU is SM80"),
        ({"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "4.8.1"}, (12, 0), "the GPU is SM120"),
        ({"nvidia-cudnn-frontend": "1.32.0", "nvidia-cutlass-dsl": "4.8.1"}, None, "there is no GPU"),
    ],
)
def test_cudnn_flex_attention_is_refused_with_the_reason(monkeypatch, stand_in, installed, capability, reason):
    def version(package):
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    bench = registry.ops()["frame_attention"]
    case = registry.find("frame_attention/tiny-smoke/bf16/forward")
    assert "not installed: cudnn" in bench.missing(case, "cuda")["cudnn.flex_attention"]
    monkeypatch.setattr(registry, "installed", lambda module: True)
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = bench.missing(case, "cuda").get("cudnn.flex_attention")
    assert found is None if reason is None else found.startswith(reason), found


def test_what_compiles_at_its_first_call_is_marked():
    attention = {"flex_attention", "flex_attention FLASH", "cudnn.flex_attention"}
    attention |= {"flash-attn-4 per frame", "flash-attn-4 causal"}
    loss = {"Liger", "Liger, fp32 sums", "CCE exact", "QuACK", "torch.compile, all logits"}
    marked = {"frame_attention": attention, "tube_masked_loss": loss, "mm_rope": {"Liger chain", "torch.compile"}}
    for name, bench in registry.ops().items():
        assert {rival.name for rival in bench.rivals if rival.jit} == marked.get(name, set())


def test_flex_attention_with_its_block_mask():
    prepare = rivals_attention.flex_prepare(compiled=False)
    agrees("frame_attention", "tiny-smoke/fp32/forward", rivals_attention.flex, prepare)


def test_liger_chain(stand_in):
    from bench import rivals_rope
    from bench.ops import mm_rope

    def mrope(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
        """[1, H, T, D] and tables [3, 1, T, D], of which each section of the half reads its own."""
        half = q.shape[-1] // 2
        assert sum(mrope_section) == half
        which = torch.repeat_interleave(torch.arange(3), torch.tensor(mrope_section)).repeat(2)
        c, s = (t[which, 0, :, torch.arange(2 * half)].T for t in (cos, sin))
        return tuple(mm_rope.official_rotate(x, c, s) for x in (q, k))

    def layer_norm(x, weight, bias, eps):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    stand_in("liger_kernel.transformers.functional", liger_layer_norm=layer_norm, liger_qwen2vl_mrope=mrope)
    prepare = rivals_rope.liger_prepare(mm_rope._tables)
    bench = registry.ops()["mm_rope"]
    slack = next(c.slack for c in bench.rivals if c.run is rivals_rope.liger)  # torch sums the norms' gradients in bf16
    agrees("mm_rope", "tiny-smoke/bf16/forward+backward", rivals_rope.liger, prepare, slack)
    inputs = bench.build(registry.find("mm_rope/tiny-smoke/bf16/forward+backward"), "cpu", torch.bfloat16)
    for own, shared in zip(prepare(inputs).upstream, inputs.upstream, strict=True):
        assert own.data_ptr() != shared.data_ptr(), "Liger's backward overwrites its gradient"


def test_compiled_eager_code_gets_the_contract(monkeypatch):
    """The contestant runs on GPUs alone; here the compiler is left out."""
    from bench import rivals_rope

    rivals_rope._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    bench = registry.ops()["mm_rope"]
    [contestant] = [rival for rival in bench.rivals if rival.name == "torch.compile"]
    agrees("mm_rope", "tiny-smoke/fp32/forward+backward", contestant.run, slack=contestant.slack)
    rivals_rope._compiled.cache_clear()


def test_a_library_that_is_not_installed_is_a_missing_row():
    absent = Contestant("absent", lambda inputs: (), requires=("no_such_library", "no.such.module", "torch"))
    assert absent.missing() == "not installed: no_such_library, no.such.module"
    assert Contestant("there", lambda inputs: (), requires=("torch.nn",)).missing() is None


def test_a_contestant_that_raises_is_a_failed_row_where_that_is_tolerated():
    def broken(inputs):
        raise TypeError("unexpected keyword argument 'x'")

    case = registry.find("mm_rope/tiny-smoke/fp32/forward")
    contestants = [*registry.ops()["mm_rope"].contestants(case, "cpu"), Contestant("broken", broken)]
    heard = []
    rows = measure.measure_case(case, "cpu", 0.0, 1, False, contestants, tolerant=True, announce=heard.append)
    by_name = {row.contestant: row for row in rows}
    assert (by_name["broken"].status, by_name["broken"].median_s) == ("failed", None)
    assert "unexpected keyword argument" in by_name["broken"].reason
    assert all(row.status == "ok" and row.median_s > 0 for name, row in by_name.items() if name != "broken")
    assert {"eager", "broken", "timing"} <= set(heard)
    with pytest.raises(TypeError):
        measure.measure_case(case, "cpu", 0.0, 1, False, contestants)


def test_a_contestant_that_fails_while_it_is_timed_leaves_the_others_their_figures():
    calls = []

    def tires(inputs):
        calls.append(1)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return registry.ops()["mm_rope"].reference(inputs)

    case = registry.find("mm_rope/tiny-smoke/fp32/forward")
    contestants = [*registry.ops()["mm_rope"].contestants(case, "cpu"), Contestant("tires", tires)]
    rows = measure.measure_case(case, "cpu", 0.0, 1, False, contestants, tolerant=True)
    by_name = {row.contestant: row for row in rows}
    assert by_name["tires"].status == "failed"
    assert by_name["tires"].reason == "OutOfMemoryError: CUDA out of memory"
    assert all(row.status == "ok" and row.median_s > 0 for name, row in by_name.items() if name != "tires")


def test_slack_widens_the_limit_of_one_contestant_alone():
    def shifted(inputs):
        q, k = registry.ops()["mm_rope"].reference(inputs)
        return q * (1 + 1e-6), k

    case = registry.find("mm_rope/tiny-smoke/fp32/forward")
    able = registry.ops()["mm_rope"].contestants(case, "cpu")
    rivals = [Contestant("strict", shifted), Contestant("slack", shifted, slack=8.0)]
    rows = measure.measure_case(case, "cpu", 0.0, 1, False, [*able, *rivals])
    assert {row.contestant: row.status for row in rows if row.contestant in ("strict", "slack")} == {
        "strict": "wrong",
        "slack": "ok",
    }
