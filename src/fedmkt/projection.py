"""How the mass of one teacher row lands on student tokens: vocabulary map, prefix buckets, chain rule.

Legend: B paired rows of a block, W columns, M paired rows of everything, V vocabulary; masses are float64.
Nothing here knows of samples or texts; `fedmkt.alignment` pairs the rows.

Rows stand in tables padded to one width: numpy sorts many short rows 20 times faster than one long list, and what would
be index arithmetic is arithmetic on columns. A cell without mass is no entry, whatever its token.

**Chain rule** (DESIGN.md 5.4). At a paired row both contexts end at byte a. The text goes on with the teacher's tokens
u0 u1 ... (log-probabilities known for each realised one) and with the student's token g, which ends at byte b. Let the
*cover* be the shortest run u0..un that reaches b, p0 the mass of u0 and J = p0 * P(u1) * ... * P(un) its joint
probability. Of p0 the map gave c to g and o to other student tokens (c + o <= p0). Then

    g gets     J           when the cover ends exactly at b, or u0 alone reaches past b (u0 begins with g; J = p0)
               max(c, J)   when the cover is longer than one token and passes b: J is then only a lower bound
               c           when the teacher's rows stop before b: nothing is known
    others get o * min(1, (p0 - g's share) / o), each in proportion

and what is left of p0 goes to the residual. No mass appears, none is negative, and only g can gain.

Example: the text goes on with "the"; the teacher says u0 = "th" with p0 = 0.5, then u1 = "e" with 0.8; the map sends
"th" to the student's "th". J = 0.4, so "the" gets 0.4 and "th" keeps min(1, 0.1 / 0.5) * 0.5 = 0.1.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmkt.prefixes import PrefixRelation

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.integer[Any]]
Words = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Table:
    """Tokens int32 and their mass, both [B, W]."""

    token: Ints
    mass: Floats


@dataclass(frozen=True, slots=True)
class MapTable:
    """A vocabulary map with m columns for every teacher id: ids int32 and weights float64, both [V_teacher, m]."""

    ids: Ints
    weights: Floats


@dataclass(frozen=True, slots=True)
class Realised:
    """What the text itself says at M paired rows.

    teacher_ids (u0), student_ids (g), first_mass (exp of u0's log-probability), later_mass (P(u1) * ... * P(un)),
    reached: the teacher's rows reach b; determined: J is g's exact share (see the module's text).
    """

    teacher_ids: Ints
    student_ids: Ints
    first_mass: Floats
    later_mass: Floats
    reached: Flags
    determined: Flags

    def take(self, rows: Longs) -> "Realised":
        return Realised(*(getattr(self, name)[rows] for name in self.__slots__))


# ------------------------------------------------------------------------------------------------ tables


def take_table(entry_splits: Ints, token_ids: Ints, logprobs: NDArray[np.float32], rows: Longs) -> Table:
    """The kept entries of `rows` as probabilities, tokens ascending; what exceeds 1 by rounding is scaled to 1."""
    starts = entry_splits[rows].astype(np.int64)
    counts = entry_splits[rows + 1] - starts
    columns = np.arange(counts.max())
    places = starts[:, None] + columns
    mass = logprobs.take(places, mode="clip").astype(np.float64)
    np.exp(mass, out=mass)
    if counts.min() < len(columns):
        mass *= columns < counts[:, None]
    total = mass.sum(axis=1)
    over = np.flatnonzero(total > 1.0)
    mass[over] /= total[over, None]
    return Table(token_ids.take(places, mode="clip"), mass)


def map_table(indptr: Ints, ids: Ints, weights: NDArray[np.float32]) -> MapTable:
    """A CSR map as a table; weight 0 beyond a row's end. A map has at most 4 ids a row (`fedmkt.vocab_map`)."""
    counts = np.diff(indptr)
    filled = np.arange(max(1, counts.max(initial=0))) < counts[:, None]
    table = MapTable(np.zeros(filled.shape, np.int32), np.zeros(filled.shape))
    table.ids[filled], table.weights[filled] = ids, weights
    return table


def sorted_rows(values: Numbers, below: int) -> tuple[Words, Words]:
    """Each row of `values` [B, W], integers in [0, below), in ascending order, and the columns that they come from."""
    columns = np.arange(values.shape[1], dtype=np.uint32)
    return sorted_pairs(values, columns, below, values.shape[1])


def sorted_pairs(first: Numbers, second: Numbers, first_below: int, second_below: int) -> tuple[Words, Words]:
    """Within each row, pairs of integers >= 0 by `first`, then by `second`: both [B, W] of one unsigned type.

    Both share a word, since sorting plain numbers is several times faster than an argsort, and most of all short rows
    of 32-bit words. The two bounds, as powers of two, must stay below 2^64 together.
    """
    bits = (second_below - 1).bit_length()
    kind = np.uint32 if first_below << bits <= 1 << 32 else np.uint64
    words: Words = first.astype(kind)
    words <<= kind(bits)
    words |= second.astype(kind)
    words.sort(axis=1)
    return words >> kind(bits), words & kind((1 << bits) - 1)


def flat(columns: Numbers, width: int) -> Longs:
    """The flat cells of a table of `width` columns that stand in these columns [B, n]."""
    return columns + np.arange(0, len(columns) * width, width)[:, None]


# ------------------------------------------------------------------------------------------------ where mass lands


def landed(
    entries: Table, table: MapTable, realised: Realised | None, own: Table | None, relation: PrefixRelation | None
) -> Table:
    """The teacher's mass on student tokens; a token may stand in several columns of a row.

    realised: of these rows, for the chain rule, None without it; own and relation: for prefix buckets, None without.
    Takes the mass of the realised teacher tokens out of `entries`.
    """
    if realised is None:
        return _spread(entries, table, own, relation)
    first = apply_chain_rule(entries, table, realised, own, relation)
    rest = _spread(entries, table, own, relation)
    shared = 0 if own is None else own.token.shape[1]  # both begin with the student's own tokens
    rest.mass[:, :shared] += first.mass[:, :shared]
    return _beside(rest, Table(first.token[:, shared:], first.mass[:, shared:]))


def _spread(entries: Table, table: MapTable, own: Table | None, relation: PrefixRelation | None) -> Table:
    """Columns of the student's own tokens, if any, then those of the map."""
    if own is None or relation is None:
        return through_map(entries, table)
    mass, filled = through_buckets(entries, own, relation)
    left = Table(entries.token, np.where(filled, 0.0, entries.mass))
    return _beside(Table(own.token, mass), through_map(left, table))


def _beside(left: Table, right: Table) -> Table:
    return Table(np.concatenate([left.token, right.token], axis=1), np.concatenate([left.mass, right.mass], axis=1))


def through_map(entries: Table, table: MapTable) -> Table:
    """Carry entries through a map of m columns: [B, W m], the m cells of an entry side by side."""
    height, width = entries.token.shape
    columns = table.ids.shape[1]
    mass = table.weights.take(entries.token, axis=0)
    mass *= entries.mass[:, :, None]
    ids = table.ids.take(entries.token, axis=0)
    return Table(ids.reshape(height, width * columns), mass.reshape(height, width * columns))


def through_buckets(entries: Table, own: Table, relation: PrefixRelation) -> tuple[Floats, Flags]:
    """Spread each entry u over the student's own entries that start with u, in proportion to their own mass.

    Returns what each of the student's own entries gains, float64 [B, W_own], and which of the teacher's found a bucket
    (the student keeps at least one token that starts with them), bool [B, W].
    """
    order, first, counts = (part.reshape(-1) for part in _runs(entries, own, relation))
    entry = np.repeat(np.arange(counts.size), counts)
    first -= np.cumsum(counts) - counts
    cells = order.take(np.arange(len(entry)) + first.take(entry))
    chances = own.mass.reshape(-1).take(cells)
    total = np.bincount(entry, chances, counts.size)
    filled: Flags = total > 0
    total[~filled] = 1.0
    chances *= (entries.mass.reshape(-1) / total).take(entry)
    gained = np.bincount(cells, chances, own.token.size).astype(np.float64)  # of integers where there is no hit
    return gained.reshape(own.token.shape), filled.reshape(entries.token.shape)


def _runs(entries: Table, own: Table, relation: PrefixRelation) -> tuple[Longs, Longs, Longs]:
    """Which of the student's own entries start with each of the teacher's.

    Returns the own entries' flat cells in byte order within each row, [B, W_own]; and of those that start with an
    entry, which stand side by side in that order, the place of the first and how many they are, both [B, W]. Own tokens
    and the bounds of these runs are sorted together, and how many own ones stand before a bound is sorted back.
    """
    width, kept = entries.token.shape[1], own.token.shape[1]
    places = relation.places.take(own.token)
    bounds = [relation.starts.take(entries.token), relation.stops.take(entries.token)]
    values = np.concatenate([places, *bounds], axis=1)
    values *= 2
    values[:, :kept] += 1  # a bound stands before the own token at the same place
    _, columns = sorted_rows(values, 2 * len(relation.places) + 2)
    passed = np.cumsum((columns < kept).astype(np.int32), axis=1, dtype=np.int32)
    _, before = sorted_pairs(columns, passed, values.shape[1], kept + 1)
    _, order = sorted_rows(places, len(relation.places))
    first, stop = before[:, kept : kept + width], before[:, kept + width :]
    return flat(order, kept), flat(first, kept), (stop - first).astype(np.int64)


def apply_chain_rule(
    entries: Table, table: MapTable, realised: Realised, own: Table | None, relation: PrefixRelation | None
) -> Table:
    """Where the mass of each row's realised teacher token lands, as the module's text says; `entries` lose that mass.

    Columns: the student's own tokens, if any, those of the map, and g.
    """
    is_first = (entries.token == realised.teacher_ids[:, None]) & (entries.mass > 0)
    tail = np.maximum(1.0 - entries.mass.sum(axis=1), 0.0)
    kept = entries.mass.sum(axis=1, where=is_first)
    entries.mass[is_first] = 0.0
    first = np.where(is_first.any(axis=1), kept, np.minimum(realised.first_mass, tail))

    given = _spread_first(Table(realised.teacher_ids[:, None], kept[:, None]), table, own, relation)
    on_gold = given.token == realised.student_ids[:, None]
    mapped, other = given.mass.sum(axis=1, where=on_gold), given.mass.sum(axis=1, where=~on_gold)
    joint = first * realised.later_mass
    share = np.where(realised.determined, joint, np.maximum(joint, mapped))
    share = np.where(realised.reached, share, mapped)
    room = np.maximum(first - share, 0.0)
    scale = np.where(realised.reached & (other > room), room / np.where(other > 0, other, 1.0), 1.0)
    others = Table(given.token, np.where(on_gold, 0.0, given.mass * scale[:, None]))
    return _beside(others, Table(realised.student_ids[:, None], share[:, None]))


def _spread_first(first: Table, table: MapTable, own: Table | None, relation: PrefixRelation | None) -> Table:
    """`_spread` for tables of one column, which need no sorting."""
    mapped = through_map(first, table)
    if own is None or relation is None:
        return mapped
    places = relation.places.take(own.token)
    chances = own.mass * ((places >= relation.starts[first.token]) & (places < relation.stops[first.token]))
    total = chances.sum(axis=1, keepdims=True)
    mapped.mass[total[:, 0] > 0] = 0.0
    chances *= first.mass / np.where(total > 0, total, 1.0)
    return _beside(Table(own.token, chances), mapped)


# ------------------------------------------------------------------------------------------------ what is kept


def summed(given: Table, vocabulary_size: int) -> Table:
    """Sum colliding mass: in each row tokens ascending, all of a token's mass in one cell, the others without any."""
    words, columns = sorted_rows(given.token, vocabulary_size)
    mass = given.mass.reshape(-1).take(flat(columns, given.token.shape[1]))
    again = np.zeros(words.shape, np.bool_)
    np.equal(words[:, 1:], words[:, :-1], out=again[:, 1:])
    repeats = np.flatnonzero(again)
    if len(repeats):
        cells = mass.reshape(-1)
        heads = np.flatnonzero(np.diff(repeats, prepend=-2) != 1)  # each run of repeats follows the cell it repeats
        cells[repeats[heads] - 1] += np.add.reduceat(cells[repeats], heads)
        cells[repeats] = 0.0
    return Table(words.astype(np.int32), mass)


def largest(given: Table, limit: int, always: Ints) -> Table:
    """Keep at most `limit` entries a row, the largest (ties: smaller id) and always the id in `always` [B].

    given: as `summed` gives it. The others lose their mass.
    """
    over = np.flatnonzero(np.count_nonzero(given.mass > 0, axis=1) > limit)
    if not len(over):
        return given
    weight = given.mass[over]
    weight[(given.token[over] == always[over, None]) & (weight > 0)] = np.inf
    smallest = np.partition(weight, -limit, axis=1)[:, -limit, None]
    above, ties = weight > smallest, weight == smallest
    ties &= np.cumsum(ties, axis=1) <= limit - np.count_nonzero(above, axis=1)[:, None]
    mass = given.mass.copy()
    mass[over] *= above | ties
    return Table(given.token, mass)
