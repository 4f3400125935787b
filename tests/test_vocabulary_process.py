"""Vocabularies of other parties in a process of their own: the same answers, and a refusal where the process ends."""

import base64
import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped] # its stubs are another package
import pytest

import small_tokenizers as small
from fedmkt.cutting_speed import SlowTokenizer
from fedmkt.public_set import PublicSet
from fedmkt.tokenized_set import tokenize_set
from fedmkt.vocab_map import build_vocab_map
from fedmkt.vocabulary import MalformedVocabulary, Vocabulary
from fedmkt.vocabulary_process import KEPT, Bounds, FatalVocabulary, VocabularyProcess

NAMES = ("byte_level", "byte_level_small", "sentencepiece", "word_piece")
TEXTS = ["", "a", "The cat sat on the mat.", "naïve café, 日本語\n\n  tabs\t", "😀" * 50, "</s> <|endoftext|>"]


@pytest.fixture
def process() -> Iterator[VocabularyProcess]:
    with VocabularyProcess(Bounds(cpu_s=20)) as opened:
        yield opened


def artifact(**parts: Any) -> bytes:
    """A sound vocabulary, but for these parts of its tokenizer.json."""
    content = json.loads(small.vocabulary("byte_level").to_bytes())
    content["tokenizer"].update(parts)
    return json.dumps(content).encode()


def splitting(expression: str) -> bytes:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return artifact(pre_tokenizer=split)


def child_of(process: VocabularyProcess) -> "psutil.Process":
    assert process._child is not None
    return psutil.Process(process._child.pid)


# A table of normalizations, compiled, whose sizes are the largest that fit: the library ends the process over it.
ABORTING = artifact(normalizer={"type": "Precompiled", "precompiled_charsmap": base64.b64encode(b"\xff" * 13).decode()})
# Quick on everything but what follows its first word, where each attempt costs the square of what is left of the text.
HANGING = splitting(r"the[\s\S]*[\s\S]*[^\s\S]|[\s\S]")
MADE_FOR_IT = ["the " * 1000] * 200


# ------------------------------------------------------------------------------------------------ the same answers


@pytest.mark.parametrize("name", NAMES)
def test_a_vocabulary_read_apart_is_the_same_vocabulary(process: VocabularyProcess, name: str) -> None:
    here = Vocabulary.from_bytes(small.vocabulary(name).to_bytes())
    apart = process.read(here.to_bytes())
    for what in ("tokens", "roles", "bos_id", "eos_id", "fingerprint"):
        assert getattr(apart, what) == getattr(here, what), what
    assert apart.to_bytes() == here.to_bytes()
    for options in ({}, {"add_bos": False}, {"add_eos": True, "max_tokens": 7}):
        for ours, theirs in zip(here.encode_batch(TEXTS, **options), apart.encode_batch(TEXTS, **options), strict=True):
            assert (ours.ids.tolist(), ours.ends.tolist()) == (theirs.ids.tolist(), theirs.ends.tolist())
            assert (ours.exact, theirs.ids.dtype, theirs.ends.dtype) == (theirs.exact, np.int32, np.int32)
    assert apart.encode_batch([]) == []


def test_rows_and_maps_come_out_the_same(process: VocabularyProcess) -> None:
    lines = [json.dumps({"id": str(n), "prompt": f"{n} and {n}", "completion": f" are {2 * n}."}) for n in range(20)]
    public_set = PublicSet.from_jsonl("\n".join(lines).encode())
    here = [small.vocabulary(name) for name in ("sentencepiece", "byte_level")]
    apart = [process.read(each.to_bytes()) for each in here]
    ours, theirs = (tokenize_set(each[0], public_set, range(20), 64) for each in (here, apart))
    for column in ("row_splits", "context_ends", "gold_ids", "gold_ends", "response_bytes"):
        assert np.array_equal(getattr(ours, column), getattr(theirs, column)), column
    for method in ("mined", "retokenized"):
        assert build_vocab_map(*apart, method).to_bytes() == build_vocab_map(*here, method).to_bytes()  # type: ignore[arg-type]


def test_refusals_are_those_of_reading_it_here(process: VocabularyProcess) -> None:
    with pytest.raises(MalformedVocabulary, match="not JSON"):
        process.read(b"{")
    with pytest.raises(MalformedVocabulary, match=f"{(64 << 20) + 1} bytes, at most {64 << 20} expected"):
        process.read(bytes((64 << 20) + 1))
    with pytest.raises(SlowTokenizer, match="processor time"):
        process.read(splitting("a*a*a*b|."))
    first = child_of(process)
    assert process.read(artifact()).size == small.vocabulary("byte_level").size
    assert child_of(process) == first, "a refusal costs no process"


def test_a_child_that_has_dropped_a_vocabulary_gets_it_again(process: VocabularyProcess) -> None:
    first = process.read(small.vocabulary("byte_level").to_bytes())
    for number in range(KEPT):
        process.read(splitting(f"[{number}]"))
    assert first.encode("again").ids.tolist() == small.vocabulary("byte_level").encode("again").ids.tolist()


def test_several_threads_get_their_own_answers(process: VocabularyProcess) -> None:
    apart = {name: process.read(small.vocabulary(name).to_bytes()) for name in NAMES}
    with ThreadPoolExecutor(4) as pool:
        asked = [
            (name, f"text number {n}", pool.submit(apart[name].encode, f"text number {n}"))
            for n in range(30)
            for name in NAMES
        ]
        for name, text, answer in asked:
            assert answer.result().ids.tolist() == small.vocabulary(name).encode(text).ids.tolist()


# ------------------------------------------------------------------------------------------------ what ends the child


def test_a_vocabulary_over_which_the_library_aborts_is_refused(process: VocabularyProcess) -> None:
    with pytest.raises(FatalVocabulary, match=r"ended with SIGABRT; it may take 4096 MiB of memory; simplify"):
        process.read(ABORTING)
    assert process.read(artifact()).size > 0, "the next one is read"


def test_an_expression_made_for_a_text_is_ended_at_its_bound() -> None:
    with VocabularyProcess(Bounds(cpu_s=3, characters_per_s=1e9)) as process:
        vocabulary = process.read(HANGING)
        with pytest.raises(FatalVocabulary, match=r"took more than the 3 s of processor|was ended after 15 s"):
            vocabulary.encode_batch(MADE_FOR_IT)
        assert vocabulary.encode("another text").ids.size > 0, "and goes on with what costs less"


def test_more_characters_may_take_more_time() -> None:
    assert Bounds(cpu_s=3, characters_per_s=1000).for_texts(["ab" * 500] * 9 + ["é" * 1000]) == 13


def test_a_child_that_asks_for_too_much_memory_is_refused() -> None:
    with (
        VocabularyProcess(Bounds(memory_bytes=200 << 20)) as process,
        pytest.raises(FatalVocabulary, match="it may take 200 MiB of memory"),
    ):
        process.read(artifact() + b" " * (63 << 20))


def test_a_child_that_is_killed_costs_one_refusal(process: VocabularyProcess) -> None:
    vocabulary = process.read(artifact())
    child_of(process).kill()
    with pytest.raises(FatalVocabulary, match="was ended after 100 s"):
        vocabulary.encode("first")
    assert vocabulary.encode("second").ids.size > 0


def test_a_child_that_stands_still_is_ended() -> None:
    """It takes no processor time, and never answers."""
    with VocabularyProcess(Bounds(cpu_s=1)) as process:
        vocabulary = process.read(artifact())
        child_of(process).send_signal(signal.SIGSTOP)
        with pytest.raises(FatalVocabulary, match="was ended after 5 s"):
            vocabulary.encode("text")


def test_the_child_knows_no_secret_and_ends_with_its_parents_pipe(
    process: VocabularyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEDMKT_OPERATOR_TOKEN", "FEDMKT_DATABASE_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret-of-the-service")
    process.read(artifact())
    child = child_of(process)
    environment = Path(f"/proc/{child.pid}/environ").read_bytes()
    assert b"secret-of-the-service" not in environment
    assert os.getsid(child.pid) != os.getsid(0)
    assert process._child is not None
    process._child.communicate()  # closes the pipe, and waits
    assert process._child.returncode == 0
    process._child = None


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "llama2", "llama3"])
def test_real_tokenizers_stay_far_from_the_bounds(process: VocabularyProcess, name: str, data_dir: Path) -> None:
    here = Vocabulary.from_tokenizer(data_dir / "tokenizers" / name)
    apart = process.read(here.to_bytes())
    assert (apart.fingerprint, apart.tokens) == (here.fingerprint, here.tokens)
    texts = [small.prose(2000)] * 200
    assert [each.ids.tolist() for each in apart.encode_batch(texts)] == [here.encode(texts[0]).ids.tolist()] * 200
    used = child_of(process).cpu_times()
    assert used.user + used.system < 20
    peak = next(
        line for line in Path(f"/proc/{child_of(process).pid}/status").read_text().splitlines() if "VmPeak" in line
    )
    assert int(peak.split()[1]) < 2 << 20, "KiB: half of the bound"
