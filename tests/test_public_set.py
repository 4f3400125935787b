"""The public set: shapes of a line, canonical form, digest, cuts, and what is refused."""

import hashlib
import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmkt import public_set
from fedmkt.errors import Refusal
from fedmkt.public_set import (
    BadChatTemplate,
    DuplicateSample,
    EmptyPublicSet,
    EmptyResponse,
    MalformedSample,
    NotUnicode,
    PublicSample,
    PublicSet,
    PublicSetTooLarge,
    TooFewSamples,
)


def lines(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def test_a_completion_begins_after_the_prompt_in_bytes_and_ends_the_text() -> None:
    found = PublicSet.from_jsonl(lines({"id": "a", "prompt": "Où? ", "completion": "Là.", "domain": "fr"}))
    assert found.samples == (PublicSample("a", "Où? Là.", 5, True, "fr"),)


def test_a_plain_text_is_all_response_and_does_not_end() -> None:
    assert PublicSet.from_jsonl(lines({"text": "abc"})).samples == (PublicSample("1", "abc", 0, False),)


def test_a_chat_is_rendered_once_and_only_its_last_message_is_response() -> None:
    chat = {
        "messages": [
            {"role": "user", "content": "What is {content}?"},
            {"role": "assistant", "content": "A {role}."},
        ]
    }
    (sample,) = PublicSet.from_jsonl(lines(chat)).samples
    assert sample.text == "user: What is {content}?\nassistant: A {role}."
    assert sample.text.encode()[sample.response_start :] == b"A {role}."
    assert sample.ends


def test_the_chat_template_is_filled_in_and_never_evaluated() -> None:
    chat = {"messages": [{"role": "u", "content": "x"}, {"role": "a", "content": "y"}]}
    (sample,) = PublicSet.from_jsonl(lines(chat), chat_template="<{role}|{role.__class__}>{content};").samples
    assert sample.text == "<u|{role.__class__}>x;<a|{role.__class__}>y"
    assert sample.response_start == len("<u|{role.__class__}>x;<a|{role.__class__}>")


def test_a_missing_id_is_the_line_number_and_blank_lines_count() -> None:
    found = PublicSet.from_jsonl(b'\xef\xbb\xbf\n{"text":"a"}\r\n\n{"text":"b","id":null}\n{"id":7,"text":"c"}\n')
    assert [sample.id for sample in found.samples] == ["2", "4", "7"]


def test_the_digest_is_that_of_the_canonical_bytes_worked_by_hand() -> None:
    found = PublicSet.from_jsonl(b'{"completion": "\\u00e9", "prompt": "p ", "id": 3}\n {"text":"t", "spare": 1}')
    canonical = '{"id":"3","prompt":"p ","completion":"é"}\n{"id":"2","text":"t"}\n'.encode()
    assert found.to_jsonl() == canonical
    assert found.digest == hashlib.sha256(canonical).hexdigest()


def test_choices_stand_beside_the_completion_and_count_in_the_digest() -> None:
    row = b'{"id":"q","prompt":"2+2=","choices":["3","4"],"completion":"4"}'
    (sample,) = PublicSet.from_jsonl(row).samples
    assert (sample.prompt, sample.response, sample.choices) == ("2+2=", "4", ("3", "4"))
    canonical = b'{"id":"q","prompt":"2+2=","completion":"4","choices":["3","4"]}\n'
    assert PublicSet.from_jsonl(row).to_jsonl() == canonical


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(lambda text: text.strip())
shapes = st.one_of(
    st.fixed_dictionaries({"text": texts}, optional={"domain": st.sampled_from(["a", "b"])}),
    st.fixed_dictionaries({"prompt": st.one_of(st.just(""), texts), "completion": texts}),
    st.lists(texts, min_size=2, max_size=4, unique=True).map(
        lambda choices: {"prompt": "why?", "completion": choices[-1], "choices": choices}
    ),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": texts, "content": texts}), min_size=1, max_size=3)}
    ),
)


@given(st.lists(shapes, min_size=1, max_size=6))
def test_reading_the_canonical_form_gives_the_same_set_and_digest(rows: list[dict[str, object]]) -> None:
    found = PublicSet.from_jsonl(lines(*rows))
    again = PublicSet.from_jsonl(found.to_jsonl())
    assert again.samples == found.samples
    assert again.digest == found.digest
    assert again.to_jsonl() == found.to_jsonl()


@pytest.mark.parametrize(
    ("source", "refusal", "words"),
    [
        (b"", EmptyPublicSet, "0 samples"),
        (b"\n\n", EmptyPublicSet, "0 samples"),
        (b'{"text":"a"}\n{"text":', MalformedSample, "line 2 is not JSON"),
        (b'{"text":"\xff"}', MalformedSample, "line 1 is not UTF-8"),
        (b"[" * 100_000, MalformedSample, "line 1 is not JSON"),
        (b'["text"]', MalformedSample, "line 1 is a JSON list"),
        (b'{"text":"a","prompt":"b"}', MalformedSample, "line 1 has 'text', 'prompt'"),
        (b'{"text":"a","completion":"b","prompt":"c"}', MalformedSample, "one of them"),
        (b'{"completion":"b"}', MalformedSample, "expected {prompt, completion}"),
        (b"{}", MalformedSample, "no keys"),
        (b'{"text":5}', MalformedSample, "text must be a text, not int"),
        (b'{"text":"a","domain":5}', MalformedSample, "domain must be a text"),
        (b'{"text":"a","id":true}', MalformedSample, "id must be"),
        (b'{"text":"a","id":""}', MalformedSample, "id must be"),
        (b'{"messages":[]}', MalformedSample, "messages must be a list"),
        (b'{"messages":[{"role":"user"}]}', MalformedSample, "content must be a text"),
        (b'{"text":"a","id":"x"}\n{"text":"b","id":"x"}', DuplicateSample, "lines 1 and 2 both have id 'x'"),
        (b'{"text":"a","id":2}\n{"text":"b"}', DuplicateSample, "lines 1 and 2"),
        (b'{"text":"  \\n"}', EmptyResponse, "line 1"),
        (b'{"prompt":"a","completion":""}', EmptyResponse, "drop it"),
        (b'{"prompt":"a","completion":"b","choices":"b"}', MalformedSample, "line 1 has choices that are no list"),
        (b'{"prompt":"a","completion":"b","choices":["b",""]}', MalformedSample, "with something in them"),
        (b'{"prompt":"a","completion":"b","choices":["b"]}', MalformedSample, "has 1 choices; give 2 to 100"),
        (b'{"prompt":"a","completion":"b","choices":["b","b"]}', MalformedSample, "no two of them equal"),
        (b'{"prompt":"a","completion":"b","choices":["B","c"]}', MalformedSample, "none of its choices"),
        (b'{"text":"b","choices":["b","c"]}', MalformedSample, "none of its choices"),
        (b'{"prompt":"a","completion":"b","choices":["b","\\ud800"]}', NotUnicode, "lone surrogate"),
        (b'{"text":"a\\ud800b"}', NotUnicode, "lone surrogate"),
        (b'{"text":"a","id":"\\ud800"}', NotUnicode, "lone surrogate"),
    ],
)
def test_a_broken_line_is_refused_with_its_number_and_reason(source: bytes, refusal: type[Refusal], words: str) -> None:
    with pytest.raises(refusal) as raised:
        PublicSet.from_jsonl(source)
    assert words in raised.value.detail


def test_every_refusal_has_a_code_of_its_own() -> None:
    kinds = [MalformedSample, DuplicateSample, EmptyResponse, NotUnicode, PublicSetTooLarge, EmptyPublicSet]
    codes = [kind.code for kind in (*kinds, TooFewSamples, BadChatTemplate)]
    assert len(set(codes)) == len(codes)
    assert all(code.startswith("public_set.") for code in codes)


def test_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PublicSetTooLarge, match="1048577 bytes in a sample, at most 1048576"):
        PublicSet.from_jsonl(lines({"text": "a" * (public_set.MAX_SAMPLE_BYTES + 1)}))
    with pytest.raises(PublicSetTooLarge, match="id has 201 characters, at most 200"):
        PublicSet.from_jsonl(lines({"text": "a", "id": "x" * 201}))
    with pytest.raises(PublicSetTooLarge, match="domain has 101 characters, at most 100"):
        PublicSet.from_jsonl(lines({"text": "a", "domain": "x" * 101}))
    monkeypatch.setattr(public_set, "MAX_SAMPLES", 2)
    with pytest.raises(PublicSetTooLarge, match="more than 2 samples"):
        PublicSet.from_jsonl(b'{"text":"a"}\n' * 3)
    monkeypatch.setattr(public_set, "MAX_PUBLIC_SET_BYTES", 10)
    with pytest.raises(PublicSetTooLarge, match="12 bytes, at most 10"):
        PublicSet.from_jsonl(b'{"text":"a"}')


def test_a_chat_template_without_content_is_refused() -> None:
    with pytest.raises(BadChatTemplate, match="exactly once"):
        PublicSet.from_jsonl(b'{"text":"a"}', chat_template="{role}")


def numbered(count: int, domains: dict[str, int] | None = None) -> PublicSet:
    names = [name for name, share in (domains or {"": count}).items() for _ in range(share)]
    return PublicSet(tuple(PublicSample(f"s{index}", "t", 0, False, names[index]) for index in range(count)))


def test_parts_are_disjoint_complete_ascending_and_even() -> None:
    parts = numbered(103).parts(4, 0.1)
    assert len(parts.holdout) == 10
    assert sorted(len(part) for part in parts.slices) == [23, 23, 23, 24]
    members = [*parts.holdout, *(index for part in parts.slices for index in part)]
    assert sorted(members) == list(range(103))
    assert all(list(part) == sorted(part) for part in (parts.holdout, *parts.slices))


def test_every_part_holds_each_domains_share() -> None:
    found = numbered(240, {"a": 160, "b": 60, "c": 20})
    for part, share in zip((parts := found.parts(4, 0.2)).slices, [48] * 4, strict=True):
        domains = Counter(found.samples[index].domain for index in part)
        assert sum(domains.values()) == share
        assert abs(domains["a"] - 32) <= 1
        assert abs(domains["b"] - 12) <= 1
        assert abs(domains["c"] - 4) <= 1
    assert Counter(found.samples[index].domain for index in parts.holdout)["c"] in (3, 4, 5)


def test_the_cut_depends_on_ids_alone_not_on_the_order_of_lines() -> None:
    found = numbered(30)
    turned = PublicSet(tuple(reversed(found.samples)))
    cuts = [
        [{each.samples[index].id for index in part} for part in (parts.holdout, *parts.slices)]
        for each in (found, turned)
        for parts in [each.parts(3, 0.1)]
    ]
    assert cuts[0] == cuts[1]
    assert found.parts(1, 0).holdout == ()
    assert found.parts(1, 0.001).holdout != ()


def test_a_cut_worked_by_hand() -> None:
    # SHA-256 of s0, s1, s2 begin with the digits asserted here; the held-out sample is the smallest
    digests = {f"s{index}": hashlib.sha256(f"s{index}".encode()).hexdigest() for index in range(3)}
    order = sorted(range(3), key=lambda index: digests[f"s{index}"])
    parts = numbered(3).parts(2, 0.3)
    assert parts.holdout == (order[0],)
    assert parts.slices == ((order[1],), (order[2],))


def test_more_slices_than_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(TooFewSamples, match="10 samples less 1 held out leave 9 for 12 slices"):
        numbered(10).parts(12, 0.1)
