"""What maps and alignment carry between every pair of the real tokenizers: `python -m benchmarks.coverage`.

Rewrites the coverage table of docs/benchmarks.md. Without the data folder there is nothing to do.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import data
from benchmarks.harness import generated_part
from fedmkt.alignment import TokenizedSet, align_set, gold_transfer, tokenize_set
from fedmkt.coverage import CoverageAudit
from fedmkt.public_set import PublicSet
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import Vocabulary

CHARACTERS = 60_000
MAX_TOKENS = 1 << 20  # nothing is cut
MUST_REACH = 0.97  # gold transfer of the chain rule on every exact pair


@dataclass(frozen=True)
class Side:
    """A tokenizer and the text in its tokens. `exact`: every text comes back byte for byte."""

    name: str
    vocabulary: Vocabulary
    rows: TokenizedSet
    exact: bool


@dataclass(frozen=True)
class Carried:
    """One line of the table; shares between 0 and 1."""

    teacher: Side
    student: Side
    supervised: float
    audit: CoverageAudit
    mined: float
    retokenized: float
    chained: float

    @property
    def exact(self) -> bool:
        return self.teacher.exact and self.student.exact


def load_side(folder: Path, text: PublicSet) -> Side:
    vocabulary = Vocabulary.from_tokenizer(folder)
    encodings = vocabulary.encode_batch([sample.text for sample in text.samples])
    exact = all(encoding.exact for encoding in encodings)
    return Side(folder.name, vocabulary, tokenize_set(vocabulary, text, range(len(text)), MAX_TOKENS), exact)


def carry(teacher: Side, student: Side) -> Carried:
    frequencies = np.bincount(teacher.rows.gold_ids, minlength=teacher.vocabulary.size).astype(np.float64)
    pair, rows = (teacher.vocabulary, student.vocabulary), (teacher.rows, student.rows)
    mined = build_vocab_map(*pair, "mined")
    retokenized = build_vocab_map(*pair, "retokenized", frequencies=frequencies)
    assert retokenized.audit is not None
    return Carried(
        teacher,
        student,
        supervised=float(np.mean(align_set(*rows) >= 0)),
        audit=retokenized.audit,
        mined=gold_transfer(*rows, mined, chain_rule=False),
        retokenized=gold_transfer(*rows, retokenized, chain_rule=False),
        chained=gold_transfer(*rows, retokenized, chain_rule=True),
    )


HEADINGS = (
    *("teacher -> student", "rows", "ids", "mass", "digits", "punctuation", "non-Latin"),
    *("mined", "retokenized", "+ chain rule", "exact"),
)


def table(lines: Sequence[Carried]) -> Iterator[str]:
    """Markdown."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---" + "|--:" * (len(HEADINGS) - 2) + "|---|"
    for line in lines:
        audit = line.audit
        kinds = [audit.total, *(audit.classes[kind] for kind in ("digits", "punctuation", "non_latin"))]
        ids, *classes = ["" if not kind.ids else f"{100 * kind.exact_share:.1f} %" for kind in kinds]
        shares = [f"{100 * line.supervised:.1f} %", ids, f"{100 * (audit.exact_mass or 0):.1f} %", *classes]
        transfers = [f"{value:.3f}" for value in (line.mined, line.retokenized, line.chained)]
        names = f"{line.teacher.name} -> {line.student.name}"
        yield f"| {' | '.join([names, *shares, *transfers, 'yes' if line.exact else 'no'])} |"


def summary(lines: Sequence[Carried], text: PublicSet) -> Iterator[str]:
    """What the table shows, in a few sentences."""
    exact = [line for line in lines if line.exact]
    lossy = sorted({side.name for line in lines for side in (line.teacher, line.student) if not side.exact})
    size = sum(len(sample.text.encode()) for sample in text.samples)
    yield f"{size:,} bytes of real text from six sources ({', '.join(data.TEXTS)}, text/grimms_fairy_tales)."
    if lossy:
        yield f"Not byte-exact on it: {', '.join(lossy)}."
    if not exact:
        return
    yield _transfer("`mined`", exact, [line.mined for line in exact])
    yield _transfer("`retokenized`", exact, [line.retokenized for line in exact])
    chained = [line.chained for line in exact]
    yield _transfer("`retokenized` with the chain rule", exact, chained)
    below = sum(value < MUST_REACH for value in chained)
    yield f"Exact pairs below {MUST_REACH} with the chain rule: {below} of {len(exact)}."


def _transfer(what: str, lines: Sequence[Carried], values: Sequence[float]) -> str:
    worst = lines[int(np.argmin(values))]
    return (
        f"Gold transfer of {what} over the {len(lines)} exact pairs: least {min(values):.3f} "
        f"({worst.teacher.name} -> {worst.student.name}), median {np.median(values):.3f}."
    )


def main() -> None:
    folder = data.data_folder()
    if folder is None:
        print("coverage: no real tokenizers here (FEDMKT_DATA_DIR), the table stays as it is")
        return
    text = data.public_set(CHARACTERS)
    sides = [load_side(place, text) for place in sorted((folder / "tokenizers").iterdir()) if place.is_dir()]
    pairs = list(itertools.permutations(sides, 2))
    lines = []
    for number, (teacher, student) in enumerate(pairs, start=1):
        lines.append(carry(teacher, student))
        print(f"coverage: {number} of {len(pairs)}: {teacher.name} -> {student.name}: {lines[-1].chained:.3f}")
    with generated_part("coverage") as document:
        document += [*summary(lines, text), "", *table(lines)]


if __name__ == "__main__":
    main()
