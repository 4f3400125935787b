"""The characters of a search's candidates as small numbers, and which candidates have which.

Legend: C candidates, G queries of one length n, W candidates in question, F characters that any of the queries has.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Longs = NDArray[np.int64]
Codes = NDArray[np.unsignedinteger]
Bounds = NDArray[np.unsignedinteger]

SPARSE_SHARE = 4096  # a character in fewer than C / 4096 candidates is kept as a list of them, not as a row
ROWS_BYTES = 256 << 20  # rows kept at one time; a vocabulary of 128,000 tokens needs some 40 MB
TABLE_BYTES = 64 << 20  # rows of one group of queries side by side; beyond that each is used by itself
_CODE_SHIFT = 32


def code_points(texts: list[str]) -> NDArray[np.uint32]:
    """The code points of all texts, one after the other; lone surrogates too."""
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def text_lengths(texts: list[str]) -> Longs:
    return np.fromiter(map(len, texts), np.int64, len(texts))


def padded(codes: Codes, lengths: Longs, longest: int) -> Codes:
    """Strings of ascending lengths, one after the other, as a table (C', longest) of those that fit; 0 fills it up."""
    fitting = lengths[: np.searchsorted(lengths, longest, side="right")]
    table = np.zeros((fitting.size, longest), codes.dtype)
    table[np.arange(longest) < fitting[:, None]] = codes[: fitting.sum()]
    return table


class Alphabet:
    """Small numbers for the candidates' characters: 1, 2, ...; one more for every other character; 0 for none."""

    def __init__(self, points: NDArray[np.uint32]) -> None:
        present = np.zeros(0x110000, bool)
        present[points] = True
        known = np.flatnonzero(present)
        self._codes: Codes = np.full(0x110000, known.size + 1, np.uint16 if known.size + 1 < 1 << 16 else np.uint32)
        self._codes[known] = np.arange(1, known.size + 1)

    def codes(self, points: NDArray[np.uint32]) -> Codes:
        return self._codes[points]


class Holders:
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
        self._before = _places_in_runs(codes[order], self._places)  # equal characters before it in its candidate
        self._by_count: dict[int, tuple[Longs, Longs]] = {}
        self._rows = 0
        self._kept: dict[int, NDArray[np.uint8] | Longs] = {}

    def subtract(self, queries: Codes, bounds: Bounds, span: Longs) -> None:
        """Lower each of the bounds (G, W) by the number of characters that query and candidate have in common.

        queries (G, n); the W candidates are those from the first place of `span` to before the second.
        """
        keys, number = np.unique(_numbered(queries), return_inverse=True)
        number = number.reshape(queries.shape)
        rows: list[NDArray[Any]] = [np.zeros(bounds.shape[1], np.uint8)]
        row_of = np.zeros(keys.size, np.intp)  # for the characters that many candidates have; 0 for all others
        table_fits = keys.size * self._size <= TABLE_BYTES
        for index, key in enumerate(keys.tolist()):
            holders = self._holders(key)
            if holders.dtype == np.uint8 and table_fits:
                row_of[index] = len(rows)
                rows.append(holders[span[0] : span[1]])
                continue
            owners = np.flatnonzero((number == index).any(axis=1))
            if holders.dtype == np.uint8:
                bounds[owners] -= holders[span[0] : span[1]]
            elif holders.size:
                first, last = holders.searchsorted(span)
                bounds[owners[:, None], holders[first:last] - span[0]] -= 1
        table = np.stack(rows)  # (F, W)
        for bound, own in zip(bounds, row_of[number], strict=True):
            bound -= np.add.reduce(table.take(own, axis=0), axis=0, dtype=bound.dtype)

    def _holders(self, key: int) -> NDArray[np.uint8] | Longs:
        if key not in self._kept:
            self._kept[key] = self._find(key >> _CODE_SHIFT, key & ((1 << _CODE_SHIFT) - 1))
        return self._kept[key]

    def _find(self, code: int, before: int) -> NDArray[np.uint8] | Longs:
        if code >= self._starts.size:
            return np.zeros(0, np.int64)
        if code not in self._by_count:
            run = slice(self._starts[code], self._stops[code])
            order = np.argsort(self._before[run], kind="stable")
            self._by_count[code] = self._before[run][order], self._places[run][order]
        counts, candidates = self._by_count[code]
        first, last = counts.searchsorted([before, before + 1])
        places = candidates[first:last]
        if places.size * SPARSE_SHARE <= self._size:
            return places
        self._rows += 1
        if self._rows * self._size > ROWS_BYTES:
            self._kept.clear()
            self._rows = 1
        row = np.zeros(self._size, np.uint8)
        row[places] = 1
        return row


def _numbered(queries: Codes) -> Longs:
    """Each query's codes, ascending, as code << 32 | how many equal ones stand before it: int64 (G, n)."""
    ordered = np.sort(queries, axis=1).astype(np.int64)
    owners = np.repeat(np.arange(len(queries)), queries.shape[1])
    return ordered << _CODE_SHIFT | _places_in_runs(ordered.ravel(), owners).reshape(queries.shape)


def _places_in_runs(first: NDArray[np.integer], second: NDArray[np.integer]) -> Longs:
    """For each element its place, from 0, within the run of elements that have the same pair of keys."""
    begins = np.ones(first.size, bool)
    begins[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    here = np.arange(begins.size)
    places: Longs = here - np.maximum.accumulate(np.where(begins, here, 0))
    return places
