"""What is fuzzed: every reader of another party's bytes, its valid inputs, and what must hold of what it accepts.

A target's `run` lets a Refusal pass and nothing else; the fuzzer reports every other exception, a hang, and memory over
the bound.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import small_tokenizers as small
from fedmkt.codec import Limits
from fedmkt.errors import Refusal
from fedmkt.knowledge import decode, encode
from fedmkt.public_set import PublicSet
from fedmkt.vocab_map import VocabMap, build_vocab_map
from fedmkt.vocabulary import Vocabulary
from fuzz import mutations
from random_knowledge import random_knowledge

LIMITS = Limits(blob_bytes=1 << 20, samples=1 << 12, rows=1 << 14, entries=1 << 18)

Mutate = Callable[[bytes, random.Random, mutations.Inner], bytes]


@dataclass(frozen=True)
class Target:
    """`run` says whether the input was accepted; `memory_mib`: what one input may add to the process's memory."""

    name: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes], bool]
    mutate: Mutate
    memory_mib: int


def _decode_knowledge(data: bytes) -> bool:
    try:
        found = decode(data, limits=LIMITS)
    except Refusal:
        return False
    again = decode(encode(found), limits=LIMITS)
    assert again.header == found.header
    for column in ("samples", "row_splits", "context_ends", "entry_splits", "token_ids", "logprobs", "gold_logprobs"):
        assert np.array_equal(getattr(again, column), getattr(found, column)), column
    return True


def _knowledge_seeds() -> list[bytes]:
    shapes = [(1, 1, 4, 1), (2, 3, 70_000, 4), (3, 8, 512, 16), (1, 2, 1 << 20, 64), (3, 8, 80, 40)]  # the last refers
    return [
        encode(random_knowledge(seed, samples=samples, rows_per_sample=rows, vocabulary_size=size, top_k=top_k))
        for seed, (samples, rows, size, top_k) in enumerate(shapes)
    ]


def _read_map(data: bytes) -> bool:
    try:
        found = VocabMap.from_bytes(data)
    except Refusal:
        return False
    assert len(found.best_ids) == len(found.indptr) - 1 == len(found.distances)
    again = VocabMap.from_bytes(found.to_bytes())
    assert np.array_equal(again.best_ids, found.best_ids)
    return True


def _map_seeds() -> list[bytes]:
    pairs = [("word_piece", "byte_level_small"), ("byte_level_small", "sentencepiece")]
    return [
        build_vocab_map(small.vocabulary(teacher), small.vocabulary(student), method).to_bytes()
        for teacher, student in pairs
        for method in ("mined", "retokenized")
    ]


def _read_vocabulary(data: bytes) -> bool:
    try:
        found = Vocabulary.from_bytes(data)
        encoded = found.encode("Où est l'été?  x = 12\n<s> 日本 😀", add_eos=True)
    except Refusal:
        return False
    assert len(encoded.ids) == len(encoded.ends)
    assert (np.diff(encoded.ends) >= 0).all()
    assert Vocabulary.from_bytes(found.to_bytes()) == found
    return True


def _vocabulary_seeds() -> list[bytes]:
    tokenizers = [
        small.byte_level(300, 500),
        small.word_table({"a": 0, "Ġb": 1}),
        small.sentencepiece_bpe(100, 300),
        small.unigram(60, 300),
        small.word_piece(60, 300),
    ]
    return [Vocabulary.from_tokenizer(tokenizer).to_bytes() for tokenizer in tokenizers]


def _read_public_set(data: bytes) -> bool:
    try:
        found = PublicSet.from_jsonl(data)
    except Refusal:
        return False
    again = PublicSet.from_jsonl(found.to_jsonl())
    assert again.samples == found.samples
    assert again.digest == found.digest
    return True


def _public_set_seeds() -> list[bytes]:
    chat = [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là 日本 {role}"}]
    rows = [{"id": "a", "prompt": "p ", "completion": "é"}, {"text": "t", "domain": "d"}, {"id": 7, "messages": chat}]
    return [b"\n".join(json.dumps(row).encode() for row in rows), *(json.dumps(row).encode() for row in rows)]


TARGETS = {
    target.name: target
    for target in (
        Target("knowledge", _knowledge_seeds, _decode_knowledge, mutations.knowledge, 96),
        Target("vocab_map", _map_seeds, _read_map, mutations.vocab_map, 96),
        Target("vocabulary", _vocabulary_seeds, _read_vocabulary, mutations.json_line, 512),
        Target("public_set", _public_set_seeds, _read_public_set, mutations.json_line, 96),
    )
}
