"""lumos/data/packing.py: the order of the documents of a run, and their packing into streams."""

import itertools
import json
import math
import time
import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bench import packing as bench
from lumos.data.packing import Packer, Turns, best_fit, mix, shuffled, uniform

weights = st.lists(st.one_of(st.integers(1, 9), st.floats(0.01, 10.0)), min_size=1, max_size=6)


def packer(sizes=(7, 4), weights=None, seed=0, lengths=range(1, 11), **options) -> Packer:
    """Documents whose lengths are hashes of what they are."""
    lengths = list(lengths)

    def measure(place, source, sample):
        return lengths[mix(source, sample) % len(lengths)]

    return Packer(sizes, weights or [1.0] * len(sizes), seed, measure, **{"budget": 24, "look_ahead": 8} | options)


def draws(streams):
    return [draw for stream in streams for draw in stream.documents]


def take(packed, count):
    return [packed.next() for _ in range(count)]


# Random numbers and orders


def test_mix_is_pinned_spreads_and_tells_its_words_apart():
    # A changed function would continue a run with other data than it began with.
    assert [mix(), mix(0), mix(1, 2)] == [0, 16294208416658607535, 13608149317741381227]
    values = [mix(seed, place) for seed in range(40) for place in range(500)]
    assert len(set(values)) == len(values)
    bits = np.array(values, dtype=np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(values))
    shares = [uniform(3, place) for place in range(20000)]
    assert min(shares) >= 0
    assert max(shares) < 1
    assert np.histogram(shares, 10, (0, 1))[0] == pytest.approx(2000, abs=5 * math.sqrt(2000))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_shuffled_is_a_permutation(size, key):
    assert sorted(shuffled(index, size, key) for index in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_order_of_few_samples_is_as_likely_as_the_others(size):
    count = 60 * math.factorial(size)
    orders = Counter(tuple(shuffled(i, size, mix(9, key)) for i in range(size)) for key in range(count))
    assert len(orders) == math.factorial(size)
    chi2 = sum((n - 60) ** 2 / 60 for n in orders.values())
    freedom = math.factorial(size) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_orders_of_many_samples_are_not_related():
    """First entries spread over the range; neighbours are no neighbours; other keys give other orders."""
    size = 10_000_019
    first = np.array([shuffled(index, size, 1) for index in range(4000)])
    assert np.histogram(first, 8, (0, size))[0] == pytest.approx(500, abs=5 * math.sqrt(500))
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 5 / math.sqrt(4000)
    other = np.array([shuffled(index, size, 2) for index in range(4000)])
    assert abs(np.corrcoef(first, other)[0, 1]) < 5 / math.sqrt(4000)


# Turns


@settings(max_examples=200, deadline=None)
@given(weights)
def test_every_prefix_holds_the_wished_shares_to_less_than_one_document(weights):
    turns = Turns(weights)
    wish = np.array(weights, dtype=np.float64) / math.fsum(weights)
    counts = np.zeros(len(weights), dtype=int)
    for number in range(1, 400):
        source, before = turns.next()
        assert before == counts[source]
        counts[source] += 1
        assert abs(counts - number * wish).max() < 1 + 1e-9


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [-1.0], [math.inf], [math.nan]])
def test_weights_that_are_none_are_named(weights):
    with pytest.raises(ValueError, match="weights"):
        Turns(weights)


# One stream


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 60))
def test_best_fit_is_the_best_of_all_subsets(lengths, budget):
    assume(lengths[0] <= budget)
    chosen = best_fit(lengths, budget)
    assert chosen[0] == 0
    assert chosen == sorted(set(chosen))
    rest = range(1, len(lengths))
    subsets = itertools.chain.from_iterable(itertools.combinations(rest, k) for k in range(len(lengths)))
    sums = [lengths[0] + sum(lengths[i] for i in subset) for subset in subsets]
    assert sum(lengths[i] for i in chosen) == max(total for total in sums if total <= budget)


def test_best_fit_takes_the_oldest_of_equals_and_no_more_than_it_needs():
    assert best_fit([3, 5, 5, 5], 8) == [0, 1]
    assert best_fit([3, 4, 1, 5, 2], 8) == [0, 1, 2]
    assert best_fit([8, 1], 8) == [0]


# Many streams


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=4),
    st.integers(0, 2**64 - 1),
    st.integers(1, 20),
    st.integers(10, 60),
    st.data(),
)
def test_every_document_comes_once_an_epoch_and_no_stream_is_over_budget(sizes, seed, look_ahead, budget, data):
    wished = data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    packed = packer(sizes, wished, seed, look_ahead=look_ahead, budget=budget)
    streams = take(packed, 60)
    assert all(stream.length == sum(d.length for d in stream.documents) <= budget for stream in streams)
    assert all(stream.places == tuple(sorted(stream.places)) for stream in streams)
    everything = sorted(
        [*draws(streams), *(draw for draw, _ in packed._pool)], key=lambda draw: draw.place
    )  # those that wait included
    assert [draw.place for draw in everything] == list(range(len(everything)))
    for source, size in enumerate(sizes):
        samples = [draw.sample for draw in everything if draw.source == source]
        epochs = [samples[i : i + size] for i in range(0, len(samples), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    order = {}
    for seed in (0, 1):
        everything = draws(take(packer((40, 40), seed=seed, budget=0, documents=1), 240))
        for source, epoch in itertools.product(range(2), range(3)):
            order[seed, source, epoch] = tuple(
                [draw.sample for draw in everything if draw.source == source][40 * epoch : 40 * epoch + 40]
            )
    assert len(set(order.values())) == len(order)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 16), st.integers(10, 40))
def test_no_document_waits_for_more_streams_than_documents_wait_before_it(look_ahead, budget):
    """A long document between many short ones is the one that a packer without ages would leave."""
    packed = packer((50,), lengths=[1, 2, 3, budget - 1], look_ahead=look_ahead, budget=budget)
    latest = {}
    for number in range(200):
        waiting = [draw for draw, _ in packed._pool]
        assert len(waiting) <= look_ahead or sum(draw.length for draw in waiting) < 3 * budget
        for before, draw in enumerate(waiting):
            latest.setdefault(draw.place, number + before)
        assert all(latest.get(place, number) >= number for place in packed.next().places)


@pytest.mark.parametrize("budget", [500, 5000])
def test_long_streams_are_filled_however_few_documents_look_ahead(budget):
    packed = packer((50,), look_ahead=1, budget=budget)
    take(packed, 20)
    assert packed.waste == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(0, 2**64 - 1), st.booleans())
def test_a_state_continues_the_streams_wherever_it_is_taken(after, seed, by_budget):
    options = {"budget": 30 if by_budget else 0, "documents": 3, "lengths": range(1, 40), "drop": True}
    packed = packer((9, 5), [2.0, 0.7], seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take(packed, after)
        state = json.loads(json.dumps(packed.state()))
        again = packer((9, 5), [2.0, 0.7], seed, **options)
        again.load(state)
        assert take(again, 25) == take(packed, 25)
        assert again.state() == packed.state()
        assert (again.waste, again.dropped) == (packed.waste, packed.dropped)


def test_a_state_stays_what_it_was():
    packed, again = packer(), packer()
    take(packed, 5)
    state = packed.state()
    before = json.dumps(state)
    again.load(state)
    take(packed, 3), take(again, 4)
    assert json.dumps(state) == before


def test_a_changed_budget_after_a_state_loses_no_document():
    packed = packer((9, 5))
    first = take(packed, 10)
    again = packer((9, 5), budget=17, look_ahead=3)
    again.load(packed.state())
    assert again.waste == packed.waste
    more = take(again, 10)
    assert again.waste == pytest.approx(1 - sum(stream.length for stream in first + more) / (10 * 24 + 10 * 17))
    places = sorted(draw.place for draw in [*draws(first + more), *(draw for draw, _ in again._pool)])
    assert places == list(range(len(places)))


def test_streams_without_a_budget_are_no_part_of_the_waste():
    packed, again = packer(budget=0, documents=3), packer()
    take(packed, 5)
    again.load(packed.state())
    assert again.waste == 0
    filled = sum(stream.length for stream in take(again, 3))
    assert again.waste == pytest.approx(1 - filled / (3 * 24))


def test_waste_is_what_the_streams_leave_free():
    packed = packer((30, 30), budget=25)
    assert packed.waste == 0
    streams = take(packed, 40)
    assert packed.waste == pytest.approx(1 - sum(stream.length for stream in streams) / (40 * 25))
    without = packer(budget=0)
    take(without, 3)
    assert without.waste == 0


def test_packing_fills_streams_to_98_percent_where_documents_are_a_tenth_of_them():
    packed = packer((500, 500), lengths=range(1600, 5300), budget=40000, look_ahead=64)
    take(packed, 200)
    assert packed.waste < 0.001


def test_without_a_budget_a_stream_is_the_next_documents():
    streams = take(packer((7, 4), budget=0, documents=3), 20)
    assert [stream.places for stream in streams] == [(3 * i, 3 * i + 1, 3 * i + 2) for i in range(20)]


def test_documents_longer_than_the_budget_are_named_or_dropped_and_counted():
    with pytest.raises(ValueError, match=r"source 0, sample \d+ has 50 tokens, more than token_budget 24"):
        take(packer((5,), lengths=[50, 2, 3]), 5)
    packed = packer((20,), lengths=[50, 2, 3], drop=True)
    with pytest.warns(UserWarning, match="50 tokens, more than token_budget 24: left out") as warned:
        streams = take(packed, 60)
    everything = [*draws(streams), *(draw for draw, _ in packed._pool)]
    places = max(draw.place for draw in everything) + 1
    assert packed.dropped == [places - len(everything)]
    assert packed.dropped[0] > 60
    assert len(warned) == packed.dropped[0].bit_length()


def test_a_source_in_which_nothing_fits_is_no_endless_search():
    with (
        pytest.raises(ValueError, match="has 10 tokens and, like every other sample of its source"),
        pytest.warns(UserWarning, match="left out"),
    ):
        take(Packer([5, 5], [1, 1], 0, lambda place, source, sample: 9 + source, budget=9, drop=True), 10)


def test_planning_of_ten_million_samples_takes_less_than_a_millisecond_a_document():
    packed = packer((10_000_000, 3_000_000), lengths=range(1600, 30000), budget=100_000, look_ahead=256)
    packed.next()
    begin = time.process_time()
    count = len(draws(take(packed, 40)))
    assert (time.process_time() - begin) / count < 1e-3


# The report


def test_the_report_s_other_packings_are_what_they_are_called():
    lengths = [5, 6, 4, 3, 9, 1]
    assert bench.in_order(iter(lengths), 10) == [1, 2, 1, 2]
    assert bench.first_fit(iter(lengths), 10, 6) == [3, 2, 1]
    assert bench.first_fit(iter(lengths), 10, 2) == [1, 2, 1, 2]
    assert bench.padded_mixed(iter(lengths), 12) == (12 + 8 + 9 + 1, 4)
    assert bench.padded_mixed(iter([4, 4, 4, 2]), 12) == (12 + 2, 2)


def test_the_report_s_documents_lie_in_the_official_buckets():
    sizes = bench.buckets(bench.PATCHES["384p"])
    assert {(21, 12), (16, 16), (32, 8), (12, 21)} <= set(sizes)
    assert (33, 7) not in sizes
    assert bench.grid(16 / 9, bench.PATCHES["256p"]) == (32, 56)
    assert bench.grid(16 / 9, bench.PATCHES["384p"]) == (48, 84)


def test_the_report(capsys):
    bench.main(["--budgets", "60000", "--streams", "40", "--samples", "1000"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 5 * len(bench.MIXES)
    waste = [float(line.split("|")[4]) for line in lines if "best fit" in line]
    assert max(waste[:3]) < 2
