"""Nearest strings by a bound from the characters they share, then by comparing whoever the bound lets through.

The distance of strings of n and m characters that have k characters in common, wherever they stand, is at least
max(n, m) - k, and so at least |n - m|. One row of 0 and 1 per character says which candidates have it; the sum of the
rows of a query's characters is k for all candidates at once. Candidates are compared in the order of their bound until
it exceeds the best distance found, so the result is exact.

Legend: C candidates, G queries of one length, W candidates whose lengths come into question, K pairs to compare.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from fedmkt.edit_index import Alphabet, Codes, Holders, Longs, code_points, padded, text_lengths

Tick = Callable[[], None]

GROUP_QUERIES = 192  # searched together, and
GROUP_BYTES = 24 << 20  # fewer where their bounds would take more than this
PAIRS_AT_ONCE = 1 << 13  # a table of all of them stays in the cache of one core
CELLS_AT_ONCE = 1 << 26  # and long strings are fewer: half a second
MANY_PAIRS = 1 << 16  # worth a look at the candidates of low rank first, and
LOW_RANKS = 32  # that is the first 1 / 32 of all ranks
LONGEST_IN_TABLES = 40  # characters; longer strings are few and go one by one
NOBODY = np.iinfo(np.int64).max
_RANK_BITS = 32


class Bags:
    """Candidates, ascending and without repeats; a candidate's rank is its place among them.

    Here they are held by ascending length, ties by rank: those that can be near to a query are one stretch of places.
    """

    def __init__(self, candidates: list[str], tick: Tick) -> None:
        lengths = text_lengths(candidates)
        self.ranks = np.argsort(lengths, kind="stable")
        self.lengths = lengths[self.ranks]
        self.texts = [candidates[rank] for rank in self.ranks.tolist()]
        self.tick = tick
        points = code_points(self.texts)
        self.alphabet = Alphabet(points)
        codes = self.alphabet.codes(points)
        self.holders = Holders(codes, self.lengths)
        self.table = padded(codes, self.lengths, LONGEST_IN_TABLES)

    def nearest(self, queries: list[str], at_least: Longs) -> Iterator[tuple[Longs, Longs, Longs]]:
        """Search all queries: yields (numbers of the queries, their ranks, their distances), group after group.

        at_least int64 [Q]: no candidate is nearer than this. Every query comes exactly once, in no particular order.
        `tick()` of the constructor is called at least every few tenths of a second; what it raises ends the search.
        """
        lengths = text_lengths(queries)
        order = np.lexsort((at_least, lengths))
        changes = np.diff(lengths[order]) | np.diff(at_least[order])
        step = max(1, min(GROUP_QUERIES, GROUP_BYTES // max(1, len(self.texts))))
        for alike in np.split(order, np.flatnonzero(changes) + 1):
            for start in range(0, alike.size, step):
                numbers = alike[start : start + step]
                best = self._search([queries[number] for number in numbers.tolist()], int(at_least[numbers[0]]))
                yield numbers, best & ((1 << _RANK_BITS) - 1), best >> _RANK_BITS

    def _search(self, texts: list[str], level: int) -> Longs:
        """Queries of one length, none nearer to a candidate than `level`: distance << 32 | rank, int64 [G]."""
        best = np.full(len(texts), NOBODY)
        open_ = np.arange(len(texts))
        compared, window = -1, _Window(self, texts, level + 1)
        while open_.size:
            if level > window.reach:
                window = _Window(self, [texts[number] for number in open_.tolist()], 2 * level)
            found = best[open_]
            for lowest, rows, places in self._by_rank(*window.between(compared, level)):
                going = np.flatnonzero(found[rows] > (level << _RANK_BITS | lowest))
                for rows_, places_ in window.batches(rows[going], places[going]):
                    keys = window.distances(rows_, places_) << _RANK_BITS | self.ranks[places_]
                    np.minimum.at(found, rows_, keys)
            best[open_] = found
            compared, level = level, level + 1
            still = found >> _RANK_BITS > compared
            if not still.all():
                open_ = open_[still]
                window.keep(still)
        return best

    def _by_rank(self, rows: Longs, places: Longs) -> Iterator[tuple[int, Longs, Longs]]:
        """Many pairs in two parts (lowest rank, rows, places), low ranks first.

        With many ties the winner is among them, and nothing in the second part can be better: none is nearer than the
        level at hand, and its ranks are larger.
        """
        if rows.size < MANY_PAIRS:
            yield 0, rows, places
            return
        middle = self.ranks.size // LOW_RANKS
        low = self.ranks[places] < middle
        yield 0, rows[low], places[low]
        yield middle, rows[~low], places[~low]


class _Window:
    """Queries of one length against the candidates whose length differs by at most `reach`."""

    def __init__(self, bags: Bags, texts: list[str], reach: int) -> None:
        bags.tick()
        self.reach = reach
        self._bags, self._texts = bags, texts
        self._length = len(texts[0])
        ends = np.searchsorted(bags.lengths, [self._length - reach, self._length + reach + 1])
        self._low = int(ends[0])
        self._lengths = bags.lengths[slice(*ends)]  # (W,)
        self._codes = bags.alphabet.codes(code_points(texts)).reshape(len(texts), self._length)  # (G, n)
        longer = np.maximum(self._lengths, self._length)
        self._bounds = np.empty((len(texts), longer.size), np.min_scalar_type(longer.max(initial=0)))  # (G, W)
        self._bounds[:] = longer
        bags.holders.subtract(self._codes, self._bounds, ends)

    def keep(self, rows: NDArray[np.bool_]) -> None:
        self._texts = [text for text, kept in zip(self._texts, rows.tolist(), strict=True) if kept]
        self._codes, self._bounds = self._codes[rows], self._bounds[rows]

    def between(self, above: int, upto: int) -> tuple[Longs, Longs]:
        """Pairs with above < bound <= upto: query rows (K,) and places of candidates (K,)."""
        inside = self._bounds <= upto
        if above >= 0:
            inside &= self._bounds > above
        rows, columns = np.divmod(np.flatnonzero(inside), max(1, inside.shape[1]))
        return rows, columns + self._low

    def batches(self, rows: Longs, places: Longs) -> Iterator[tuple[Longs, Longs]]:
        """The pairs in batches of a fraction of a second, short candidates first."""
        if not rows.size:
            return
        order = np.argsort(self._bags.lengths[places].astype(np.uint16), kind="stable")  # a radix sort
        step = max(1, min(PAIRS_AT_ONCE, CELLS_AT_ONCE // max(1, self._length * int(self._lengths[-1]))))
        for start in range(0, rows.size, step):
            self._bags.tick()
            chosen = order[start : start + step]
            yield rows[chosen], places[chosen]

    def _in_tables(self) -> bool:
        return max(int(self._lengths[-1]), self._length) <= LONGEST_IN_TABLES

    def distances(self, rows: Longs, places: Longs) -> Longs:
        """Levenshtein distances of pairs whose candidates come by ascending length, int64 [K]."""
        if not self._in_tables():
            pairs = [self._texts[row] for row in rows.tolist()], [self._bags.texts[place] for place in places.tolist()]
            return np.asarray(cpdist(*pairs, scorer=Levenshtein.distance, dtype=np.int64))
        lengths = self._bags.lengths[places]
        candidates = np.ascontiguousarray(self._bags.table.take(places, axis=0)[:, : int(lengths[-1])].T)
        queries = np.ascontiguousarray(self._codes.take(rows, axis=0).T)
        return levenshtein(queries, candidates, lengths).astype(np.int64)


def levenshtein(queries: Codes, candidates: Codes, lengths: Longs) -> NDArray[np.int8]:
    """Distances of K pairs at once, int8 [K]: the textbook table (Wagner and Fischer 1974), all pairs side by side.

    queries (n, K); candidates (M, K), of which the first lengths[k] codes of column k count; n and M at most 40. Cells
    hold the distance of two beginnings less the second one's length, so that an insertion costs nothing.
    """
    longest, pairs = candidates.shape
    row, below = np.zeros((2, longest + 1, pairs), np.int8)
    equal = np.empty((longest, pairs), bool)
    for number, query in enumerate(queries, 1):
        np.equal(candidates, query, out=equal)
        np.subtract(row[:-1], equal.view(np.int8), out=below[1:])  # kept or substituted
        row += 1  # deleted
        np.minimum(below[1:], row[1:], out=below[1:])
        below[0] = number
        for place in range(1, longest + 1):  # inserted
            np.minimum(below[place], below[place - 1], out=below[place])
        row, below = below, row
    distances: NDArray[np.int8] = row[lengths, np.arange(pairs)] + lengths.astype(np.int8)
    return distances
