"""RowLimits and document bounds that are out of order or out of range: what is refused, and what the rest means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, dispatch, library
from lumos_kernels.frame_layout import reference
from lumos_kernels.frame_layout.api import frame_layout
from lumos_kernels.frame_layout.contract import Inputs
from lumos_kernels.testing import assert_bitwise_equal

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
IMPLS = [
    impl for impl in dispatch.ops()["frame_layout"].implementations if impl != "native" or library.refusal() is None
]
rows = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12)


def seen(limits: RowLimits) -> Tensor:
    """bool [Tq, Tk] by plain Python: the pairs that see each other."""
    pairs = zip(limits.kv_start.tolist(), limits.kv_end.tolist(), strict=True)
    mask = [[start <= key < end for key in range(limits.num_keys)] for start, end in pairs]
    return torch.tensor(mask, dtype=torch.bool).reshape(limits.num_queries, limits.num_keys)


@given(rows, st.integers(12, 16))
@settings(max_examples=200, deadline=None)
def test_from_kv_takes_rows_in_any_order(pairs, keys):
    """q_start and q_end bound the queries of a key, and are equal where nobody sees it."""
    start, end = (torch.tensor([f(pair) for pair in pairs], dtype=torch.int64) for f in (min, max))
    limits = RowLimits.from_kv(start, end, keys)
    mask = seen(limits)
    assert torch.equal(limits.dense_mask(), mask)
    assert limits.visible_pairs() == int(mask.sum())
    query = torch.arange(limits.num_queries)
    bounded = (query >= limits.q_start[:, None]) & (query < limits.q_end[:, None])
    assert not (mask.T & ~bounded).any()
    watched = mask.any(0)
    assert torch.equal(limits.q_start[~watched], limits.q_end[~watched])
    assert (limits.q_start[watched] < limits.q_end[watched]).all()
    for bound in (limits.q_start, limits.q_end):
        assert bound.dtype == torch.int32
        assert ((bound >= 0) & (bound <= limits.num_queries)).all()


def test_the_bounds_of_shuffled_windows_are_as_tight_as_their_order_allows():
    """Two windows in the wrong order: the keys of the first one are seen by the last queries alone."""
    limits = RowLimits.from_kv(torch.tensor([4, 4, 0]), torch.tensor([8, 8, 3]), 9)
    assert limits.q_start.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 3]
    assert limits.q_end.tolist() == [3, 3, 3, 0, 3, 3, 3, 3, 3]
    sorted_limits = RowLimits.from_kv(torch.tensor([0, 4, 4]), torch.tensor([3, 8, 8]), 9)
    assert sorted_limits.q_start.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 3]
    assert sorted_limits.q_end.tolist() == [1, 1, 1, 1, 3, 3, 3, 3, 3]


BAD = {
    "a key too many": ([0, 0], [4, 5]),
    "far outside": ([0, 0], [4, 10**6]),
    "beyond 32 bits": ([0, 0], [4, 2**32 + 2]),
    "negative": ([-1, 0], [4, 4]),
    "start behind end": ([0, 3], [4, 2]),
    "the largest and smallest int32": ([INT_MIN, INT_MAX], [INT_MAX, INT_MIN]),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("check", [None, True])
def test_from_kv_checks_tensors_on_the_cpu(case, check):
    start, end = map(torch.tensor, BAD[case])
    with pytest.raises(
        ValueError, match=r"0 <= kv_start <= kv_end <= 4, the number of keys; row [01] has kv_start -?\d"
    ):
        RowLimits.from_kv(start, end, 4, check)


@pytest.mark.parametrize("case", BAD)
def test_unchecked_limits_are_clamped(case):
    start, end = map(torch.tensor, BAD[case])
    limits = RowLimits.from_kv(start, end, 4, check=False)
    assert torch.equal(limits.kv_start.long(), start.clamp(0, 4))
    assert torch.equal(limits.kv_end.long(), end.clamp(0, 4))
    assert limits.visible_pairs() == int(seen(limits).sum())
    by_hand = RowLimits(*(x.clamp(INT_MIN, INT_MAX).int() for x in (start, end)), *[torch.zeros(4).int()] * 2)
    assert by_hand.visible_pairs() == int(seen(by_hand).sum())
    assert torch.equal(by_hand.dense_mask(), seen(by_hand))


@pytest.mark.parametrize(
    ("start", "end", "keys", "message"),
    [
        (torch.zeros(2), torch.zeros(2), 4, "kv_start and kv_end must both be integer"),
        (torch.zeros(2).int(), torch.zeros(3).int(), 4, "kv_start and kv_end must both be integer"),
        (torch.zeros(2).int(), torch.zeros(2).int().to("meta"), 4, "kv_end must have the device of kv_start"),
        (
            torch.zeros(2).int(),
            torch.zeros(2).int(),
            -1,
            "num_keys must be 0 .. 2147483647, the number of keys; got -1",
        ),
        (torch.zeros(2).int(), torch.zeros(2).int(), 2**31, "num_keys must be 0 .. 2147483647"),
    ],
)
@pytest.mark.parametrize("check", [None, True, False])
def test_from_kv_refuses_shapes_and_dtypes_by_name(start, end, keys, message, check):
    with pytest.raises(ValueError, match=message):
        RowLimits.from_kv(start, end, keys, check)


def test_from_kv_returns_tensors_of_its_own():
    start, end = torch.zeros(3, dtype=torch.int32), torch.full((3,), 2, dtype=torch.int32)
    limits = RowLimits.from_kv(start, end, 2)
    end.fill_(7)
    assert limits.kv_end.tolist() == [2, 2, 2]


def test_no_value_is_read_where_there_is_none():
    """Under FakeTensorMode and on the meta device a value that the host reads is an error."""
    start, end = torch.tensor([0, 5]), torch.tensor([3, 9])
    meta = RowLimits.from_kv(start.to("meta"), end.to("meta"), 4)
    assert meta.q_start.shape == (4,)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(x) for x in (start, end, torch.zeros(12, dtype=torch.int64), torch.tensor([3, 50, 1]))]
    with mode:
        assert RowLimits.from_kv(*fake[:2], 4).q_end.shape == (4,)
        assert FrameLayout.from_tokens(*fake[2:]).positions.shape == (3, 12)


def test_compiled_whole_they_check_nothing():
    def build(start: Tensor, end: Tensor, ids: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return RowLimits.from_kv(start, end, 4).q_end, FrameLayout.from_tokens(ids, cu_seqlens).limits.kv_end

    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    q_end, kv_end = compiled(
        torch.tensor([0, -7]), torch.tensor([3, 10**6]), torch.zeros(6, dtype=torch.int64), torch.tensor([0, 9, 2])
    )
    assert q_end.tolist() == [2, 2, 2, 2]
    assert kv_end.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("cu_seqlens", [[0, 5], [0, 3], [1, 4], [-1, 4], [0, 3, 2, 4], [0, 10**6], [0], [0, INT_MAX]])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_document_bounds_on_the_cpu_are_checked(cu_seqlens, dtype):
    ids, bounds = torch.zeros(4, dtype=torch.int64), torch.tensor(cu_seqlens, dtype=dtype)
    message = "cu_seqlens must rise from 0 to the 4 tokens of input_ids"
    with pytest.raises(ValueError, match=message):
        FrameLayout.from_tokens(ids, bounds)
    with pytest.raises(ValueError, match=message):
        frame_layout(ids, bounds)


def test_the_default_check_takes_malformed_documents():
    """Such rows have been accepted all along: check=True is what names them."""
    ids = torch.tensor([[5, 8197, 8805, 0, 0, 8197]])
    assert FrameLayout.from_tokens(ids).num_tokens == 6
    assert FrameLayout.from_tokens(ids[0], torch.tensor([0, 6])).num_tokens == 6
    with pytest.raises(ValueError, match="document 0, frame 0 at token 1"):
        FrameLayout.from_tokens(ids, check=True)


def test_document_bounds_of_another_device_are_refused_by_name():
    with pytest.raises(ValueError, match="cu_seqlens must have the device of input_ids"):
        FrameLayout.from_tokens(torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4], device="meta"))


def rising(cu_seqlens: list[int], tokens: int) -> list[int]:
    """What bad document bounds mean, in plain Python."""
    latest, result = 0, []
    for bound in cu_seqlens:
        latest = max(latest, min(bound, tokens))
        result.append(latest)
    return [0, *result[1:-1], tokens]


STREAM = [*[5] * 3, *[8197, 8805, 8805, *[70000] * 20, 8196], *[5] * 4, *[8197, 8805, 8805, *[70000] * 20, 8196], 5]
odd = st.one_of(st.integers(-3, len(STREAM) + 9), st.sampled_from([INT_MIN, INT_MAX, 10**6]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@given(st.lists(odd, min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_bad_document_bounds_mean_the_nearest_good_ones(impl, dtype, cu_seqlens):
    """Every output is written and stays in bounds. The op is called directly, too."""
    ids = torch.tensor(STREAM, dtype=dtype)
    good = reference.forward(Inputs(ids, torch.tensor(rising(cu_seqlens, len(ids)), dtype=torch.int32)))
    bad = torch.tensor(cu_seqlens, dtype=torch.int32)
    for read in (
        torch.ops.lumos_kernels.frame_layout(ids, bad, impl),
        frame_layout(ids, bad.long(), check=False, impl=impl),
    ):
        for value, expected in zip(read, good, strict=True):
            assert_bitwise_equal(value.int(), expected.int())
    index = torch.arange(len(ids))
    assert (good.kv_start <= index).all()
    assert (good.kv_end > index).all()
    assert (good.kv_end <= len(ids)).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_without_a_document_are_refused(impl):
    for bounds in ([0], []):
        with pytest.raises(ValueError, match="cu_seqlens holds no document for 4 tokens"):
            torch.ops.lumos_kernels.frame_layout(torch.zeros(4).long(), torch.tensor(bounds).int(), impl)


def test_a_copy_to_the_cpu_has_arrived(monkeypatch):
    """A copy from a GPU that does not block returns before the values are there, and the host may read garbage."""
    copies = []
    move = Tensor.to

    def recorded(self, device, *args, **kwargs):
        copies.append((str(device), kwargs.get("non_blocking", False)))
        return move(self, device, *args, **kwargs)

    layout = FrameLayout.from_segments([[Text(3), Frame(4, 4)]])
    monkeypatch.setattr(Tensor, "to", recorded)
    layout.to("cpu")
    layout.to(torch.device("cpu"))
    assert len(copies) == 16
    assert not any(non_blocking for _, non_blocking in copies)
    copies.clear()
    layout.to("meta")
    assert copies == [("meta", True)] * 8


@pytest.mark.parametrize("transform", [torch.func.vmap, make_fx])
def test_no_check_inside_transforms_that_hide_the_values(transform):
    """vmap and make_fx refuse to hand out values, so a check by default would refuse the call."""
    start, end = torch.zeros(2, 9, dtype=torch.int32), torch.arange(1, 10, dtype=torch.int32).expand(2, 9)
    cu_seqlens = torch.tensor([[0, 4, 9], [0, 9, 9]])

    def bounds(start, end, cu_seqlens):
        limits = RowLimits.from_kv(start, end, 9)
        read = FrameLayout.from_tokens(torch.zeros(9, dtype=torch.int64), cu_seqlens).limits
        return limits.q_start, limits.q_end, read.kv_start, read.kv_end

    expected = [bounds(*row) for row in zip(start, end, cu_seqlens, strict=True)]
    if transform is make_fx:
        traced = make_fx(bounds)(start[0], end[0], cu_seqlens[0])
        results = [traced(*row) for row in zip(start, end, cu_seqlens, strict=True)]
    else:
        results = list(zip(*torch.func.vmap(bounds)(start, end, cu_seqlens), strict=True))
    for result, wanted in zip(results, expected, strict=True):
        for a, b in zip(result, wanted, strict=True):
            assert_bitwise_equal(a, b)
