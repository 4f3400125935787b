"""What a receiver asks of knowledge before it reads the rows: is it about this round, this slice, these texts?

Import from `fedmkt.knowledge`. Whether the rows tell the truth about the texts is `fedmkt.selection`'s business.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from fedmkt.codec import DEFAULT_LIMITS, Limits
from fedmkt.errors import Refusal
from fedmkt.knowledge_data import Knowledge, KnowledgeHeader, OffsetOutOfRange
from fedmkt.protocol import KnowledgeConfig
from fedmkt.public_set import PublicSet


class WrongFederation(Refusal):
    code: ClassVar[str] = "knowledge.wrong_federation"
    title: ClassVar[str] = "The knowledge belongs to another federation"
    remedy: ClassVar[str] = "One agent, one federation: check which state folder the agent was started with."


class WrongRound(Refusal):
    code: ClassVar[str] = "knowledge.wrong_round"
    title: ClassVar[str] = "The knowledge belongs to another round"
    remedy: ClassVar[str] = (
        "Nothing to do for an agent, which makes it anew; other clients ask for the open round first."
    )


class WrongPublicSet(Refusal):
    code: ClassVar[str] = "knowledge.wrong_public_set"
    title: ClassVar[str] = "The knowledge was made on another public set"
    remedy: ClassVar[str] = "Fetch the federation's public set again and make the knowledge on it."


class WrongVocabulary(Refusal):
    code: ClassVar[str] = "knowledge.wrong_vocabulary"
    title: ClassVar[str] = "The knowledge uses another vocabulary"
    remedy: ClassVar[str] = "Make it with the tokenizer that the site registered."


class WrongSettings(Refusal):
    code: ClassVar[str] = "knowledge.wrong_settings"
    title: ClassVar[str] = "The knowledge was made with other settings"


class SampleOutsideSlice(Refusal):
    code: ClassVar[str] = "knowledge.sample_outside_slice"
    title: ClassVar[str] = "The knowledge speaks of samples that the round does not use"
    remedy: ClassVar[str] = "Make knowledge of the samples of the round's slice alone."


_RULES: Mapping[str, tuple[type[Refusal], str]] = {
    "federation_id": (WrongFederation, "send it to the federation it was made for"),
    "round_number": (WrongRound, "make knowledge for the round that is open"),
    "slice_index": (WrongRound, "make knowledge on the slice of the open round"),
    "public_set_digest": (WrongPublicSet, "fetch the federation's public set again"),
    "vocabulary_fingerprint": (WrongVocabulary, "register the vocabulary in use"),
    "vocabulary_size": (WrongVocabulary, "drop ids beyond the tokenizer"),
    "top_p": (WrongSettings, "read the federation's configuration again"),
    "max_tokens": (WrongSettings, "read the federation's configuration again"),
}


def limits_for(public_set: PublicSet, settings: KnowledgeConfig) -> Limits:
    """What knowledge on this public set can need at most: bytes that announce more are refused before any memory is."""
    samples = min(DEFAULT_LIMITS.samples, len(public_set))
    rows = min(DEFAULT_LIMITS.rows, samples * settings.max_tokens)
    return Limits(samples=samples, rows=rows, entries=min(DEFAULT_LIMITS.entries, rows * settings.top_k))


def check_fields(header: KnowledgeHeader, **expected: object) -> None:
    """Refuses a header in which a named field differs; the message names both values and what to do."""
    for name, value in expected.items():
        refusal, remedy = _RULES[name]
        found = getattr(header, name)
        if found != value:
            raise refusal(f"{name} is {found!r}, expected {value!r}; {remedy}")


def check_header(
    header: KnowledgeHeader,
    *,
    federation_id: str,
    round_number: int,
    slice_index: int,
    public_set_digest: str,
    vocabulary_fingerprint: str,
    vocabulary_size: int,
    settings: KnowledgeConfig,
) -> None:
    """Refuses knowledge that answers another question than the receiver asked."""
    check_fields(
        header,
        federation_id=federation_id,
        round_number=round_number,
        slice_index=slice_index,
        public_set_digest=public_set_digest,
        vocabulary_fingerprint=vocabulary_fingerprint,
        vocabulary_size=vocabulary_size,
        top_p=settings.top_p,
        max_tokens=settings.max_tokens,
    )
    if header.top_k > settings.top_k:  # a site may share less than it is asked for
        raise WrongSettings(
            f"top_k is {header.top_k}, at most {settings.top_k} expected; read the federation's configuration again"
        )


def check_rows(knowledge: Knowledge, public_set: PublicSet, samples: Sequence[int]) -> None:
    """Refuses samples that are not in `samples` (indices into the public set) and contexts outside a response."""
    strangers = np.setdiff1d(knowledge.samples, np.asarray(samples, dtype=np.int64))
    if strangers.size:
        raise SampleOutsideSlice(
            f"public sample {strangers[0]} is not among the {len(samples)} of the slice ({strangers.size} such samples)"
        )
    taught = [public_set.samples[index] for index in knowledge.samples.tolist()]
    counts = np.diff(knowledge.row_splits)
    starts = np.repeat([sample.response_start for sample in taught], counts)
    lengths = np.repeat([len(sample.text.encode()) for sample in taught], counts)
    outside = (knowledge.context_ends < starts) | (knowledge.context_ends > lengths)
    if outside.any():
        row = int(np.argmax(outside))
        raise OffsetOutOfRange(
            f"{knowledge.place(row)}: its context ends at byte {knowledge.context_ends[row]}, the response is "
            f"bytes {starts[row]} to {lengths[row]} ({int(np.count_nonzero(outside))} such rows)"
        )


def check(
    knowledge: Knowledge,
    public_set: PublicSet,
    samples: Sequence[int],
    *,
    federation_id: str,
    round_number: int,
    slice_index: int,
    vocabulary_fingerprint: str,
    vocabulary_size: int,
    settings: KnowledgeConfig,
) -> None:
    """`check_header` and `check_rows`: the knowledge is about this round, this slice, this vocabulary, these texts."""
    check_header(
        knowledge.header,
        federation_id=federation_id,
        round_number=round_number,
        slice_index=slice_index,
        public_set_digest=public_set.digest,
        vocabulary_fingerprint=vocabulary_fingerprint,
        vocabulary_size=vocabulary_size,
        settings=settings,
    )
    check_rows(knowledge, public_set, samples)
