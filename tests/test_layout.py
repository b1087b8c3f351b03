"""FrameLayout against the official outputs and against a token-by-token restatement of what the model computes.

The ids are written out here, not imported: the test states the token language of Lumos-1 a second time.
"""

from itertools import chain, pairwise

import pytest
import torch
from golden import TRAINING, load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lumos_kernels import Frame, FrameLayout, RowLimits, Text, dispatch, library
from lumos_kernels.frame_layout import reference
from lumos_kernels.frame_layout.api import frame_layout
from lumos_kernels.frame_layout.contract import Inputs
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.testing import assert_bitwise_equal

START, END, LINE, MASK, NUMBER, CODE = 8197, 8196, 8803, 9003, 8804, 65536
FIELDS = ("cu_seqlens", "positions", "content", "frame_index")
LIMITS = ("kv_start", "kv_end", "q_start", "q_end")

grids = st.tuples(st.sampled_from([4, 8, 12]), st.sampled_from([4, 8]))
segments = st.one_of(st.integers(0, 9), grids)  # a run of text, or a frame of rows x columns
documents = st.lists(segments, max_size=5)


@pytest.fixture(params=dispatch.ops()["frame_layout"].implementations, scope="module", autouse=True)
def implementation(request):
    """Every test of this file reads layouts by each implementation."""
    if request.param == "native" and library.refusal():
        pytest.skip(library.refusal())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUMOS_IMPL", f"frame_layout={request.param}")
        yield request.param


def token_ids(document, mask_rate=0.0):
    """Ids of a document: text of any ids, visual codes, and content replaced by masks at the given rate."""
    ids = []
    for segment in document:
        if isinstance(segment, int):
            ids += torch.randint(1, 8000, (segment,)).tolist()
        else:
            rows, cols = segment
            grid = torch.randint(CODE, CODE + 64000, (rows, cols + 1))
            grid[:, cols] = LINE
            grid[torch.rand(grid.shape) < mask_rate] = MASK
            ids += [START, NUMBER + rows // 4, NUMBER + cols // 4, *grid.flatten().tolist(), END]
    return ids


def restate(document_ids):
    """SEMANTICS 2 and 3 for one well-formed document: (t, h, w, content, frame, kv_end) of each token."""
    tokens, frame, first, i = [], 0, None, 0
    while i < len(document_ids):
        if document_ids[i] != START:
            tokens.append((i, i, i, False, -1, i + 1))
            i += 1
            continue
        rows, cols = (4 * (number - NUMBER) for number in document_ids[i + 1 : i + 3])
        end = i + rows * (cols + 1) + 4
        first = i + 3 if first is None else first
        tokens += [(j, j, j, False, -1, end) for j in range(i, i + 3)]
        for row in range(rows):
            tokens += [(first + 4 * frame, first + 8 * row, first + 8 * c, True, frame, end) for c in range(cols + 1)]
        tokens.append((end - 1, end - 1, end - 1, False, -1, end))
        frame, i = frame + 1, end
    return tokens


def assert_restated(layout, ids_of_documents):
    """The layout equals the restatement of each of its documents."""
    start = 0
    for ids in ids_of_documents:
        span = slice(start, start + len(ids))
        expected = torch.tensor(restate(ids), dtype=torch.int64).reshape(-1, 6).T
        assert torch.equal(layout.positions[:, span].long(), expected[:3])
        assert torch.equal(layout.content[span], expected[3].bool())
        assert torch.equal(layout.frame_index[span].long(), expected[4])
        assert torch.equal(layout.limits.kv_end[span].long(), expected[5] + start)
        assert torch.equal(layout.limits.kv_start[span].long(), torch.full((len(ids),), start))
        start += len(ids)
    assert layout.num_tokens == start


def assert_same_layout(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in LIMITS:
        assert torch.equal(getattr(a.limits, name), getattr(b.limits, name)), name


def pack(ids_of_documents, dtype=torch.int64):
    lengths = torch.tensor([0, *map(len, ids_of_documents)])
    flat = torch.tensor([token for ids in ids_of_documents for token in ids], dtype=dtype)
    return flat, lengths.cumsum(0).to(torch.int32)


def as_segments(document):
    return [Text(segment) if isinstance(segment, int) else Frame(*segment) for segment in document]


VIDEO = [7, (4, 8), (4, 8), (4, 8), 2]
BATCH = [VIDEO, [3, (8, 4), 1], [5], [(4, 4), 4, (12, 8), (4, 4)]]


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("key", ["token_ids", "masked_input_ids"])
def test_layout_is_the_official_one(name, key):
    golden, _ = load(name)
    rows, length = golden[key].shape
    layout = FrameLayout.from_tokens(golden[key].long())
    for axis, letter in enumerate("thw"):
        assert torch.equal(layout.positions[axis].view(rows, length), golden[f"rope.{letter}_pos"])
    assert torch.equal(layout.content.view(rows, length), golden["rope.visual"].bool())
    allowed = torch.block_diag(*golden["attention_allowed"]).bool()
    assert torch.equal(layout.dense_mask(), allowed)


@given(st.lists(documents, min_size=1, max_size=4), st.sampled_from([0.0, 0.7, 1.0]))
@settings(max_examples=60, deadline=None)
def test_layout_restates_the_semantics_token_by_token(batch, mask_rate):
    ids = [token_ids(document, mask_rate) for document in batch]
    packed = FrameLayout.from_tokens(*pack(ids), check=True)
    assert_restated(packed, ids)
    assert_same_layout(packed, FrameLayout.from_segments([as_segments(document) for document in batch]))


def test_padded_rows_are_packed_documents_of_the_row_length():
    ids = [token_ids(document) for document in BATCH]
    length = max(map(len, ids)) + 3
    padded = [row + [0] * (length - len(row)) for row in ids]
    layout = FrameLayout.from_tokens(torch.tensor(padded), check=True)
    assert_restated(layout, padded)
    assert_same_layout(layout, FrameLayout.from_tokens(*pack(padded)))


def test_padding_changes_nothing_before_it_and_is_seen_by_padding_alone():
    ids = token_ids(VIDEO)
    alone = FrameLayout.from_tokens(torch.tensor([ids]))
    padded = FrameLayout.from_tokens(torch.tensor([ids + [0] * 9]))
    real = len(ids)
    assert torch.equal(padded.positions[:, :real], alone.positions)
    mask = padded.dense_mask()
    assert torch.equal(mask[:real, :real], alone.dense_mask())
    assert not mask[:real, real:].any()
    assert torch.equal(mask[real:], torch.ones_like(mask[real:]).tril(real))


def test_dense_mask_is_causal_over_text_and_frames_and_bidirectional_inside_a_frame():
    ids = [token_ids(document) for document in BATCH]
    document, frame = [], []  # of each token; text tokens are frames of one token
    for number, row in enumerate(ids):
        for i, (*_, kv_end) in enumerate(restate(row)):
            document.append(number)
            frame.append(kv_end if kv_end > i + 1 or (frame and frame[-1] == kv_end) else -i - 1)
    document, frame = torch.tensor(document), torch.tensor(frame)
    same_document = document[:, None] == document
    same_frame = same_document & (frame[:, None] == frame)
    index = torch.arange(len(document))
    expected = same_document & ((index <= index[:, None]) | same_frame)
    layout = FrameLayout.from_tokens(*pack(ids))
    assert torch.equal(layout.dense_mask(), expected)
    assert layout.limits.visible_pairs() == int(expected.sum())
    assert torch.equal(layout.limits.dense_mask(5, 11), expected[5:11])


def assert_views_agree(limits):
    """q_start, q_end describe the transpose of the mask that kv_start, kv_end describe."""
    queries = torch.arange(limits.num_queries)
    by_key = (queries >= limits.q_start[:, None]) & (queries < limits.q_end[:, None])
    assert torch.equal(by_key, limits.dense_mask().T)


@given(st.lists(documents, min_size=1, max_size=2))
@settings(max_examples=25, deadline=None)
def test_key_limits_are_the_transposed_mask(batch):
    assert_views_agree(FrameLayout.from_segments([as_segments(document) for document in batch]).limits)


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12), st.integers(12, 20))
@settings(max_examples=60, deadline=None)
def test_key_limits_are_the_transposed_mask_for_any_monotone_limits(pairs, keys):
    """Prefix decoding, sliding windows and rows without keys: whatever is non-decreasing."""
    starts, ends = sorted(min(pair) for pair in pairs), sorted(max(pair) for pair in pairs)
    starts, ends = (torch.tensor(limit, dtype=torch.int64) for limit in (starts, ends))
    assert_views_agree(RowLimits.from_kv(starts, ends, keys, check=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_layout_is_int32_for_both_id_dtypes(dtype):
    ids = [token_ids(document, 0.7) for document in BATCH]
    flat, cu_seqlens = pack(ids, dtype)
    layout = FrameLayout.from_tokens(flat, cu_seqlens.long())
    assert_restated(layout, ids)
    tensors = [layout.cu_seqlens, layout.positions, layout.frame_index, *(getattr(layout.limits, n) for n in LIMITS)]
    assert {tensor.dtype for tensor in tensors} == {torch.int32}
    assert layout.content.dtype == torch.bool


def test_layout_reads_strided_ids():
    ids = torch.tensor([token_ids(VIDEO), token_ids(VIDEO)])
    wide = torch.stack([ids, torch.full_like(ids, START)], dim=-1)[..., 0]
    assert not wide.is_contiguous()
    assert_same_layout(FrameLayout.from_tokens(wide), FrameLayout.from_tokens(ids))


def test_counts_of_tokens_documents_and_frames():
    layout = FrameLayout.from_segments([as_segments(document) for document in BATCH])
    assert layout.num_documents == 4
    assert layout.num_tokens == sum(len(token_ids(document)) for document in BATCH) == int(layout.cu_seqlens[-1])
    assert layout.num_frames == 3
    assert FrameLayout.from_segments([[Text(3)]]).num_frames == 0


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (0, 5), (0, 0)])
def test_no_tokens(shape):
    layout = FrameLayout.from_tokens(torch.zeros(shape, dtype=torch.int64), check=True)
    assert layout.num_tokens == 0
    assert layout.num_frames == 0
    assert layout.cu_seqlens.tolist() == [0] * (shape[0] + 1)
    assert layout.positions.shape == (3, 0)
    assert layout.positions.dtype == layout.frame_index.dtype == torch.int32
    assert layout.dense_mask().shape == (0, 0)


def test_empty_documents_among_others():
    layout = FrameLayout.from_segments([[], [Text(2), Frame(4, 4)], [], [], [Text(1)], [Text(0)]])
    assert_same_layout(layout, FrameLayout.from_segments([[], [Text(2), Frame(4, 4)], [], [], [Text(1)], []]))
    assert layout.num_documents == 6
    assert layout.cu_seqlens.tolist() == [0, 0, 26, 26, 26, 27, 27]
    ids = [[], [5, 5, *frame_skeleton(4, 4).tolist()], [], [], [5], []]
    assert_restated(layout, ids)
    assert FrameLayout.from_segments([[], []]).num_tokens == 0


def test_a_document_without_frames_ignores_the_frames_of_its_neighbours():
    layout = FrameLayout.from_segments([[Frame(4, 4)], [Text(6)], [Text(1), Frame(4, 4)]])
    text = slice(24, 30)
    assert torch.equal(layout.positions[:, text], torch.arange(6, dtype=torch.int32).expand(3, 6))
    assert layout.limits.kv_end[text].tolist() == list(range(25, 31))
    assert not layout.content[text].any()


def test_a_video_of_90119_tokens():
    """The published samples' size: 271 tokens of text and 22 frames of 48 x 84."""
    text, frames, rows, cols = 268, 22, 48, 84
    layout = FrameLayout.from_segments([[Text(text), *[Frame(rows, cols)] * frames, Text(3)]])
    assert layout.num_tokens == 90119
    content = layout.positions[:, layout.content].view(3, frames, rows, cols + 1).long()
    first = text + 3
    assert torch.equal(content[0, :, 5, 7], first + 4 * torch.arange(frames))
    assert torch.equal(content[1, 3, :, 0], first + 8 * torch.arange(rows))
    assert torch.equal(content[2, 21, 47], first + 8 * torch.arange(cols + 1))
    frame_ends = text + 4084 * (1 + torch.arange(frames))
    expected = torch.cat([torch.arange(1, text + 1), frame_ends.repeat_interleave(4084), torch.arange(90117, 90120)])
    assert torch.equal(layout.limits.kv_end.long(), expected)
    assert layout.limits.visible_pairs() == int(expected.sum())


DEFECTS = {
    "header at the end of the document": ([5, START], "must be followed by its rows and columns"),
    "header with one number": ([5, START, NUMBER + 1], "must be followed by its rows and columns"),
    "header without numbers": ([5, START, 70000, 70000], "must be followed by its rows and columns"),
    "number zero": ([5, START, NUMBER, NUMBER + 1, *[MASK] * 20, END], "must be followed by its rows and columns"),
    "number above the range": ([5, START, NUMBER + 1, MASK, *[MASK] * 20, END], "must be followed by its rows"),
    "number below the range": ([5, START, NUMBER - 3, NUMBER + 1, *[MASK] * 20, END], "must be followed by its rows"),
    "no content": ([5, START, NUMBER + 1, NUMBER + 1], "truncated, 4 x 4 needs 24, 3 tokens left"),
    "truncated before the end": ([*frame_skeleton(4, 8)[:-1].tolist()], "truncated, 4 x 8 needs 40, 39 tokens left"),
    "content too short": ([*frame_skeleton(4, 4)[:-2].tolist(), END, 0], "content does not match its size"),
    "content too long": ([*frame_skeleton(4, 4)[:-1].tolist(), 70000, END], "content does not match its size"),
    "new line in the wrong column": ([*frame_skeleton(4, 4).tolist()], "content does not match its size"),
    "a code in place of a new line": ([*frame_skeleton(4, 4).tolist()], "content does not match its size"),
    "a frame start inside the content": ([*frame_skeleton(4, 4).tolist()], "content does not match its size"),
    "a frame end inside the content": ([*frame_skeleton(4, 4).tolist()], "content does not match its size"),
    "an end without a frame": ([5, END, 5], "frame ends"),
    "a second end": ([*frame_skeleton(4, 4).tolist(), END], "frame ends"),
}
DEFECTS["new line in the wrong column"][0][4] = LINE
DEFECTS["a code in place of a new line"][0][7] = 70000
DEFECTS["a frame start inside the content"][0][9] = START
DEFECTS["a frame end inside the content"][0][9] = END


@pytest.mark.parametrize("defect", DEFECTS)
def test_check_names_the_document_and_the_defect(defect):
    ids, message = DEFECTS[defect]
    good = token_ids(VIDEO)
    with pytest.raises(ValueError, match=message) as error:
        FrameLayout.from_tokens(*pack([good, ids, good]), check=True)
    assert "document 1" in str(error.value)


def test_check_names_the_defect_in_a_padded_batch():
    row = [0, 5, START, NUMBER + 1, NUMBER + 1, *[MASK] * 6]
    good = [0] * len(row)
    with pytest.raises(ValueError, match="document 2, frame 0 at token 2: truncated"):
        FrameLayout.from_tokens(torch.tensor([good, good, row]), check=True)


@pytest.mark.parametrize("cu_seqlens", [[0], [0, 5], [0, 3], [1, 4], [-1, 4], [0, 3, 2, 4]])
def test_check_refuses_cu_seqlens_that_do_not_cover_the_tokens(cu_seqlens):
    ids = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 4 tokens"):
        FrameLayout.from_tokens(ids, torch.tensor(cu_seqlens), check=True)


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "name"),
    [
        (torch.zeros(4), torch.tensor([0, 4]), "input_ids"),
        (torch.zeros(1, 4, dtype=torch.bool), None, "input_ids"),
        (torch.zeros(1, 4, dtype=torch.uint8), None, "input_ids"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), None, "input_ids"),
        (torch.tensor(3), None, "input_ids"),
        (torch.zeros(4, dtype=torch.int64), None, "cu_seqlens"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0, 4]), "cu_seqlens"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 4]]), "cu_seqlens"),
        (torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int64), "cu_seqlens"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0.0, 4.0]), "cu_seqlens"),
    ],
)
def test_from_tokens_refuses_by_name(ids, cu_seqlens, name):
    with pytest.raises(ValueError, match=f"^{name}"):
        FrameLayout.from_tokens(ids, cu_seqlens)


@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "options", "message"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0, 4]), {}, r"input_ids must be int32 or int64 \[T\]"),
        (torch.zeros(4), torch.tensor([0, 4]), {}, "input_ids must be int32 or int64"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor(4), {}, "cu_seqlens must be int32 or int64"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 3]), {"check": True}, "cu_seqlens must rise from 0 to"),
        (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]), {"impl": "triton"}, "there are native, reference"),
    ],
)
def test_frame_layout_refuses_by_name(ids, cu_seqlens, options, message):
    with pytest.raises(ValueError, match=message):
        frame_layout(ids, cu_seqlens, **options)


def test_frame_layout_is_what_from_tokens_reads(implementation):
    ids = torch.tensor(token_ids(VIDEO), dtype=torch.int32)
    layout = FrameLayout.from_tokens(ids[None])
    for bounds in (torch.tensor([0, len(ids)]), torch.tensor([0, len(ids)], dtype=torch.int32)):
        read = frame_layout(ids, bounds, check=True, impl=implementation)
        expected = layout.positions, layout.content, layout.frame_index, *vars(layout.limits).values()
        for value, wanted in zip(read, expected, strict=True):
            assert_bitwise_equal(value.int(), wanted.int())


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([], "documents is empty"),
        ([[Text(3)], [Text(-1)]], r"documents\[1\]: Text length must be >= 0, got -1"),
        ([[Text(3)], ["text"]], r"documents\[1\]: segments are Text or Frame, got str"),
        ([[Frame(6, 4)]], "frame rows must be a positive multiple of 4 below 796, got 6"),
        ([[Frame(4, 0)]], "frame cols must be a positive multiple of 4 below 796, got 0"),
        ([[Frame(-4, 4)]], "frame rows must be a positive multiple of 4 below 796, got -4"),
        ([[Frame(4, 796)]], "frame cols must be a positive multiple of 4 below 796, got 796"),
    ],
)
def test_from_segments_refuses_by_name(segments, message):
    with pytest.raises(ValueError, match=message):
        FrameLayout.from_segments(segments)


STRUCTURE = [START, START, END, LINE, MASK, NUMBER, NUMBER + 1, NUMBER + 1, NUMBER + 2, NUMBER + 198, 0, 70000, -1]
headers = st.tuples(st.just(START), st.integers(NUMBER, NUMBER + 2), st.integers(NUMBER, NUMBER + 2)).map(list)
runs = st.tuples(st.sampled_from([0, MASK, END, LINE]), st.integers(1, 20)).map(lambda run: [run[0]] * run[1])
tokens = st.one_of(st.sampled_from(STRUCTURE), st.integers(-(2**31), 2**31 - 1)).map(lambda token: [token])
garbage = st.lists(st.one_of(headers, runs, tokens), max_size=12).map(lambda pieces: [*chain(*pieces)])


@given(garbage, st.lists(st.integers(0, 120), max_size=4), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=200, deadline=None)
def test_garbage_stays_in_bounds_and_monotone(ids, cuts, dtype):
    """Unchecked rows never raise, and no limit that comes of them lets a kernel read outside its document."""
    cu_seqlens = torch.tensor([0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)])
    flat = torch.tensor(ids, dtype=dtype)
    layout = FrameLayout.from_tokens(flat, cu_seqlens)
    index = torch.arange(len(ids))
    document = torch.searchsorted(cu_seqlens[1:], index, right=True)
    limits = layout.limits
    assert torch.equal(limits.kv_start.long(), cu_seqlens[document])
    assert (limits.kv_end > index).all()
    assert (limits.kv_end <= cu_seqlens[document + 1]).all()
    assert (limits.kv_end.diff() >= 0).all()
    assert_views_agree(limits)
    assert torch.equal(layout.frame_index >= 0, layout.content)
    try:
        FrameLayout.from_tokens(flat, cu_seqlens, check=True)
    except ValueError:
        return
    assert_restated(layout, [ids[a:b] for a, b in pairwise(cu_seqlens.tolist())])


@given(garbage, st.lists(st.integers(0, 120), max_size=4), st.sampled_from([torch.int32, torch.int64]))
@settings(max_examples=200, deadline=None)
def test_implementations_agree_on_garbage(implementation, ids, cuts, dtype):
    cu_seqlens = torch.tensor([0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)], dtype=torch.int32)
    ids = torch.tensor(ids, dtype=dtype)
    expected = reference.forward(Inputs(ids, cu_seqlens))
    for value, wanted in zip(torch.ops.lumos_kernels.frame_layout(ids, cu_seqlens, "auto"), expected, strict=True):
        assert value.dtype == wanted.dtype
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_frame_layout_is_a_sound_torch_op(dtype):
    ids = torch.tensor(token_ids(VIDEO), dtype=dtype)
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    for tokens in (ids, ids[:0]):
        arguments = tokens, cu_seqlens * bool(len(tokens)), "auto"
        torch.library.opcheck(torch.ops.lumos_kernels.frame_layout.default, arguments)


def test_from_tokens_needs_no_value_of_a_tensor():
    """Under FakeTensorMode any .item(), .tolist() or data-dependent shape raises: each would be a sync on a GPU."""
    rows = torch.tensor([token_ids(VIDEO), token_ids(VIDEO)])
    mode = FakeTensorMode()
    rows, flat, cu_seqlens = (mode.from_tensor(t) for t in (rows, rows.flatten(), torch.tensor([0, 7, rows.numel()])))
    with mode:
        for layout in (FrameLayout.from_tokens(rows), FrameLayout.from_tokens(flat, cu_seqlens)):
            assert layout.positions.shape == (3, flat.numel())
        with pytest.raises(DataDependentOutputException):
            FrameLayout.from_tokens(rows, check=True)


def test_from_tokens_compiles_whole_and_takes_other_lengths():
    compiled = torch.compile(FrameLayout.from_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    first, second = (torch.tensor([token_ids(document)] * 2) for document in (VIDEO, [9, (8, 8), (8, 8), 1]))
    assert_same_layout(compiled(first), FrameLayout.from_tokens(first))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_layout(compiled(second), FrameLayout.from_tokens(second))


@pytest.mark.parametrize(
    ("kv_start", "kv_end", "message"),
    [
        ([0, 0], [1, 2, 3], "must both be integer"),
        ([[0, 0]], [[1, 2]], "must both be integer"),
        ([-1, 0], [1, 2], "0 <= kv_start <= kv_end <= 4"),
        ([0, 0], [1, 5], "0 <= kv_start <= kv_end <= 4"),
        ([0, 3], [1, 2], "0 <= kv_start <= kv_end <= 4"),
        ([0.0, 0.0], [1.0, 2.0], "integer"),
    ],
)
def test_from_kv_check_refuses(kv_start, kv_end, message):
    with pytest.raises(ValueError, match=message):
        RowLimits.from_kv(torch.tensor(kv_start), torch.tensor(kv_end), 4, check=True)


def test_from_kv_without_queries_or_keys():
    none = torch.empty(0, dtype=torch.int64)
    no_queries = RowLimits.from_kv(none, none, 3, check=True)
    assert (no_queries.num_queries, no_queries.num_keys) == (0, 3)
    assert no_queries.q_start.tolist() == no_queries.q_end.tolist() == [0, 0, 0]
    no_keys = RowLimits.from_kv(torch.zeros(2).int(), torch.zeros(2).int(), 0)
    assert (no_keys.num_queries, no_keys.num_keys) == (2, 0)
    assert no_keys.dense_mask().shape == (2, 0)


def test_to_moves_every_tensor():
    layout = FrameLayout.from_segments([as_segments(VIDEO)])
    moved = layout.to("meta")
    tensors = [*(getattr(moved, name) for name in FIELDS), *(getattr(moved.limits, name) for name in LIMITS)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert_same_layout(layout.to("cpu"), layout)


def test_frame_skeleton_is_the_published_size():
    assert len(frame_skeleton(32, 56)) == Frame(32, 56).length == 1828
    assert len(frame_skeleton(48, 84)) == Frame(48, 84).length == 4084
    lines = [*[MASK] * 4, LINE] * 4
    assert frame_skeleton(4, 4).tolist() == [START, NUMBER + 1, NUMBER + 1, *lines, END]


def test_from_segments_is_on_the_cpu_whatever_the_default_device():
    with torch.device("meta"):
        layout = FrameLayout.from_segments([[Text(3), Frame(4, 4)], []])
    assert layout.positions.device.type == layout.limits.q_end.device.type == "cpu"
