"""What knowledge says, in words: for people who decide whether it may leave their site.

Legend: S samples, R rows, N kept entries.
"""

import hashlib
from dataclasses import asdict, dataclass

import numpy as np

from fedmkt.knowledge import Knowledge, KnowledgeHeader, decode
from fedmkt.public_set import PublicSet
from fedmkt.vocabulary import Vocabulary

CONTAINED = (
    "of each public sample: its number in the public set, never its text",
    "of each row: where in that text it stands, and the log-probability of the token that comes next there",
    "of each row: the ids of the most likely next tokens, and their log-probabilities on an 8-bit scale",
    "once: federation, round, public set, vocabulary fingerprint, model name, adapter version, top_k, top_p",
)
NOT_CONTAINED = (
    "private text, file names and paths, names or numbers of private samples",
    "weights, gradients, optimizer state",
    "probabilities of tokens that were cut; only their sum follows",
)
CAUTION = (
    "The probabilities come from a model that was trained on private text: what it has memorised can show in them. "
    "A smaller top_k and rounding make less of it visible and guarantee nothing."
)


@dataclass(frozen=True, slots=True)
class Guess:
    """One kept token: its text (JSON-escaped bytes where they are no UTF-8), and its probability."""

    token: str
    probability: float


@dataclass(frozen=True, slots=True)
class RowView:
    """`next_probability`: of the token that the public text really goes on with."""

    after: str
    next_probability: float
    guesses: tuple[Guess, ...]


@dataclass(frozen=True, slots=True)
class SampleView:
    number: int
    sample_id: str | None
    rows: int
    shown: tuple[RowView, ...]


@dataclass(frozen=True, slots=True)
class KnowledgeView:
    """Of one blob. `entries_a_row`: least, mean, most."""

    bytes: int
    digest: str
    header: KnowledgeHeader
    samples: int
    rows: int
    entries: int
    entries_a_row: tuple[int, float, int]
    contained: tuple[str, ...]
    not_contained: tuple[str, ...]
    shown: tuple[SampleView, ...]

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def view(
    blob: bytes,
    *,
    vocabulary: Vocabulary | None = None,
    public_set: PublicSet | None = None,
    samples: int = 3,
    rows: int = 5,
    entries: int = 5,
) -> KnowledgeView:
    """The first `samples` samples, `rows` rows of each and `entries` tokens of each row. Without a vocabulary tokens
    are shown as ids, without the public set contexts as byte offsets. Raises the Refusals of `fedmkt.knowledge`.
    """
    knowledge = decode(blob)
    counts = np.diff(knowledge.entry_splits)
    shown = [
        _sample(knowledge, position, vocabulary, public_set, rows, entries)
        for position in range(min(samples, knowledge.samples.size))
    ]
    return KnowledgeView(
        bytes=len(blob),
        digest=hashlib.sha256(blob).hexdigest(),
        header=knowledge.header,
        samples=int(knowledge.samples.size),
        rows=knowledge.rows,
        entries=knowledge.entries,
        entries_a_row=(int(counts.min()), round(float(counts.mean()), 1), int(counts.max())),
        contained=CONTAINED,
        not_contained=NOT_CONTAINED,
        shown=tuple(shown),
    )


def _sample(
    knowledge: Knowledge,
    position: int,
    vocabulary: Vocabulary | None,
    public_set: PublicSet | None,
    rows: int,
    entries: int,
) -> SampleView:
    start, stop = map(int, knowledge.row_splits[position : position + 2])
    number = int(knowledge.samples[position])
    sample = public_set.samples[number] if public_set is not None and number < len(public_set) else None
    text = None if sample is None else sample.text.encode()
    return SampleView(
        number=number,
        sample_id=None if sample is None else sample.id,
        rows=stop - start,
        shown=tuple(_row(knowledge, row, vocabulary, text, entries) for row in range(start, min(stop, start + rows))),
    )


def _row(knowledge: Knowledge, row: int, vocabulary: Vocabulary | None, text: bytes | None, entries: int) -> RowView:
    first, last = map(int, knowledge.entry_splits[row : row + 2])
    ends = int(knowledge.context_ends[row])
    order = np.argsort(-knowledge.logprobs[first:last], kind="stable")[:entries] + first
    return RowView(
        after=f"byte {ends}" if text is None else text[max(0, ends - 40) : ends].decode("utf-8", "replace"),
        next_probability=_probability(float(knowledge.gold_logprobs[row])),
        guesses=tuple(
            Guess(_token(vocabulary, int(knowledge.token_ids[at])), _probability(float(knowledge.logprobs[at])))
            for at in order
        ),
    )


def _probability(logprob: float) -> float:
    return round(float(np.exp(logprob)), 4)


def _token(vocabulary: Vocabulary | None, token_id: int) -> str:
    if vocabulary is None or token_id >= vocabulary.size:
        return f"#{token_id}"
    if token_id in vocabulary.roles:
        return f"<{vocabulary.roles[token_id]}>"
    return vocabulary.tokens[token_id].decode("utf-8", "backslashreplace") or f"#{token_id}"
