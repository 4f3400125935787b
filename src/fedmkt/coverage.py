"""How much of a teacher's vocabulary a map carries: by number of ids, by class of token, by probability mass."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmkt.edit_distance import token_text
from fedmkt.edit_index import code_points, text_lengths
from fedmkt.protocol import Count
from fedmkt.vocabulary import Vocabulary

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
CLASSES = ("digits", "punctuation", "non_latin", "words", "bytes", "special", "other")

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_LATIN_ENDS = 0x24F  # Basic Latin to Latin Extended-B
_LATIN_ADDITIONAL = range(0x1E00, 0x1F00)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Of `ids` teacher ids, `exact` go to a student id with the same bytes (or role), `unmapped` to none."""

    ids: Count
    exact: Count
    unmapped: Count

    @property
    def exact_share(self) -> float:
        """0 when there are no ids."""
        return self.exact / self.ids if self.ids else 0.0

    @property
    def unmapped_share(self) -> float:
        """0 when there are no ids."""
        return self.unmapped / self.ids if self.ids else 0.0


@dataclass(frozen=True, slots=True)
class CoverageAudit:
    """A map's coverage of the whole vocabulary without its holes, of each of CLASSES, and of probability mass.

    Every id counts in one class. `exact_mass` and `unmapped_mass` are shares of the mass of given token frequencies,
    None without them.
    """

    total: Coverage
    classes: Mapping[str, Coverage]
    exact_mass: Share | None = None
    unmapped_mass: Share | None = None


def token_classes(tokens: Sequence[bytes]) -> NDArray[np.int8]:
    """The class of each ordinary token, whether or not a space begins it, as a place in CLASSES: int8 [tokens].

    digits: decimal digits of any script; punctuation: neither letters, digits nor spaces; non_latin: a letter outside
    the Latin script is in it; words: a space, then Latin letters; bytes: part of a character; other: the rest.
    """
    texts = list(map(token_text, tokens))
    lengths = text_lengths(texts)
    traits = _traits(code_points(texts))
    starts = np.cumsum(lengths) - lengths
    spaced = (traits[starts] & _SPACE > 0) & (lengths > 0)
    bounds = np.stack([starts + spaced, starts + lengths], axis=1).ravel()  # of each body, which may be empty
    every, some = (np.where(lengths > spaced, pick.reduceat(traits, bounds)[::2], 0) for pick in _PICKS)
    conditions = {
        "bytes": some & _PART > 0,
        "digits": every & _DECIMAL > 0,
        "punctuation": every & _SIGN > 0,
        "non_latin": some & _FOREIGN > 0,
        "words": spaced & (every & _LETTER > 0),
    }
    return np.select(list(conditions.values()), [*map(CLASSES.index, conditions)], CLASSES.index("other")).astype(
        np.int8
    )


def token_class(token: bytes) -> str:
    """The class of one ordinary token."""
    return CLASSES[token_classes([token])[0]]


_PART, _DECIMAL, _SIGN, _FOREIGN, _LETTER, _SPACE = (1 << bit for bit in range(6))
_PICKS = np.bitwise_and, np.bitwise_or


def _traits(points: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """What each code point is, as bits; one 0 more, so that every end of a token is a place in it."""
    present = np.zeros(0x110000, bool)
    present[points] = True
    table = np.zeros(0x110000, np.uint8)
    known = np.flatnonzero(present).tolist()
    table[known] = [_character_traits(chr(code)) for code in known]
    return np.append(table[points], np.uint8(0))


def _character_traits(character: str) -> int:
    if "\ud800" <= character <= "\udfff":  # how `token_text` writes a byte that is no text
        return _PART
    traits = _DECIMAL if character.isdecimal() else _SIGN if _PUNCTUATION.fullmatch(character) else 0
    traits |= _LETTER if character.isalpha() else _SPACE if character.isspace() else 0
    return traits | (_FOREIGN if _is_non_latin(character) else 0)


def _is_non_latin(character: str) -> bool:
    code = ord(character)
    return code > _LATIN_ENDS and code not in _LATIN_ADDITIONAL and character.isalpha()


def audit_coverage(
    teacher: Vocabulary,
    exact: NDArray[np.bool_],
    mapped: NDArray[np.bool_],
    frequencies: NDArray[np.floating] | None = None,
) -> CoverageAudit:
    """Audit a map from its rows: `exact` bool [V] and `mapped` bool [V], by teacher id.

    `frequencies` [V] >= 0: counts or probabilities of teacher ids in some text; a sum of 0 leaves the mass unknown.
    """
    special = np.zeros(teacher.size, bool)
    special[list(teacher.roles)] = True
    kinds = np.where(special, CLASSES.index("special"), token_classes(teacher.tokens))
    present = special | (teacher.byte_lengths > 0)  # the others are holes: no model ever emits them
    ids, exacts, unmapped = (
        np.bincount(kinds[chosen], minlength=len(CLASSES)).tolist()
        for chosen in (present, present & exact, present & ~mapped)
    )
    classes = {kind: Coverage(*counts) for kind, *counts in zip(CLASSES, ids, exacts, unmapped, strict=True)}
    total = Coverage(sum(ids), sum(exacts), sum(unmapped))
    mass = 0.0 if frequencies is None else float(frequencies.sum(dtype=np.float64))
    if frequencies is None or mass <= 0:
        return CoverageAudit(total, classes)
    shares = [float(frequencies[rows].sum(dtype=np.float64)) / mass for rows in (exact, ~mapped)]
    return CoverageAudit(total, classes, *shares)
