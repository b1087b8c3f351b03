"""masked_sample's Triton kernel against fp64 and the reference's draws, and its random numbers against philox.py.

conftest.py says where they run; a program is a row, so rows are few. What every implementation owes is in
tests/test_masked_sample.py.
"""

from __future__ import annotations

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from eager_draws import channel_draws
from torch import Tensor

from lumos_kernels import masked_sample
from lumos_kernels.masked_sample import philox
from lumos_kernels.masked_sample import triton as kernels
from lumos_kernels.masked_sample.contract import Inputs
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else [pytest.mark.gpu]

FIRST, BEHIND = 5, 3  # rows of weight before and behind the class slice
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEYS = [[0, 0], [2**63 - 1, 5], [3, 2**40 + 9], [-1, -2], [7, 0], [7, 1], [2**32, 1], [1, 2**32]]


@pytest.fixture
def small_blocks(monkeypatch):
    """256 classes at once."""
    monkeypatch.setattr(kernels, "SAMPLE", kernels.RowConfig(block=256, num_warps=1))


@pytest.fixture
def small_chunks(monkeypatch):
    """4 rows of at most 700 classes, 2 rows where there are two branches."""
    monkeypatch.setattr(kernels, "ROW_MULTIPLE", 2)
    monkeypatch.setattr(kernels, "LOGITS_BYTES", 4 * 700 * 4)


def problem(device, classes=700, rows=8, width=24, dtype=torch.float32, scale=2.0) -> tuple[Tensor, ...]:
    """hidden of both branches, weight, and a key for each row."""
    hidden = [torch.randn(rows, width).to(device, dtype) for _ in range(2)]
    weight = torch.randn(FIRST + classes + BEHIND, width) * scale / width**0.5
    keys = torch.tensor((KEYS * (rows // len(KEYS) + 1))[:rows], dtype=torch.int64, device=device).view(rows, 2)
    return *hidden, weight.to(device, dtype), keys


def sample(inputs, impl="triton", greedy=False, guidance=None, temperature=1.0):
    cond, uncond, weight, keys = inputs
    classes, keys = (FIRST, len(weight) - BEHIND), None if greedy else keys
    return masked_sample(
        cond,
        uncond,
        weight,
        classes=classes,
        guidance_scale=guidance,
        temperature=temperature,
        generator=None,
        greedy=greedy,
        row_keys=keys,
        impl=impl,
    )


def exact_logits(inputs, guidance=None, temperature=1.0) -> Tensor:
    cond, uncond, weight, _ = (x.double() for x in inputs)
    logits, uncond = (x @ weight[FIRST:-BEHIND].T for x in (cond, uncond))
    return (logits if guidance is None else uncond + guidance * (logits - uncond)) / temperature


def assert_right(inputs, greedy=False, guidance=None, temperature=1.0, ties=0):
    """The class of the best exact score, unless the two best are near, and its probability."""
    ids, confidence = sample(inputs, "triton", greedy, guidance, temperature)
    assert (ids.dtype, confidence.dtype) == (torch.int64, torch.float32)
    logits = exact_logits(inputs, guidance, temperature)
    scores = logits if greedy else logits + philox.gumbels(inputs[3], logits.shape[1])
    best = scores.topk(min(2, scores.shape[1])).values
    spread = 1e-5 * best.abs().amax(1).clamp_min(1)  # fp32 sums of products, up to 16 times
    near = (best[:, 0] - best[:, -1] <= spread) & (scores.shape[1] > 1)
    assert int(near.sum()) <= ties
    assert torch.equal(ids[~near], scores.argmax(1)[~near] + FIRST)
    chosen = ids[:, None] - FIRST
    high = logits.softmax(-1).gather(1, chosen)[:, 0]
    lows = []
    for cond, uncond, weight in channel_draws(*(x.float() for x in inputs[:3])):
        eager, uncond = (x @ weight[FIRST:-BEHIND].T for x in (cond, uncond))
        eager = (eager if guidance is None else uncond + guidance * (eager - uncond)) / temperature
        lows.append(eager.softmax(-1).gather(1, chosen)[:, 0])
    assert_close_to_reference(confidence, lows, high, "confidence")
    return ids, confidence


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("guidance", "temperature"), [(None, 1.0), (None, 0.5), (3.0, 2.0), (0.0, 1.0), (16.0, 1.0)])
@pytest.mark.parametrize("greedy", [False, True])
def test_takes_the_best_score_and_gives_its_probability(dtype, guidance, temperature, greedy, device):
    assert_right(problem(device, dtype=dtype), greedy, guidance, temperature)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 255, 256, 257, 2048, 4099])
def test_class_slices_of_any_width(classes, device):
    for options in ({}, {"greedy": True, "guidance": 2.0}):
        assert_right(problem(device, classes), **options)


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("rows", [0, 1, 3, 4, 5])
def test_numbers_of_rows_around_chunks(rows, device):
    ids, confidence = assert_right(problem(device, 300, rows), guidance=2.0)
    assert len(ids) == len(confidence) == rows


@pytest.mark.usefixtures("small_blocks")
def test_draws_are_the_references(device):
    """Every one of 64 rows: the two best scores of none of them are near."""
    inputs = problem(device, 40, 64)
    inputs[3][:, 1] += torch.arange(64, device=device)
    assert torch.equal(sample(inputs, guidance=3.0)[0], sample(inputs, "reference", guidance=3.0)[0])


@pytest.mark.usefixtures("small_blocks")
def test_the_first_of_equal_scores_is_taken(device):
    """In the same line of 4, in another line, in another block, in the same line of another block."""
    cond, uncond, weight, keys = problem(device, 700, rows=1, dtype=torch.bfloat16)
    weight[FIRST:-BEHIND] = -cond[0]
    for places in ((2, 3), (3, 9, 10), (255, 256), (1, 257, 513), (100, 600), (699,)):
        top = weight.clone()
        top[FIRST + torch.tensor(places, device=device)] = cond[0]
        assert int(sample((cond, uncond, top, keys), greedy=True)[0]) == FIRST + places[0]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shift", [-100.0, 100.0])
def test_shifted_logits(shift, device):
    cond, uncond, weight, keys = problem(device, 300)
    cond[:, 0], uncond[:, 0], weight[:, 0] = 10.0, 10.0, shift / 10
    assert_right((cond, uncond, weight, keys), guidance=2.0, ties=1)


@pytest.mark.usefixtures("small_blocks", "small_chunks")
def test_a_row_and_the_classes_depend_on_nothing_else(device):
    """Another row, its key and the classes beside the slice change: all other draws keep their bits."""
    inputs = cond, _, weight, keys = problem(device, 300)
    before = sample(inputs, guidance=2.0)
    cond[3], keys[3], weight[:FIRST], weight[-BEHIND:] = 1e4, 77, torch.nan, 1e30
    after = sample(inputs, guidance=2.0)
    others = torch.arange(8, device=device) != 3
    for a, b in zip(before, after, strict=True):
        assert_bitwise_equal(a[others].float(), b[others].float())


def test_guidance_none_or_one_does_not_read_the_unconditional_branch(device):
    cond, uncond, weight, keys = problem(device, 300, rows=2)
    for guidance in (None, 1.0):
        for a, b in zip(
            sample((cond, torch.full_like(uncond, torch.nan), weight, keys), guidance=guidance),
            sample((cond, uncond, weight, keys)),
            strict=True,
        ):
            assert_bitwise_equal(a.float(), b.float())


def test_strides(device):
    cond, uncond, weight, keys = problem(device, 300, rows=4)
    strided = (
        cond.t().contiguous().t(),
        uncond.repeat_interleave(2, dim=0)[::2],
        weight.t().contiguous().t(),
        keys.t().contiguous().t(),
    )
    for greedy in (False, True):
        a, b = (sample(x, greedy=greedy, guidance=2.0) for x in ((cond, uncond, weight, keys), strided))
        assert torch.equal(a[0], b[0])
        torch.testing.assert_close(a[1], b[1], rtol=1e-5, atol=0)  # a matmul of other strides may round otherwise


@pytest.mark.usefixtures("small_blocks", "small_chunks")
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_writes_every_element_and_nothing_around(guidance, device, guarded_allocations):
    cond, uncond, weight, keys = problem(device, 299, rows=6)
    uncond = None if guidance is None else uncond
    with guarded_allocations():
        first = kernels.forward(Inputs(cond, uncond, weight, keys, guidance or 1.0, 1.0))
    second = kernels.forward(Inputs(cond, uncond, weight, keys, guidance or 1.0, 1.0))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_chunks_are_equal_and_bounded():
    assert kernels.chunk_rows(4032, 2 * 64000) == 1024  # 3 of 1,024 rows and one of 960
    assert kernels.chunk_rows(1792, 64000) == 1792
    for rows in (1, 127, 128, 129, 1024, 1025, 1792, 4032):
        size = kernels.chunk_rows(rows, 2 * 64000)
        assert size % 128 == 0
        assert size * 2 * 64000 * 4 <= kernels.LOGITS_BYTES


# The random numbers


@triton.jit
def _gumbel_kernel(words_ptr, out_ptr, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out_ptr + i, kernels._gumbel(tl.load(words_ptr + i).to(tl.uint32)))


def test_gumbel_variates_are_right_to_two_roundings(device):
    """All magnitudes of u and E, the neighbours of u = 1/3, and random words; -inf where u rounds to 1."""
    size = 2**18
    words = torch.cat(
        [
            torch.arange(4096),
            2**32 - 1 - torch.arange(4096),
            *(torch.tensor([(1 << bit) - 1, 1 << bit, (1 << bit) + 1, 3 << bit >> 1]) for bit in range(1, 32)),
            2**32 // 3 + torch.arange(-2048, 2048),
            2**31 + torch.arange(-2048, 2048),
            round(2**32 * (1 - math.exp(-1))) + torch.arange(-2048, 2048),  # E = 1, the logarithm's zero
            torch.randint(2**32, (size,)),
        ]
    )[:size]
    out = torch.empty(size, device=device)
    width = 1024 if device == "cuda" else size
    _gumbel_kernel[(size // width,)](words.to(device), out, width)
    u = words.float() * 2.0**-32 + 2.0**-33
    exact = -torch.log(-torch.log1p(-u.double()))
    infinite = u == 1
    assert infinite.any()
    assert torch.equal(out.cpu()[infinite], exact[infinite].float())
    # Roundings of 1 - u (at most 1.6, for u from 1/3 to 1/2) and of E are absolute errors of g, which is rounded too.
    error = (out.cpu().double() - exact)[~infinite].abs()
    assert (error <= 2.1 * 2**-24 * (1 + exact[~infinite].abs())).all()


@triton.jit
def _block_kernel(keys_ptr, out_ptr, start, LINES: tl.constexpr, VECTOR: tl.constexpr):
    row = tl.program_id(0)
    seed, counter = tl.load(keys_ptr + 2 * row), tl.load(keys_ptr + 2 * row + 1)
    lines = tl.arange(0, LINES)
    g = kernels._gumbels_of_block(seed, counter, start, lines, VECTOR)
    column = lines[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    tl.store(out_ptr + row * LINES * VECTOR + column, g)


def test_words_keys_and_columns_are_those_of_philox(device):
    keys = torch.tensor(KEYS, device=device)
    for start in (0, 8, 4096):
        out = torch.empty(len(KEYS), 64, device=device)
        _block_kernel[(len(KEYS),)](keys, out, start, 16, 4)
        expected = philox.gumbels(keys, start + 64)[:, start:]
        torch.testing.assert_close(out, expected, rtol=2**-22, atol=2**-22)
