"""Which strings lie within a small edit distance, found by hashing instead of by comparing pairs.

Lev(q, c) <= d exactly when q with `a` characters deleted and `w` characters replaced by a wildcard equals c with `b`
characters deleted and `w` replaced by the wildcard, for some a + b + w <= d: a deletion from q, an insertion into q and
a substitution are one unit each. So every string is turned into the 64-bit hashes of all its patterns, and equal hashes
on the two sides name the pairs. The work is linear in the number of strings.

A hash is a polynomial over the string modulo 2^64. Deleting or masking a character adds one term that depends only on
the string, the place and the number of deletions before it, so a pattern costs one addition per edit. Equal patterns
have equal hashes, never the reverse: a caller that needs certainty compares the winners (`fedmkt.edit_distance` does).

Legend: n characters of a string, N strings of one length, P patterns of one string.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from itertools import combinations, product
from math import comb

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Indices = NDArray[np.intp]

MAX_EDITS = 3
NOBODY = np.iinfo(np.int64).max  # larger than every rank
_WORD = 1 << 64
_BASE = 0x9E3779B97F4A7C15  # odd, hence invertible modulo 2^64
_WILDCARD = np.uint64(0xD1B54A32D192ED03)
_MULTIPLIERS = (1, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # odd: each looks at other bits of the hash
_CHUNK_PATTERNS = 1 << 15  # 256 kB of hashes: two such arrays stay in the cache of one core
_HELD_PATTERNS = 1 << 22  # of one side of a join, at one time
_DELETE, _MASK = 0, 1


def character_values(codes: NDArray[np.uint32]) -> Hashes:
    """A 64-bit value for each code point, any shape: the finaliser of splitmix64, a bijection that mixes well."""
    x = codes.astype(np.uint64) + np.uint64(_BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pattern_count(length: int, deleted: int, masked: int) -> int:
    """How many patterns a string of `length` characters has with so many characters deleted and masked."""
    edits = deleted + masked
    return comb(length, edits) * comb(edits, deleted)


class Block:
    """Strings of one length, ready to be hashed.

    `ids` (N,) any integers that name the strings, `values` (n, N) their `character_values`, one column a string.
    """

    def __init__(self, ids: NDArray[np.int64], values: Hashes) -> None:
        self.ids = ids
        self.length: int = values.shape[0]
        self.strings: int = values.shape[1]
        self._powers = _powers(self.length, _BASE)[:, None]
        self._inverses = _powers(MAX_EDITS + 1, pow(_BASE, -1, _WORD))
        self._summands = values * self._powers  # (n, N)
        self._sums = np.zeros((self.length + 1, self.strings), np.uint64)
        np.cumsum(self._summands, axis=0, out=self._sums[1:])
        self._terms: dict[tuple[int, int], Hashes] = {}

    def count(self, deleted: int, masked: int) -> int:
        return self.strings * pattern_count(self.length, deleted, masked)

    def hashes(
        self,
        deleted: int,
        masked: int,
        strings: range,
        tick: Callable[[], None],
        sieve: "_Sieve | None" = None,
    ) -> Iterator[tuple[Hashes, Indices]]:
        """The patterns of the strings numbered `strings` that may pass the sieve, in chunks.

        Pairs (hash (M,), number of the string (M,)).
        """
        edits = deleted + masked
        step = max(1, _CHUNK_PATTERNS // max(1, comb(self.length, edits)))
        orders = [order for order in product((_DELETE, _MASK), repeat=edits) if order.count(_DELETE) == deleted]
        for start in range(strings.start, strings.stop, step):
            tick()
            columns = slice(start, min(strings.stop, start + step))
            for order in orders:
                found = self._ordered(order, columns).ravel()
                kept = np.arange(found.size) if sieve is None else np.flatnonzero(sieve.may_hold(found))
                if kept.size:
                    yield found[kept], kept % (columns.stop - start) + start

    def _ordered(self, order: tuple[int, ...], columns: slice) -> Hashes:
        """Hashes (P, strings) of the patterns whose edits, from left to right, are `order`."""
        hashes: Hashes = self._sums[-1:, columns] * self._inverses[order.count(_DELETE)]
        deleted = 0
        for edits, kind in enumerate(order, 1):
            parents, places = _places(self.length, edits)
            added = self._term(kind, deleted)[:, columns].take(places, axis=0)
            added += hashes.take(parents, axis=0)
            hashes = added
            deleted += kind == _DELETE
        return hashes

    def _term(self, kind: int, deleted: int) -> Hashes:
        """What one edit at each place adds to the hash, after `deleted` deletions to its left: (n, N)."""
        if (kind, deleted) not in self._terms:
            if kind == _DELETE:
                term = self._sums[:-1] * self._inverses[deleted] - self._sums[1:] * self._inverses[deleted + 1]
            else:
                term = (_WILDCARD * self._powers - self._summands) * self._inverses[deleted]
            self._terms[kind, deleted] = term
        return self._terms[kind, deleted]


def join(
    queries: Block,
    candidates: Block,
    deleted: tuple[int, int],
    masked: int,
    best: NDArray[np.int64],
    tick: Callable[[], None],
) -> None:
    """Lower `best[q]` to the smallest candidate id that shares a pattern hash with query id q.

    `deleted` says how many characters are deleted from queries and from candidates, `masked` how many are masked in
    both. `best` int64, indexed by the ids of `queries`. The side with fewer patterns becomes a sieve that the patterns
    of the other side run through, so that only those that may match are ever held. `tick()` is called every few
    milliseconds; what it raises ends the join.
    """
    sides = [(queries, deleted[0]), (candidates, deleted[1])]
    if not all(block.count(gone, masked) for block, gone in sides):
        return
    sides.sort(key=lambda side: side[0].count(side[1], masked))
    (few, few_gone), (many, many_gone) = sides
    step = max(1, _HELD_PATTERNS // pattern_count(few.length, few_gone, masked))
    for start in range(0, few.strings, step):
        held = range(start, min(few.strings, start + step))
        own = _concatenated(few.hashes(few_gone, masked, held, tick))
        sieve = _Sieve(own[0], _MULTIPLIERS[0])
        for other in _in_pieces(many.hashes(many_gone, masked, range(many.strings), tick, sieve)):
            asking, offering = (own, other) if few is queries else (other, own)
            _settle(queries, candidates, asking, offering, best)


_Found = tuple[Hashes, Indices]


def _in_pieces(patterns: Iterator[_Found]) -> Iterator[_Found]:
    """The same patterns in pieces of about `_HELD_PATTERNS`."""
    pieces: list[_Found] = []
    held = 0
    for piece in patterns:
        pieces.append(piece)
        held += piece[0].size
        if held > _HELD_PATTERNS:
            yield _concatenated(pieces)
            pieces, held = [], 0
    if pieces:
        yield _concatenated(pieces)


def _settle(queries: Block, candidates: Block, asking: _Found, offering: _Found, best: NDArray[np.int64]) -> None:
    """Join two lists of patterns: the smallest candidate id of each hash goes to every query with that hash."""
    for multiplier in _MULTIPLIERS[1:]:
        asking = _kept(asking, _Sieve(offering[0], multiplier))
        offering = _kept(offering, _Sieve(asking[0], multiplier))
    if not asking[0].size or not offering[0].size:
        return
    hashes, group = np.unique(offering[0], return_inverse=True)
    smallest = np.full(hashes.size, NOBODY)
    np.minimum.at(smallest, group, candidates.ids[offering[1]])
    place = np.minimum(np.searchsorted(hashes, asking[0]), hashes.size - 1)
    equal = np.flatnonzero(hashes[place] == asking[0])
    np.minimum.at(best, queries.ids[asking[1][equal]], smallest[place[equal]])


class _Sieve:
    """A set of hashes, answered from one bit slice of them: says 'perhaps' for one stranger in eight or fewer."""

    def __init__(self, members: Hashes, multiplier: int) -> None:
        bits = min(24, max(10, members.size.bit_length() + 3))
        self._multiplier, self._shift = np.uint64(multiplier), np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, bool)
        self._table[self._slots(members)] = True

    def may_hold(self, hashes: Hashes) -> NDArray[np.bool_]:
        return self._table.take(self._slots(hashes))

    def _slots(self, hashes: Hashes) -> NDArray[np.int64]:
        spread = hashes * self._multiplier if self._multiplier != 1 else hashes
        return (spread >> self._shift).view(np.int64)


def _kept(found: _Found, sieve: _Sieve) -> _Found:
    kept = np.flatnonzero(sieve.may_hold(found[0]))
    return found[0][kept], found[1][kept]


def _concatenated(pieces: Iterable[_Found]) -> _Found:
    hashes, numbers = zip(*pieces, strict=True)
    return np.concatenate(hashes), np.concatenate(numbers)


@lru_cache(maxsize=1024)
def _powers(count: int, base: int) -> Hashes:
    """base^0 ... base^(count-1) modulo 2^64."""
    powers = [1]
    while len(powers) < count:
        powers.append(powers[-1] * base % _WORD)
    return np.array(powers[:count], np.uint64)


@lru_cache(maxsize=1024)
def _places(length: int, edits: int) -> tuple[Indices, Indices]:
    """Ascending places of `edits` edits: the row of `_places(length, edits - 1)` each extends, and the last place."""
    chosen = list(combinations(range(length), edits))
    row = {places: number for number, places in enumerate(combinations(range(length), edits - 1))}
    parents = np.array([row[places[:-1]] for places in chosen], np.intp)
    return parents, np.array([places[-1] for places in chosen], np.intp)
