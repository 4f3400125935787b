"""Nearest strings by a bound from the characters they share, then by comparing whoever the bound lets through.

The distance of strings of n and m characters that have k characters in common, wherever they stand, is at least
max(n, m) - k, and so at least |n - m|. One row of 0 and 1 per character says which candidates have it; subtracting the
rows of a query's characters from max(n, m) gives the bound for all candidates at once. Candidates are compared in the
order of their bound until it exceeds the best distance found, so the result is exact.

Legend: C candidates, G queries of one length, W candidates whose lengths come into question, K pairs to compare.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

Longs = NDArray[np.int64]
Codes = NDArray[np.unsignedinteger]
Bounds = NDArray[np.unsignedinteger]

GROUP_QUERIES = 64  # searched together: their bounds take a few megabytes
PAIRS_AT_ONCE = 1 << 13  # a table of all of them stays in the cache of one core
MANY_PAIRS = 1 << 16  # worth a look at the candidates of low rank first, and
LOW_RANKS = 32  # that is the first 1 / 32 of all ranks
LONGEST_IN_TABLES = 40  # characters; longer strings are few and go one by one
SPARSE_SHARE = 4096  # a character in fewer than C / 4096 candidates is kept as a list of them, not as a row
ROWS_BYTES = 256 << 20  # rows kept at one time; a vocabulary of 128,000 tokens needs some 40 MB
NOBODY = np.iinfo(np.int64).max
_RANK_BITS = 32


def code_points(texts: list[str]) -> NDArray[np.uint32]:
    """The code points of all texts, one after the other; lone surrogates too."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def text_lengths(texts: list[str]) -> Longs:
    return np.fromiter(map(len, texts), np.int64, len(texts))


class Bags:
    """Candidates, ascending and without repeats; a candidate's rank is its place among them.

    Here they are held by ascending length, ties by rank: those that can be near to a query are one stretch of places.
    """

    def __init__(self, candidates: list[str]) -> None:
        lengths = text_lengths(candidates)
        self.ranks = np.argsort(lengths, kind="stable")
        self.lengths = lengths[self.ranks]
        self.texts = [candidates[rank] for rank in self.ranks.tolist()]
        points = code_points(self.texts)
        self.alphabet = _Alphabet(points)
        codes = self.alphabet.codes(points)
        self.holders = _Holders(codes, self.lengths)
        self.table = _padded(codes, self.lengths, LONGEST_IN_TABLES)

    def nearest(self, queries: list[str], at_least: Longs) -> Iterator[tuple[Longs, Longs, Longs]]:
        """Search all queries: yields (numbers of the queries, their ranks, their distances), group after group.

        at_least int64 [Q]: no candidate is nearer than this. Every query comes exactly once, in no particular order.
        """
        lengths = text_lengths(queries)
        order = np.lexsort((at_least, lengths))
        changes = np.diff(lengths[order]) | np.diff(at_least[order])
        for alike in np.split(order, np.flatnonzero(changes) + 1):
            for start in range(0, alike.size, GROUP_QUERIES):
                numbers = alike[start : start + GROUP_QUERIES]
                best = self._search([queries[number] for number in numbers.tolist()], int(at_least[numbers[0]]))
                yield numbers, best & ((1 << _RANK_BITS) - 1), best >> _RANK_BITS

    def _search(self, texts: list[str], level: int) -> Longs:
        """Queries of one length, none nearer to a candidate than `level`: distance << 32 | rank, int64 [G]."""
        best = np.full(len(texts), NOBODY)
        open_ = np.arange(len(texts))
        compared, window = -1, _Window(self, texts, level + 2)
        while open_.size:
            if level > window.reach:
                window = _Window(self, [texts[number] for number in open_.tolist()], 2 * level)
            found = best[open_]
            for lowest, rows, places in self._by_rank(*window.between(compared, level)):
                going = np.flatnonzero(found[rows] > (level << _RANK_BITS | lowest))
                if going.size:
                    rows, places = rows[going], places[going]
                    keys = window.distances(rows, places) << _RANK_BITS | self.ranks[places]
                    np.minimum.at(found, rows, keys)
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
        for bounds, codes in zip(self._bounds, self._codes.tolist(), strict=True):
            seen: dict[int, int] = {}
            for code in codes:
                seen[code] = occurrence = seen.get(code, 0) + 1
                bags.holders.subtract(code, occurrence, bounds, ends)

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

    def distances(self, rows: Longs, places: Longs) -> Longs:
        """Levenshtein distances of pairs, int64 [K]."""
        longest = int(self._lengths[-1])
        if max(longest, self._length) > LONGEST_IN_TABLES:
            pairs = [self._texts[row] for row in rows.tolist()], [self._bags.texts[place] for place in places.tolist()]
            return np.asarray(cpdist(*pairs, scorer=Levenshtein.distance, dtype=np.int64))
        distances = np.empty(rows.size, np.int64)
        for start in range(0, rows.size, PAIRS_AT_ONCE):
            part = slice(start, start + PAIRS_AT_ONCE)
            candidates = np.ascontiguousarray(self._bags.table.take(places[part], axis=0)[:, :longest].T)
            queries = np.ascontiguousarray(self._codes.take(rows[part], axis=0).T)
            distances[part] = levenshtein(queries, candidates, self._bags.lengths[places[part]])
        return distances


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


def _padded(codes: Codes, lengths: Longs, longest: int) -> Codes:
    """Strings of ascending lengths, one after the other, as a table (C', longest) of those that fit; 0 fills it up."""
    fitting = lengths[: np.searchsorted(lengths, longest, side="right")]
    table = np.zeros((fitting.size, longest), codes.dtype)
    table[np.arange(longest) < fitting[:, None]] = codes[: fitting.sum()]
    return table


class _Alphabet:
    """Small numbers for the candidates' characters: 1, 2, ...; one more for every other character; 0 for none."""

    def __init__(self, points: NDArray[np.uint32]) -> None:
        present = np.zeros(0x110000, bool)
        present[points] = True
        known = np.flatnonzero(present)
        self._codes: Codes = np.full(0x110000, known.size + 1, np.uint16 if known.size + 1 < 1 << 16 else np.uint32)
        self._codes[known] = np.arange(1, known.size + 1)

    def codes(self, points: NDArray[np.uint32]) -> Codes:
        return self._codes[points]


class _Holders:
    """Which candidates have a character at least once, twice, ...: as a row of 0 and 1, or as a list where few have it.

    codes: those of all candidates, one after the other; lengths int64 [C].
    """

    def __init__(self, codes: Codes, lengths: Longs) -> None:
        self._size = lengths.size
        order = np.argsort(codes, kind="stable")  # of 16-bit integers a radix sort: linear
        self._places = np.repeat(np.arange(lengths.size), lengths)[order]
        counts = np.bincount(codes)
        self._stops = np.cumsum(counts)
        self._starts = self._stops - counts
        self._occurrences = _places_in_runs(codes[order], self._places) + 1
        self._rows = 0
        self._kept: dict[tuple[int, int], NDArray[np.uint8] | Longs] = {}

    def subtract(self, code: int, occurrence: int, bounds: Bounds, span: Longs) -> None:
        """Lower by one the bound of each candidate in the `span` of places that has the character so often or more."""
        holders = self._kept.get((code, occurrence))
        if holders is None:
            holders = self._kept[code, occurrence] = self._find(code, occurrence)
        if holders.dtype == np.uint8:
            np.subtract(bounds, holders[span[0] : span[1]], out=bounds)
        elif holders.size:
            first, last = holders.searchsorted(span)
            bounds[holders[first:last] - span[0]] -= 1

    def _find(self, code: int, occurrence: int) -> NDArray[np.uint8] | Longs:
        if code >= self._starts.size:
            return np.zeros(0, np.int64)
        run = slice(self._starts[code], self._stops[code])
        places: Longs = self._places[run][self._occurrences[run] == occurrence]
        if places.size * SPARSE_SHARE <= self._size:
            return places
        self._rows += 1
        if self._rows * self._size > ROWS_BYTES:
            self._kept.clear()
            self._rows = 1
        row = np.zeros(self._size, np.uint8)
        row[places] = 1
        return row


def _places_in_runs(first: NDArray[np.integer], second: NDArray[np.integer]) -> Longs:
    """For each element its place, from 0, within the run of elements that have the same pair of keys."""
    begins = np.ones(first.size, bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    here = np.arange(begins.size)
    places: Longs = here - np.maximum.accumulate(np.where(begins, here, 0))
    return places
