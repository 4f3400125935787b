"""The demo's text: cut at whitespace, split without overlap, the same every time, read without importing anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmkt.demo import texts
from fedmkt.demo.texts import Corpus, NotEnoughText, Source, build_corpus, chunk, private_jsonl, public_jsonl
from fedmkt.public_set import PublicSet

SMALL = {"domains": 2, "private": 30, "public": 12, "pretraining": 8, "general": 60}


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(**SMALL)


def test_a_text_is_cut_at_whitespace_before_the_limit() -> None:
    words = " ".join(["word"] * 100)  # 5 bytes a word, less one: 51 words are 254 bytes, 52 would be 259
    pieces = chunk(words)
    assert [len(piece) for piece in pieces] == [254, 244]
    assert pieces[0] + " " + pieces[1] == words


def test_white_space_inside_a_chunk_stays_as_it_was() -> None:
    text = "first line\n\n    indented\tand  double " + "x" * 120
    assert chunk(text) == [text]


def test_a_rest_that_is_too_short_is_dropped() -> None:
    assert chunk("x" * 119) == []
    assert chunk("x" * 120) == ["x" * 120]


def test_a_word_longer_than_the_limit_is_a_chunk_of_its_own() -> None:
    assert chunk("a " + "b" * 300 + " " + "c" * 130) == ["b" * 300, "c" * 130]


def test_sizes_are_counted_in_bytes() -> None:
    euros = " ".join(["€"] * 70)  # 4 bytes each with its space: 64 are 255 bytes
    assert chunk(euros)[0] == " ".join(["€"] * 64)


def test_every_part_has_the_asked_size(corpus: Corpus) -> None:
    assert {domain: len(chunks) for domain, chunks in corpus.private.items()} == {"reference": 30, "numerics": 30}
    assert {len(chunks) for chunks in corpus.public.values()} == {12}
    assert {len(chunks) for chunks in corpus.pretraining.values()} == {8}
    assert len(corpus.general) == 60


def test_no_chunk_is_in_two_parts(corpus: Corpus) -> None:
    tables = (corpus.private, corpus.public, corpus.pretraining)
    parts = [chunks for table in tables for chunks in table.values()] + [corpus.general]
    everything = [piece for chunks in parts for piece in chunks]
    assert len(everything) == len(set(everything)) == 2 * (30 + 12 + 8) + 60


def test_the_same_installation_gives_the_same_text(corpus: Corpus) -> None:
    assert build_corpus(**SMALL).digest == corpus.digest


def test_a_corpus_survives_its_file(corpus: Corpus) -> None:
    again = Corpus.from_json(corpus.to_json())
    assert again == corpus
    assert again.digest == corpus.digest
    assert list(again.private) == ["reference", "numerics"]  # in their own order, not the alphabet's


def test_reading_the_text_imports_none_of_the_packages() -> None:
    code = (
        "import sys; from fedmkt.demo.texts import build_corpus;"
        f"build_corpus(**{SMALL!r}); assert not {{'numpy', 'sympy', 'pydoc_data', 'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_code_and_secrets_of_encoding_are_not_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = "This sentence is the documentation of a module and long enough to be taken as a chunk of text. " * 2
    (tmp_path / "module.py").write_text(
        f'"""{prose}"""\nx = "{"0123456789" * 20}"\ny = "\\udc80 {prose}"\nz = "{"- " * 90}"\n'
    )
    (tmp_path / "broken.py").write_text("def (")
    monkeypatch.setattr(texts.sysconfig, "get_path", lambda name: str(tmp_path))
    assert texts._chunks_of(Source("any", "purelib", "."), 10_000) == chunk(prose.strip())


def test_too_little_text_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "DOMAINS", (texts.DOMAINS[0], Source("none", "purelib", "no_such_package")))
    with pytest.raises(NotEnoughText, match=r"1 of 2 domains have 50 chunks of text here \(reference\)"):
        build_corpus(**SMALL)


def test_the_public_set_is_one_that_every_party_can_read(corpus: Corpus) -> None:
    found = PublicSet.from_jsonl(public_jsonl(corpus.public))
    assert len(found) == 24
    assert {(sample.domain, sample.response_start) for sample in found.samples} == {("reference", 0), ("numerics", 0)}
    assert found.samples[12].text == corpus.public["numerics"][0]


def test_private_text_is_one_json_object_a_line(corpus: Corpus) -> None:
    lines = private_jsonl(corpus.private["numerics"]).decode().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text} for text in corpus.private["numerics"]]
