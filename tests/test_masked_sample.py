"""masked_sample: the random numbers, the distribution of the draws, and the contracts of the public function.

An implementation that runs CPU tensors joins by being registered in dispatch; Triton has a file of its own.
"""

import math

import pytest
import torch
from eager_draws import channel_draws
from torch.library import opcheck

from lumos_kernels import dispatch, masked_sample
from lumos_kernels.dispatch import Problem
from lumos_kernels.masked_sample.philox import exponentials, gumbels, philox4x32, uniforms
from lumos_kernels.testing import assert_bitwise_equal, assert_close_to_reference, poisoned_allocations

OP = dispatch.ops()["masked_sample"]


def runs(impl, dtype):
    return impl != "triton" and OP.refusal(impl, Problem("cpu", dtype)) is None


IMPLS = [impl for impl in OP.implementations if runs(impl, torch.float32)]
# The fp32 reference is the eager rival of the others: it has none of its own and is tested in fp64.
CASES = [
    (impl, dtype)
    for impl in IMPLS
    for dtype in (torch.bfloat16, torch.float16, torch.float64 if impl == "reference" else torch.float32)
    if runs(impl, dtype)
]
CLASSES = (30, 75)  # of 80 rows of weight


def problem(rows=40, width=24, dtype=torch.float32):
    """hidden of both branches, weight, and a key for each row."""
    hidden = [torch.randn(rows, width).to(dtype) for _ in range(2)]
    return *hidden, torch.randn(80, width).to(dtype), keys(rows)


def keys(rows, seed=7):
    return torch.stack([torch.full((rows,), seed), torch.arange(rows)], -1)


def guided_logits(cond, uncond, weight, guidance, temperature=1.0):
    """SEMANTICS 7, step 1, on the class slice, in the inputs' precision."""
    logits = cond @ weight[slice(*CLASSES)].T
    if guidance not in (None, 1):
        uncond = uncond @ weight[slice(*CLASSES)].T
        logits = uncond + guidance * (logits - uncond)
    return logits / temperature


# The random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with the algorithm (Random123, kat_vectors, philox4x32 10)."""
    words = philox4x32(*(tuple(torch.tensor(word) for word in words) for words in (counter, key)))
    assert " ".join(f"{int(word):08x}" for word in words) == expected


def philox_by_hand(counter, key):
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_columns_and_64_bit_keys_map_to_words_as_documented():
    row_keys = torch.tensor([[0, 0], [2**63 - 1, 5], [3, 2**40 + 9], [-1, -2]])
    columns = 11
    ours = exponentials(row_keys, columns)
    for row, (seed, counter) in enumerate(row_keys.tolist()):
        seed, counter = seed % 2**64, counter % 2**64
        for column in range(columns):
            words = philox_by_hand((column // 4, counter % 2**32, counter >> 32, 0), (seed % 2**32, seed >> 32))
            uniform = torch.tensor(words[column % 4]).float() * 2.0**-32 + 2.0**-33
            assert_bitwise_equal(ours[row, column], -torch.log1p(-uniform))


def test_gumbel_variates_are_rounded_once_wherever_they_stand():
    """fp32 of the variate in double, element by element; fp32 logarithms differ between a vector and its remainder."""
    row_keys, columns = keys(50), 37
    u, ours = uniforms(row_keys, columns), gumbels(row_keys, columns)
    assert ours.dtype == torch.float32
    for expected, actual in zip(u.flatten().tolist(), ours.flatten(), strict=True):
        assert_bitwise_equal(actual, torch.tensor(-math.log(-math.log1p(-expected)), dtype=torch.float32))
    torch.testing.assert_close(ours, -exponentials(row_keys, columns).log())


def test_exponentials_have_the_moments_of_the_exponential_distribution():
    draws = exponentials(keys(500), 401).double()
    assert (draws > 0).all()
    error = 5 / math.sqrt(draws.numel())  # five standard deviations of the mean
    assert abs(draws.mean() - 1) < error
    assert abs(draws.square().mean() - 2) < error * math.sqrt(20)  # the variance of the square is 24 - 4
    rows, columns = draws.mean(1), draws.mean(0)
    assert (rows - 1).abs().max() < 5 / math.sqrt(401)
    assert (columns - 1).abs().max() < 5 / math.sqrt(500)


# The draws


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize(("guidance", "temperature"), [(None, 1.0), (1, 2.0), (3.0, 1.0), (0.0, 1.0), (16.0, 0.5)])
def test_greedy_takes_the_most_probable_class_and_gives_its_probability(impl, dtype, guidance, temperature):
    cond, uncond, weight, _ = problem(dtype=dtype)
    ids, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=guidance, temperature=temperature, greedy=True, impl=impl
    )
    logits = guided_logits(cond.double(), uncond.double(), weight.double(), guidance, temperature)
    top = logits.topk(2)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-3 * logits.abs().amax(1)  # no near tie
    assert int(clear.sum()) > 30
    assert torch.equal(ids[clear], (top.indices[:, 0] + CLASSES[0])[clear])
    assert ids.dtype == torch.int64
    assert_confidence(confidence, ids, cond, uncond, weight, guidance, temperature)


def assert_confidence(confidence, ids, cond, uncond, weight, guidance, temperature):
    """Confidence is the fp32 probability of the chosen class, as close to exact as what eager code makes of it."""
    assert confidence.dtype == torch.float32

    def probability(*operands):
        logits = guided_logits(*operands, guidance, temperature)
        return logits.double().softmax(-1).gather(1, ids[:, None] - CLASSES[0])[:, 0]

    high = probability(cond.double(), uncond.double(), weight.double())
    lows = [probability(*operands) for operands in channel_draws(cond, uncond, weight)]
    assert_close_to_reference(confidence, lows, high, "confidence")


@pytest.mark.parametrize(("impl", "dtype"), CASES)
@pytest.mark.parametrize("guidance", [None, 2.5])
def test_draws_are_gumbel_max_of_the_keys(impl, dtype, guidance):
    """The documented formula: argmax of l + G = l - log E, with the variates of the row's key."""
    cond, uncond, weight, row_keys = problem(dtype=dtype)
    ids, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=guidance, temperature=0.8, row_keys=row_keys, impl=impl
    )
    logits = guided_logits(cond.double(), uncond.double(), weight.double(), guidance, 0.8)
    scores = logits - exponentials(row_keys, CLASSES[1] - CLASSES[0]).double().log()
    top = scores.topk(2)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-3 * logits.abs().amax(1)
    assert int(clear.sum()) > 30
    assert torch.equal(ids[clear], (top.indices[:, 0] + CLASSES[0])[clear])
    assert_confidence(confidence, ids, cond, uncond, weight, guidance, 0.8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("guidance", "temperature"), [(None, 1.0), (None, 0.5), (3.0, 2.0)])
def test_frequencies_are_those_of_the_distribution(impl, guidance, temperature):
    """Chi-square over the classes; its mean is their number less one, its variance twice that."""
    rows, classes = 20000, CLASSES[1] - CLASSES[0]
    cond, uncond = (0.2 * torch.randn(1, 24).expand(rows, 24) for _ in range(2))
    weight = torch.randn(80, 24)
    ids, _ = masked_sample(
        cond,
        uncond,
        weight,
        classes=CLASSES,
        guidance_scale=guidance,
        temperature=temperature,
        row_keys=keys(rows),
        impl=impl,
    )
    p = guided_logits(cond[:1].double(), uncond[:1].double(), weight.double(), guidance, temperature)[0].softmax(-1)
    counts = torch.bincount(ids - CLASSES[0], minlength=classes)
    statistic = float(((counts - rows * p).square() / (rows * p)).sum())
    freedom = classes - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
    assert statistic > freedom - 5 * math.sqrt(2 * freedom)  # too good is wrong too


@pytest.mark.parametrize("impl", IMPLS)
def test_guidance_none_or_one_does_not_read_the_unconditional_branch(impl):
    cond, uncond, weight, row_keys = problem()
    results = [
        masked_sample(cond, other, weight, classes=CLASSES, guidance_scale=guidance, row_keys=row_keys, impl=impl)
        for other, guidance in ((None, None), (None, 1), (torch.full_like(uncond, torch.nan), 1.0))
    ]
    for ids, confidence in results[1:]:
        assert_bitwise_equal(ids, results[0][0])
        assert_bitwise_equal(confidence, results[0][1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_row_depends_on_its_own_key_and_hidden_states_alone(impl, guidance):
    cond, uncond, weight, row_keys = problem(rows=200)
    ids, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=guidance, row_keys=row_keys, impl=impl
    )
    for rows in (torch.randperm(200), torch.arange(0, 200, 3), torch.tensor([150]), torch.tensor([9, 9])):
        some, their_confidence = masked_sample(
            cond[rows],
            uncond[rows],
            weight,
            classes=CLASSES,
            guidance_scale=guidance,
            row_keys=row_keys[rows],
            impl=impl,
        )
        assert torch.equal(some, ids[rows])
        torch.testing.assert_close(their_confidence, confidence[rows])
    changed = [x.clone() for x in (cond, uncond, row_keys)]
    for x in changed:
        x[100:] = 1000
    first = masked_sample(
        changed[0], changed[1], weight, classes=CLASSES, guidance_scale=guidance, row_keys=changed[2], impl=impl
    )
    assert_bitwise_equal(first[0][:100], ids[:100])
    assert_bitwise_equal(first[1][:100], confidence[:100])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("greedy", [False, True])
def test_classes_outside_the_slice_do_not_matter(impl, greedy):
    cond, _, weight, row_keys = problem()
    options = {"row_keys": row_keys, "greedy": greedy, "impl": impl}
    ids, confidence = masked_sample(cond, None, weight, classes=CLASSES, **options)
    weight[: CLASSES[0]] = weight[CLASSES[1] :] = 1e4
    changed, changed_confidence = masked_sample(cond, None, weight, classes=CLASSES, **options)
    assert_bitwise_equal(changed, ids)
    assert_bitwise_equal(changed_confidence, confidence)
    assert ((ids >= CLASSES[0]) & (ids < CLASSES[1])).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_generators_reproduce_and_advance(impl):
    cond, _, weight, _ = problem()

    def draw(generator):
        return masked_sample(cond, None, weight, classes=CLASSES, generator=generator, impl=impl)[0]

    generator = torch.Generator().manual_seed(5)
    first, second = draw(generator), draw(generator)
    assert not torch.equal(first, second)
    generator.manual_seed(5)
    assert torch.equal(draw(generator), first)
    assert not torch.equal(draw(generator.manual_seed(6)), first)

    torch.manual_seed(5)
    state = torch.get_rng_state()
    by_default = draw(None)
    assert torch.equal(by_default, first)
    assert not torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    draw(generator)
    greedy = masked_sample(cond, None, weight, classes=CLASSES, greedy=True, impl=impl)
    assert torch.equal(torch.get_rng_state(), state)  # neither touches the default generator
    assert torch.equal(masked_sample(cond, None, weight, classes=CLASSES, greedy=True, impl=impl)[0], greedy[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_equal_hidden_states_draw_independently(impl):
    cond = torch.zeros(1000, 24)
    ids, confidence = masked_sample(cond, None, torch.randn(80, 24), classes=CLASSES, impl=impl)
    assert len(ids.unique()) == CLASSES[1] - CLASSES[0]
    assert (ids[1:] == ids[:-1]).float().mean() < 0.1
    assert torch.allclose(confidence, torch.tensor(1 / 45))


@pytest.mark.parametrize("impl", IMPLS)
def test_temperature_sharpens_and_flattens(impl):
    cond, _, weight, row_keys = problem()
    greedy = masked_sample(cond, None, weight, classes=CLASSES, greedy=True, impl=impl)[0]
    cold, certain = masked_sample(
        cond, None, weight, classes=CLASSES, guidance_scale=None, temperature=1e-3, row_keys=row_keys, impl=impl
    )
    hot, uncertain = masked_sample(
        cond, None, weight, classes=CLASSES, guidance_scale=None, temperature=1e6, row_keys=row_keys, impl=impl
    )
    assert (cold == greedy).float().mean() > 0.9
    assert certain.mean() > 0.9
    assert torch.allclose(uncertain, torch.tensor(1 / 45), rtol=1e-3)
    assert (hot == greedy).float().mean() < 0.3


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shift", [100.0, -100.0, 3e4])
def test_shifted_logits_change_nothing_but_rounding(impl, shift):
    cond, uncond, weight, row_keys = (x.double() if x.is_floating_point() else x for x in problem())
    if not runs(impl, torch.float64):
        cond, uncond, weight = cond.float(), uncond.float(), weight.float()
    cond[:, -1], uncond[:, -1], weight[:, -1] = 1, 1, 0
    expected = masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
    weight[:, -1] = shift
    ids, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl
    )
    assert (ids == expected[0]).float().mean() > 0.9  # fp32 of logits near 3e4 makes near ties
    assert confidence.isfinite().all()
    assert (confidence - expected[1])[ids == expected[0]].abs().max() < abs(shift) * torch.finfo(weight.dtype).eps * 100


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 129])
def test_numbers_of_rows_around_blocks(impl, rows):
    cond, uncond, weight, row_keys = problem(rows)
    ids, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl
    )
    assert ids.shape == confidence.shape == (rows,)
    assert ((ids >= CLASSES[0]) & (ids < CLASSES[1])).all()
    assert ((confidence > 0) & (confidence <= 1 + 1e-6)).all()
    for row in (0, rows - 1) if rows else ():
        alone = masked_sample(
            cond[row : row + 1],
            uncond[row : row + 1],
            weight,
            classes=CLASSES,
            guidance_scale=3.0,
            row_keys=row_keys[row : row + 1],
            impl=impl,
        )
        assert int(alone[0]) == int(ids[row])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("classes", [(0, 1), (79, 80), (0, 80), (3, 7), (10, 15)])
def test_class_slices_of_any_width(impl, classes):
    cond, _, weight, row_keys = problem()
    ids, confidence = masked_sample(cond, None, weight, classes=classes, row_keys=row_keys, impl=impl)
    assert ((ids >= classes[0]) & (ids < classes[1])).all()
    assert classes[1] - classes[0] > 1 or torch.equal(confidence, torch.ones(40))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_and_inputs_left_alone(impl):
    cond, uncond, weight, row_keys = problem()
    before = [x.clone() for x in (cond, uncond, weight, row_keys)]
    cond.requires_grad_()
    weight.requires_grad_()
    _, confidence = masked_sample(
        cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl
    )
    assert not confidence.requires_grad
    for x, copy in zip((cond, uncond, weight, row_keys), before, strict=True):
        assert_bitwise_equal(x.detach(), copy)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides_and_another_dtype_of_weight(impl):
    cond, uncond, weight, row_keys = problem(dtype=torch.bfloat16)
    expected = masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
    strided = [x.T.contiguous().T for x in (cond, uncond, weight.float(), row_keys)]
    assert not any(x.is_contiguous() for x in strided)
    ours = masked_sample(*strided[:3], classes=CLASSES, guidance_scale=3.0, row_keys=strided[3], impl=impl)
    assert torch.equal(ours[0], expected[0])
    torch.testing.assert_close(ours[1], expected[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_every_output_element_is_written_and_fifty_runs_agree(impl):
    cond, uncond, weight, row_keys = problem()
    expected = masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
    with poisoned_allocations():
        results = [
            masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
            for _ in range(50)
        ]
    for result in results:
        for a, b in zip(result, expected, strict=True):
            assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    cond, uncond, weight, row_keys = problem()
    expected = masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        ours = masked_sample(cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, row_keys=row_keys, impl=impl)
    for a, b in zip(ours, expected, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl):
    cond, uncond, weight, row_keys = problem()
    for other, chosen in ((None, None), (uncond.T.contiguous().T, row_keys)):
        arguments = (cond, other, weight, chosen, 3.0, 0.7, *CLASSES, impl)
        opcheck(torch.ops.lumos_kernels.masked_sample.default, arguments)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", ["row_keys", "greedy", "default generator"])
def test_compiles_whole_and_takes_a_second_length(impl, options):
    def function(cond, uncond, weight, row_keys):
        given = {"row_keys": {"row_keys": row_keys}, "greedy": {"greedy": True}, "default generator": {}}[options]
        return masked_sample(2 * cond, uncond, weight, classes=CLASSES, guidance_scale=3.0, impl=impl, **given)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(rows):
        arguments = problem(rows)
        results = []
        for f in (compiled, function):
            torch.manual_seed(3)
            results.append(f(*arguments))
        for a, b in zip(*results, strict=True):
            assert_bitwise_equal(a, b)

    check(40)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(71)


def good():
    return {
        "hidden_cond": torch.zeros(6, 8),
        "hidden_uncond": torch.zeros(6, 8),
        "weight": torch.zeros(80, 8),
        "classes": CLASSES,
        "guidance_scale": 3.0,
        "row_keys": keys(6),
    }


BAD = {
    "hidden of three dimensions": ("hidden_cond", {"hidden_cond": torch.zeros(1, 6, 8)}),
    "hidden of integers": ("hidden_cond", {"hidden_cond": torch.zeros(6, 8).int()}),
    "other rows without condition": ("hidden_uncond", {"hidden_uncond": torch.zeros(5, 8)}),
    "another dtype without condition": ("hidden_uncond", {"hidden_uncond": torch.zeros(6, 8).half()}),
    "guidance without its branch": ("guidance_scale", {"hidden_uncond": None}),
    "weight of another width": ("weight", {"weight": torch.zeros(80, 9)}),
    "weight of integers": ("weight", {"weight": torch.zeros(80, 8).int()}),
    "weight elsewhere": ("weight", {"weight": torch.zeros(80, 8, device="meta")}),
    "classes beyond weight": ("classes", {"classes": (30, 81)}),
    "no classes": ("classes", {"classes": (40, 40)}),
    "temperature zero": ("temperature", {"temperature": 0.0}),
    "temperature below zero": ("temperature", {"temperature": -1.0}),
    "temperature NaN": ("temperature", {"temperature": math.nan}),
    "keys of other rows": ("row_keys", {"row_keys": keys(5)}),
    "keys without counters": ("row_keys", {"row_keys": torch.zeros(6, 1, dtype=torch.int64)}),
    "keys of int32": ("row_keys", {"row_keys": keys(6).int()}),
    "keys elsewhere": ("row_keys", {"row_keys": keys(6).to("meta")}),
    "unknown implementation": ("impl='fastest'", {"impl": "fastest"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_by_name(case):
    name, change = BAD[case]
    masked_sample(**good(), impl="reference")
    with pytest.raises(ValueError, match=rf"(^|: ){name} "):
        masked_sample(**(good() | change))
