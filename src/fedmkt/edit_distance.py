"""The nearest string of a large set under Levenshtein distance: exact, deterministic, near-linear in the set's size.

Three steps, each exact, each for what the one before left over: equal strings by hash table; distances 1, 2 and
sometimes 3 by hashed edit patterns (`fedmkt.edit_patterns`); the few that lie further away by comparing them with the
candidates whose characters allow it (`fedmkt.edit_bags`). Ties go to the lexicographically smallest candidate (by code
points), then to the first of equal ones. C candidates, Q queries.
"""

from collections.abc import Callable, Iterator, Sequence
from math import comb

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from fedmkt.edit_bags import Bags
from fedmkt.edit_index import code_points, text_lengths
from fedmkt.edit_patterns import MAX_EDITS, NOBODY, Block, character_values, join

Progress = Callable[[int, int], None]
Longs = NDArray[np.int64]

LONGEST_BY_PATTERNS = {1: 256, 2: 48, 3: 18}  # characters; beyond it a string has more than some 5000 patterns
PATTERN_NS = 12.0  # to make, sieve and join one pattern; only the choice of the method depends on these three
SEARCH_NS = 50_000.0  # to search one query without patterns, and
COMPARE_NS = 3.0  # for each candidate in it


def token_text(token: bytes) -> str:
    """The text of a token's bytes: UTF-8, with each byte that is not part of it as U+DC00 + byte (PEP 383).

    Valid UTF-8 has no surrogates, so different bytes are always different texts.
    """
    return token.decode("utf-8", "surrogateescape")


def nearest(
    queries: Sequence[str], candidates: Sequence[str], *, progress: Progress | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """For each query the nearest candidate and its Levenshtein distance in code points: index int32 [Q], int32 [Q].

    Insertion, deletion and substitution cost 1 (MinED: FedMKT paper, section 3.2 and appendix B). Ties: the
    lexicographically smallest candidate, then the smallest index. `progress(done, Q)` is called every few
    hundredths of a second, whether or not `done` has grown; what it raises ends the search.
    Raises ValueError when there are queries but no candidates.
    """
    if queries and not candidates:
        raise ValueError(f"{len(queries)} strings to look up, but no candidates; give at least one")
    order = sorted(range(len(candidates)), key=candidates.__getitem__)
    first = [i for place, i in enumerate(order) if place == 0 or candidates[i] != candidates[order[place - 1]]]
    known = [candidates[i] for i in first]  # ascending, without repeats: the place is the rank
    rank_of = {text: rank for rank, text in enumerate(known)}
    ranks = np.fromiter((rank_of.get(text, -1) for text in queries), np.int64, len(queries))
    distances = np.zeros(len(queries), np.int64)
    unequal = np.flatnonzero(ranks < 0)
    if unequal.size:
        texts = _without_strangers([queries[i] for i in unequal.tolist()], set("".join(known)))
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        search = _Search(list(distinct), known, _last_part(progress, len(queries), len(distinct)))
        search.run()
        numbers = np.fromiter((distinct[text] for text in texts), np.int64, len(texts))
        ranks[unequal], distances[unequal] = search.ranks[numbers], search.distances[numbers]
    if progress:
        progress(len(queries), len(queries))
    return np.array(first, np.int32)[ranks], distances.astype(np.int32)


def _without_strangers(texts: list[str], alphabet: set[str]) -> list[str]:
    """Replace every character that no candidate has by one and the same, so that many texts become equal."""
    strangers = set("".join(texts)) - alphabet
    if not strangers:
        return texts
    stand_in = next(chr(code) for code in range(0x110000) if chr(code) not in alphabet)
    table = dict.fromkeys(map(ord, strangers), stand_in)
    return [text if alphabet.issuperset(text) else text.translate(table) for text in texts]


def _last_part(progress: Progress | None, total: int, searched: int) -> Progress:
    """Report `done` of `searched` as the last part of `total`: the others were settled before the search."""
    if progress is None:
        return lambda done, _: None
    return lambda done, _: progress(total - searched + done, total)


class _Strings:
    """Strings as flat arrays of character values."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self.values = character_values(code_points(texts))
        self.lengths = text_lengths(texts)
        self.starts = np.cumsum(self.lengths) - self.lengths

    def blocks(self, chosen: Longs) -> Iterator[Block]:
        """The chosen strings by length, ascending; ids are string numbers."""
        lengths = self.lengths[chosen]
        for length in np.unique(lengths).tolist():
            ids = chosen[lengths == length]
            yield Block(ids, self.values[self.starts[ids] + np.arange(length)[:, None]])


class _Search:
    """Queries that no candidate equals. `ranks` and `distances` int64 [Q] are the result; -1 is still open."""

    def __init__(self, queries: list[str], candidates: list[str], progress: Progress) -> None:
        self.queries, self.candidates = _Strings(queries), _Strings(candidates)
        self.ranks = np.full(len(queries), -1, np.int64)
        self.distances = np.full(len(queries), -1, np.int64)
        self._at_least = np.ones(len(queries), np.int64)  # proved: no candidate is nearer
        self._progress = progress
        self._done = 0

    def run(self) -> None:
        short = np.flatnonzero(self.candidates.lengths <= max(LONGEST_BY_PATTERNS.values()))
        blocks = {block.length: block for block in self.candidates.blocks(short)}
        for distance in range(1, MAX_EDITS + 1):
            within = LONGEST_BY_PATTERNS[distance] - distance  # a match is at most `distance` longer
            chosen = np.flatnonzero((self._at_least == distance) & (self.distances < 0))
            chosen = chosen[self.queries.lengths[chosen] <= within]
            if not self._patterns_pay(chosen, distance):
                break
            self._settle_by_patterns(chosen, blocks, distance)
            self._report()
        self._settle_by_bags()

    def _patterns_pay(self, chosen: Longs, distance: int) -> bool:
        """Whether hashing all patterns of this distance is cheaper than searching the chosen queries one by one."""
        limit = LONGEST_BY_PATTERNS[distance]
        lengths = np.concatenate([self.queries.lengths[chosen], self.candidates.lengths])
        counts: list[int] = np.bincount(lengths[lengths <= limit]).tolist()
        patterns = sum(count * comb(length, distance) << distance for length, count in enumerate(counts))
        search: float = chosen.size * (SEARCH_NS + COMPARE_NS * len(self.candidates.texts))
        return patterns * PATTERN_NS < search

    def _settle_by_patterns(self, chosen: Longs, candidates: dict[int, Block], distance: int) -> None:
        best = np.full(len(self.queries.texts), NOBODY)
        for block in self.queries.blocks(chosen):
            for deleted in range(distance + 1):
                for inserted in range(distance + 1 - deleted):
                    others = candidates.get(block.length - deleted + inserted)
                    if others is not None:
                        join(block, others, (deleted, inserted), distance - deleted - inserted, best, self._tick)
        found = chosen[best[chosen] < NOBODY]
        true = found[self._compare(found, best[found]) == distance]
        self.ranks[true], self.distances[true] = best[true], distance
        # a hash that two patterns share may give a wrong winner; such a query stays open and is searched from here on
        self._at_least[chosen[best[chosen] == NOBODY]] = distance + 1

    def _compare(self, queries: Longs, ranks: Longs) -> Longs:
        pairs = [self.queries.texts[i] for i in queries.tolist()], [self.candidates.texts[i] for i in ranks.tolist()]
        return np.asarray(cpdist(*pairs, scorer=Levenshtein.distance, dtype=np.int64))

    def _settle_by_bags(self) -> None:
        remaining = np.flatnonzero(self.distances < 0)
        if not remaining.size:
            return
        texts = [self.queries.texts[query] for query in remaining.tolist()]
        for numbers, ranks, distances in Bags(self.candidates.texts, self._report).nearest(
            texts, self._at_least[remaining]
        ):
            self.ranks[remaining[numbers]], self.distances[remaining[numbers]] = ranks, distances
            self._report()

    def _report(self) -> None:
        self._done = int(np.count_nonzero(self.distances >= 0))
        self._tick()

    def _tick(self) -> None:
        self._progress(self._done, len(self.distances))
