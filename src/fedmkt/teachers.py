"""From what another party sent to a `Teacher`: knowledge, vocabulary and map, each held against what was announced."""

from collections.abc import Callable

from fedmkt.errors import Refusal
from fedmkt.knowledge import check, decode, limits_for
from fedmkt.lesson import Teacher
from fedmkt.protocol import DistillationConfig, MapMethod
from fedmkt.round_plan import RoundPlan
from fedmkt.vocab_map import VocabMap
from fedmkt.vocabulary import Vocabulary


class OtherVocabulary(Refusal):
    status = 409
    code = "vocabulary.wrong_fingerprint"
    title = "The vocabulary is not the one that was announced"
    remedy = "Install the same versions of fedmkt and tokenizers on both sides."


class MapMissing(Refusal):
    status = 502
    code = "vocab_map.missing"
    title = "A vocabulary map is missing"
    remedy = "Run coordinator, LLM server and agents in one version."


def needed_map(config: DistillationConfig, maps: dict[MapMethod, str]) -> str:
    """The artifact of the map that this federation needs."""
    method = config.map_method
    if method not in maps:
        raise MapMissing(f"maps {sorted(maps)} are named, {method!r} is needed: has the coordinator another version?")
    return maps[method]


def read_vocabulary(
    data: bytes, fingerprint: str, read: Callable[[bytes], Vocabulary] = Vocabulary.from_bytes
) -> Vocabulary:
    """A vocabulary artifact, which must have the announced fingerprint; `read` may be a `VocabularyProcess`'s."""
    vocabulary = read(data)
    if vocabulary.fingerprint != fingerprint:
        raise OtherVocabulary(
            f"the artifact's vocabulary has fingerprint {vocabulary.fingerprint[:12]}..., {fingerprint[:12]}... was "
            "announced: run the same fedmkt and tokenizers versions everywhere"
        )
    return vocabulary


def read_teacher(name: str, plan: RoundPlan, *, knowledge: bytes, vocabulary: Vocabulary, vocab_map: bytes) -> Teacher:
    """A teacher for this round. Raises the Refusals of knowledge and map; nothing in either is trusted.

    `vocabulary` comes from `read_vocabulary`, so that a caller may keep it. That the map fits both vocabularies is
    checked by `prepare_lesson`.
    """
    sent = decode(knowledge, limits=limits_for(plan.public_set, plan.config.knowledge))
    check(
        sent,
        plan.public_set,
        plan.samples,
        federation_id=plan.federation_id,
        round_number=plan.round_number,
        slice_index=plan.slice_index,
        vocabulary_fingerprint=vocabulary.fingerprint,
        vocabulary_size=vocabulary.size,
        settings=plan.config.knowledge,
    )
    return Teacher(name, sent, vocabulary, VocabMap.from_bytes(vocab_map))
