"""The order in which a run sees its documents, and their packing into streams of a token budget.

Index work only: nothing here reads a token. Place p = 0, 1, 2, ... counts the documents of a run over all sources and
processes. Which sample of which source lies at a place is a function of the run's seed, the sources' sizes and weights
and the place alone, so every process plans the same streams and another number of processes sees the same data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

_WORD = (1 << 64) - 1


def mix(*words: int) -> int:
    """64 random bits, a function of integers >= 0: each joins through SplitMix64's finalizer (Steele et al. 2014)."""
    state = 0
    for word in words:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state


def uniform(*words: int) -> float:
    """mix as a number in [0, 1)."""
    return (mix(*words) >> 11) * 2.0**-53


def shuffled(index: int, size: int, key: int) -> int:
    """Entry `index` of the random permutation of range(size) that belongs to a key of 64 bits.

    In constant time and memory: a Feistel network permutes the numbers of as many bits as size needs, and what falls
    outside the range goes through it again (cycle walking; fewer than 4 passes on average).
    """
    bits = max((size - 1).bit_length(), 2)
    low = bits // 2
    low_bits, high_bits = (1 << low) - 1, (1 << bits - low) - 1
    rounds = 8 if bits > 8 else 32  # halves of a few bits mix slowly: 16 rounds still prefer some orders of 6
    while True:
        left, right = index >> low, index & low_bits
        for number in range(0, rounds, 2):
            left ^= mix(key ^ number << 32 ^ right) & high_bits
            right ^= mix(key ^ number + 1 << 32 ^ left) & low_bits
        index = left << low | right
        if index < size:
            return index


class Turns:
    """Whose turn it is: sources take turns by weight so evenly that after any number n of turns each has had
    less than one turn more or less than its share n * weight / sum(weights).

    Document j of a source with share s may come from turn floor(j / s) on and must have come by turn ceil((j + 1) / s);
    of those that may, the one that must come first has the turn. On one server this earliest-deadline-first rule meets
    every deadline (Baruah et al. 1996, proportionate progress). Exact in integers.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not 0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights must be one number > 0 for each source, got {list(weights)}")
        exact = [Fraction(weight) for weight in weights]
        denominator = math.lcm(*(weight.denominator for weight in exact))
        self._parts = [int(weight * denominator) for weight in exact]
        self._total = sum(self._parts)
        self.counts = [0] * len(weights)

    def next(self) -> tuple[int, int]:
        """(source, how many turns it had before)."""
        now, total = sum(self.counts), self._total
        allowed = [s for s, part in enumerate(self._parts) if self.counts[s] * total // part <= now]
        source = min(allowed, key=lambda s: -(-(self.counts[s] + 1) * total // self._parts[s]))
        self.counts[source] += 1
        return source, self.counts[source] - 1


@dataclass(frozen=True)
class Draw:
    """The document at a place: sample `sample` of source `source`; length: its tokens as it will be trained on."""

    place: int
    source: int
    sample: int
    length: int


@dataclass(frozen=True)
class Bin:
    """Documents that share a stream, in order of their places, and the sum of their lengths."""

    documents: tuple[Draw, ...]
    length: int

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(draw.place for draw in self.documents)


def best_fit(lengths: Sequence[int], budget: int) -> list[int]:
    """Ascending indices of the lengths, the first among them, whose sum comes closest to the budget from below.

    Exact: all sums that subsets reach are the bits of one integer. Lengths join in order, and no more of them than
    are needed to meet the budget exactly; of equal sums the one without later lengths is taken. Every length is at
    least 1, the first at most the budget.
    """
    below = (2 << budget) - 1
    reached = [1 << lengths[0]]
    for length in lengths[1:]:
        if reached[-1].bit_length() > budget:
            break
        reached.append(reached[-1] | reached[-1] << length & below)
    total = reached[-1].bit_length() - 1
    chosen = []
    for index in range(len(reached) - 1, 0, -1):
        if not reached[index - 1] >> total & 1:
            chosen.append(index)
            total -= lengths[index]
    return [0, *reversed(chosen)]


class Packer:
    """An endless sequence of streams of whole documents.

    sizes, weights: samples and share of the documents, one a source. Every epoch of a source visits each of its
        samples once, in an order of its own.
    seed: of the orders. measure(place, source, sample): tokens of the document at a place.
    budget: tokens that a stream may hold. It is filled by best_fit from the next `look_ahead` documents, or as many as
        are two budgets long. The oldest of them is always taken, so none waits for more streams than documents wait
        before it. 0: a stream is the next `documents` documents, whatever their length.
    drop: leave out documents longer than the budget with a warning (for the 1st, 2nd, 4th, 8th, ... of a source) and
        count them in `dropped`, one number a source; otherwise they raise ValueError, as does a source of which no
        sample fits. named: says which sample of a source is meant.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float],
        seed: int,
        measure: Callable[[int, int, int], int],
        *,
        budget: int = 0,
        look_ahead: int = 64,
        documents: int = 1,
        drop: bool = False,
        named: Callable[[int, int], str] = "source {}, sample {}".format,
    ) -> None:
        self.sizes, self.seed, self.budget = list(sizes), seed, budget
        self._turns, self._measure = Turns(weights), measure
        self._look_ahead, self._documents, self._drop, self._named = look_ahead, documents, drop, named
        self._pool: list[tuple[Draw, int]] = []  # the oldest first, each with its number inside its source
        self._dropped_in_a_row = [0] * len(self.sizes)
        self.dropped = [0] * len(self.sizes)
        self.room = self.tokens = 0  # budgets of all streams so far, and what documents fill of them

    @property
    def waste(self) -> float:
        """Share of the budgets of all streams so far that no document fills; 0 without a budget."""
        return 1 - self.tokens / self.room if self.room else 0.0

    def next(self) -> Bin:
        """The next stream. Raises ValueError naming a document that is longer than the budget, unless they drop."""
        wanted = self._look_ahead if self.budget else self._documents
        waiting = sum(draw.length for draw, _ in self._pool)
        while len(self._pool) < wanted or waiting < 2 * self.budget:
            waiting += self._draw()
        chosen = range(wanted)
        if self.budget:
            chosen = best_fit([draw.length for draw, _ in self._pool], self.budget)
        draws = tuple(self._pool[index][0] for index in chosen)
        for index in reversed(chosen):
            del self._pool[index]
        stream = Bin(draws, sum(draw.length for draw in draws))
        if self.budget:
            self.room, self.tokens = self.room + self.budget, self.tokens + stream.length
        return stream

    def state(self) -> dict[str, Any]:
        """What load needs to go on from here, in numbers and lists of numbers (JSON)."""
        return {
            "turns": list(self._turns.counts),
            "pool": [[draw.place, draw.source, number] for draw, number in self._pool],
            "dropped": list(self.dropped),
            "room": self.room,
            "tokens": self.tokens,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a state of a packer of the same sizes, weights and seed.

        With the same measure, budget and look_ahead its streams are those of the packer that made the state.
        """
        self._turns.counts = list(state["turns"])
        self.dropped, self._dropped_in_a_row = list(state["dropped"]), [0] * len(self.sizes)
        self.room, self.tokens = state["room"], state["tokens"]
        self._pool = []
        for place, source, number in state["pool"]:
            self._join(place, source, number)

    def _draw(self) -> int:
        """Moves the next document into the pool, or drops it; returns the tokens that joined."""
        place = sum(self._turns.counts)
        return self._join(place, *self._turns.next())

    def _join(self, place: int, source: int, number: int) -> int:
        """Lets document `number` of its source wait for a stream, or drops it; returns the tokens that joined."""
        size = self.sizes[source]
        epoch, index = divmod(number, size)
        sample = shuffled(index, size, mix(self.seed, _ORDER, source, epoch))
        draw = Draw(place, source, sample, self._measure(place, source, sample))
        if not self.budget or draw.length <= self.budget:
            self._dropped_in_a_row[source] = 0
            self._pool.append((draw, number))
            return draw.length
        self.dropped[source] += 1
        self._dropped_in_a_row[source] += 1
        what = f"{self._named(source, sample)} has {draw.length} tokens"
        if not self._drop:
            raise ValueError(f"{what}, more than token_budget {self.budget}")
        if self._dropped_in_a_row[source] == size:
            raise ValueError(
                f"{what} and, like every other sample of its source, does not fit token_budget {self.budget}"
            )
        if self.dropped[source].bit_count() == 1:  # the 1st, 2nd, 4th, 8th, ...
            warnings.warn(
                f"{what}, more than token_budget {self.budget}: left out, with {self.dropped[source] - 1} others "
                f"of its source so far",
                stacklevel=4,
            )
        return 0


_ORDER = 0
