"""How much of a teacher's vocabulary a map carries: by number of ids, by class of token, by probability mass."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedmkt.protocol import Count
from fedmkt.vocabulary import Vocabulary

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
CLASSES = ("digits", "punctuation", "non_latin", "words", "bytes", "special", "other")

_PUNCTUATION = re.compile(r"(?:[^\w\s]|_)+")
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


def token_class(token: bytes) -> str:
    """The class of an ordinary token, whether or not a space begins it.

    digits: decimal digits of any script; punctuation: neither letters, digits nor spaces; non_latin: a letter outside
    the Latin script is in it; words: a space, then Latin letters; bytes: part of a character; other: the rest.
    """
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "bytes"
    body = text[1:] if text[:1].isspace() else text
    if body.isdecimal():
        return "digits"
    if _PUNCTUATION.fullmatch(body):
        return "punctuation"
    if not body.isascii() and any(map(_is_non_latin, body)):
        return "non_latin"
    return "words" if body.isalpha() and len(body) < len(text) else "other"


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
    ids: Counter[str] = Counter()
    exacts: Counter[str] = Counter()
    unmapped: Counter[str] = Counter()
    for index, token in enumerate(teacher.tokens):
        if not token and index not in teacher.roles:
            continue  # a hole: no model ever emits it
        kind = token_class(token) if token else "special"
        ids[kind] += 1
        exacts[kind] += bool(exact[index])
        unmapped[kind] += not mapped[index]
    classes = {kind: Coverage(ids[kind], exacts[kind], unmapped[kind]) for kind in CLASSES}
    total = Coverage(ids.total(), exacts.total(), unmapped.total())
    mass = 0.0 if frequencies is None else float(frequencies.sum(dtype=np.float64))
    if frequencies is None or mass <= 0:
        return CoverageAudit(total, classes)
    shares = [float(frequencies[rows].sum(dtype=np.float64)) / mass for rows in (exact, ~mapped)]
    return CoverageAudit(total, classes, *shares)
