"""How the mass of one teacher row lands on student tokens: vocabulary map, prefix buckets, chain rule.

Legend: M paired rows of a chunk, E teacher entries in them, C contributions (row, student id, mass), float64
throughout. Nothing here knows of samples or texts; `fedmkt.alignment` pairs the rows.

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

import numpy as np
from numpy.typing import NDArray

from fedmkt.tokenized_set import take_rows

_SIEVE_BITS = 10  # of a token id: 16 times the entries of a row at k = 64

Floats = NDArray[np.float64]
Longs = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Entries:
    """E teacher entries of M rows: row [E] ascending, token [E] strictly ascending within a row, mass [E]."""

    row: Longs
    token: Longs
    mass: Floats


@dataclass(frozen=True, slots=True)
class Contributions:
    """C shares of mass: the row they go to, the student id, the mass, and the teacher entry they come from."""

    row: Longs
    id: Longs
    mass: Floats
    entry: Longs


@dataclass(frozen=True, slots=True)
class Realised:
    """What the text itself says at M paired rows.

    teacher_ids (u0), student_ids (g), first_mass (exp of u0's log-probability), later_mass (P(u1) * ... * P(un)),
    reached: the teacher's rows reach b; determined: J is g's exact share (see the module's text).
    """

    teacher_ids: Longs
    student_ids: Longs
    first_mass: Floats
    later_mass: Floats
    reached: Flags
    determined: Flags


def take_entries(
    entry_splits: NDArray[np.int32], token_ids: NDArray[np.int32], logprobs: NDArray[np.float32], rows: Longs
) -> Entries:
    """The kept entries of `rows` as probabilities; a row whose sum exceeds 1 by rounding is scaled to 1."""
    members, owners = take_rows(entry_splits, rows)
    mass = np.exp(logprobs[members].astype(np.float64))
    total = np.bincount(owners, mass, len(rows))
    return Entries(owners, token_ids[members].astype(np.int64), mass / np.maximum(total, 1.0)[owners])


def through_map(
    entries: Entries, chosen: Longs, indptr: NDArray[np.int32], ids: NDArray[np.int32], weights: NDArray[np.float32]
) -> Contributions:
    """Carry the entries at positions `chosen` through a CSR map; an entry with an empty map row contributes nothing."""
    members, owners = take_rows(indptr, entries.token[chosen])
    source = chosen[owners]
    mass = entries.mass[source] * weights[members].astype(np.float64)
    return Contributions(entries.row[source], ids[members].astype(np.int64), mass, source)


def through_buckets(
    entries: Entries,
    student: Entries,
    indptr: NDArray[np.int32],
    prefixes: NDArray[np.int32],
    teacher_vocabulary_size: int,
) -> tuple[Contributions, Flags]:
    """Spread each entry u over the student's kept entries that start with u, in proportion to their own mass.

    indptr, prefixes: CSR student id -> teacher ids whose bytes are a prefix of it. Returns the contributions and, bool
    [E], which entries found a bucket (the student keeps at least one token that starts with them).
    """
    members, owners = take_rows(indptr, student.token)
    rows, wanted = student.row[owners], prefixes[members]
    likely = _likely(entries, rows, wanted)
    owners = owners[likely]
    wanted = rows[likely] * teacher_vocabulary_size + wanted[likely]
    present = entries.row * teacher_vocabulary_size + entries.token
    found = np.searchsorted(present, wanted)
    hit = np.flatnonzero(present[np.minimum(found, len(present) - 1)] == wanted) if len(present) else found[:0]
    entry, own = found[hit], owners[hit]
    total = np.bincount(entry, student.mass[own], len(entries.token))
    filled = total > 0
    share = student.mass[own] / np.where(filled, total, 1.0)[entry]
    return Contributions(entries.row[entry], student.token[own], entries.mass[entry] * share, entry), filled


def _likely(entries: Entries, rows: Longs, tokens: NDArray[np.int32]) -> Longs:
    """Positions of the pairs (row, token) that may be among the entries; most of the others are sieved out.

    By a table of a row's token ids modulo its width, which stays in cache; nine tenths need no search after it.
    """
    height = 1 + max(int(entries.row.max(initial=-1)), int(rows.max(initial=-1)))
    seen = np.zeros(height << _SIEVE_BITS, dtype=bool)
    last = (1 << _SIEVE_BITS) - 1
    seen[(entries.row << _SIEVE_BITS) | (entries.token & last)] = True
    return np.flatnonzero(seen[(rows << _SIEVE_BITS) | (tokens & last)])


def joined(first: Contributions, second: Contributions) -> Contributions:
    return Contributions(
        np.concatenate([first.row, second.row]),
        np.concatenate([first.id, second.id]),
        np.concatenate([first.mass, second.mass]),
        np.concatenate([first.entry, second.entry]),
    )


def apply_chain_rule(given: Contributions, entries: Entries, realised: Realised) -> Contributions:
    """Move the mass of each row's realised teacher token as the module's text says."""
    rows = len(realised.student_ids)
    gold_entry = entries.token == realised.teacher_ids[entries.row]
    of_gold = gold_entry[given.entry]
    on_gold = given.id == realised.student_ids[given.row]
    kept = np.bincount(entries.row[gold_entry], entries.mass[gold_entry], rows)
    cut = np.bincount(entries.row[gold_entry], minlength=rows) == 0
    tail = np.maximum(1.0 - np.bincount(entries.row, entries.mass, rows), 0.0)
    first = np.where(cut, np.minimum(realised.first_mass, tail), kept)

    there, elsewhere = of_gold & on_gold, of_gold & ~on_gold
    mapped = np.bincount(given.row[there], given.mass[there], rows)
    other = np.bincount(given.row[elsewhere], given.mass[elsewhere], rows)
    joint = first * realised.later_mass
    share = np.where(realised.determined, joint, np.maximum(joint, mapped))
    share = np.where(realised.reached, share, mapped)
    room = np.maximum(first - share, 0.0)
    scale = np.where(realised.reached & (other > room), room / np.where(other > 0, other, 1.0), 1.0)

    mass = np.where(elsewhere, given.mass * scale[given.row], given.mass)
    stay, gain = ~there & (mass > 0), np.flatnonzero(share > 0)
    rest = Contributions(given.row[stay], given.id[stay], mass[stay], given.entry[stay])
    return joined(rest, Contributions(gain, realised.student_ids[gain], share[gain], np.full(len(gain), -1)))


def summed(given: Contributions, rows: int, student_vocabulary_size: int) -> tuple[Longs, Longs, Floats]:
    """Sum colliding mass. Returns counts int64 [M], and ids and masses by row, ids strictly ascending within a row.

    M * V * 2C must stay below 2^63: 1024 rows, the largest vocabulary and 2^31 contributions do.
    """
    keys = given.row * student_vocabulary_size + given.id
    bits = len(
        keys
    ).bit_length()  # each key with its place below it: sorting numbers is faster than argsort, and stable
    packed = np.sort((keys << bits) | np.arange(len(keys)))
    keys, order = packed >> bits, packed & ((1 << bits) - 1)
    heads = np.flatnonzero(np.concatenate([np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]]))
    mass = np.add.reduceat(given.mass[order], heads) if len(heads) else np.zeros(0)
    row, ids = np.divmod(keys[heads], student_vocabulary_size)
    return np.bincount(row, minlength=rows), ids, mass


def largest(counts: Longs, ids: Longs, mass: Floats, limit: int, always: Longs) -> tuple[Longs, Longs, Floats]:
    """Keep at most `limit` entries a row, the largest (ties: smaller id) and always the id in `always` [M]."""
    if not len(counts) or counts.max() <= limit:
        return counts, ids, mass
    row = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((ids, np.where(ids == always[row], -np.inf, -mass), row))
    starts = np.cumsum(counts) - counts
    keep = np.zeros(len(ids), bool)
    keep[order] = np.arange(len(ids)) - starts[row] < limit  # `row` is the same in sorted order: rows stay together
    return np.bincount(row[keep], minlength=len(counts)), ids[keep], mass[keep]
