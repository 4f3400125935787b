"""Vocabularies: exact bytes of tokens, ends of tokens in a text, roles, artifacts, and hostile artifacts."""

import gzip
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import small_tokenizers as small
from fedmkt import public_set, token_bytes, vocabulary
from fedmkt.cutting_speed import SlowTokenizer
from fedmkt.token_bytes import UnsupportedVocabulary
from fedmkt.vocabulary import Encoding, MalformedVocabulary, Vocabulary

MIXED = "Hello,  world!\n\tif x == 12345: pass  # naïve café\r\n日本語 한국어 Привет مرحبا 👩‍👩‍👧‍👦 e\u0301 </s> "
PLAIN = "the value of the name is assigned to the target"


def pieces(found: Encoding, text: str) -> list[bytes]:
    data, ends = text.encode(), [0, *found.ends.tolist()]
    return [data[start:stop] for start, stop in itertools.pairwise(ends)]


def char_level(**options: object) -> Tokenizer:
    return Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "é": 3}, [("a", "b")], **options))


# ------------------------------------------------------------------------------------------------ bytes


def test_byte_level_tokens_become_their_bytes() -> None:
    found = Vocabulary.from_tokenizer(small.word_table({"Ġthe": 0, "Ã©": 1, "Ċ": 2, "</s>": 3, "<s>": 4}))
    assert found.tokens == (b" the", "é".encode(), b"\n", b"", b"")


def test_the_byte_alphabet_has_every_byte_once() -> None:
    alphabet = token_bytes.byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert {chr(point) for point in alphabet} == set(pre_tokenizers.ByteLevel.alphabet())
    assert (alphabet[ord("Ġ")], alphabet[ord("Ċ")], alphabet[ord("A")]) == (0x20, 0x0A, 0x41)


def test_sentencepiece_spaces_and_bytes_are_decoded() -> None:
    found = small.vocabulary("sentencepiece")
    assert found.tokens[:4] == (b"", b"", b"", b"\x00")
    assert found.tokens[3 + 0xE2] == b"\xe2"
    tokenizer = small.sentencepiece_bpe()
    index = tokenizer.get_vocab()["▁a"]
    assert found.tokens[index] == b" a"


def test_a_byte_spelling_without_byte_fallback_is_text() -> None:
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁<0x41>", -1.0), ("<0x41>", -1.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert Vocabulary.from_tokenizer(tokenizer).tokens == (b"", b" <0x41>", b"<0x41>")


def test_word_pieces_carry_a_space_unless_they_continue_a_word() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1, "##ing": 2}, unk_token="[UNK]"))
    assert Vocabulary.from_tokenizer(tokenizer).tokens == (b"", b" play", b"ing")


def test_plain_text_added_tokens_keep_their_bytes_and_special_ones_have_none() -> None:
    tokenizer = small.word_table({"a": 0, "</s>": 1, "<s>": 2})
    tokenizer.add_tokens([AddedToken("  é", normalized=False, special=False)])
    tokenizer.add_special_tokens(["<|user|>"])
    found = Vocabulary.from_tokenizer(tokenizer)
    assert found.tokens == (b"a", b"", b"", "  é".encode(), b"")
    assert found.roles == {1: "eos", 2: "bos", 4: "turn"}
    assert pieces(found.encode("a  éa", add_bos=False), "a  éa") == [b"a", "  é".encode(), b"a"]


def test_holes_in_the_ids_are_empty() -> None:
    found = Vocabulary.from_tokenizer(Tokenizer(models.BPE({"a": 0, "b": 5}, [])))
    assert found.tokens == (b"a", b"", b"", b"", b"", b"b")
    assert found.size == 6
    assert found.byte_lengths.tolist() == [1, 0, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------------ encoding


@pytest.mark.parametrize("name", small.BYTE_EXACT)
def test_tokens_of_a_byte_exact_tokenizer_join_to_the_text(name: str) -> None:
    found = small.vocabulary(name)
    encoded = found.encode(MIXED, add_bos=False)
    assert encoded.exact
    assert pieces(encoded, MIXED)[1:] == [found.tokens[index] for index in encoded.ids[1:]]
    assert b"".join(found.tokens[index] for index in encoded.ids).removeprefix(b" ") == MIXED.encode()
    assert encoded.ids.dtype == encoded.ends.dtype == np.int32


@pytest.mark.parametrize("name", small.NAMES)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_ends_never_decrease_and_reach_the_end_of_any_text(name: str, text: str) -> None:
    encoded = small.vocabulary(name).encode(text, add_eos=True)
    assert encoded.ends[0] == 0
    assert encoded.ends[-1] == len(text.encode())
    assert (np.diff(encoded.ends) >= 0).all()
    if len(encoded.ids) > 2:
        assert encoded.ends[-2] == len(text.encode())
    if name in small.BYTE_EXACT and "▁" not in text:
        assert encoded.exact


def test_the_dummy_space_of_sentencepiece_costs_no_bytes() -> None:
    found = small.vocabulary("sentencepiece")
    encoded = found.encode(PLAIN)
    assert encoded.exact
    assert encoded.ends[0] == 0
    first = found.tokens[encoded.ids[1]]
    assert first.startswith(b" ")
    assert encoded.ends[1] == len(first) - 1


def test_a_text_that_begins_with_a_space_keeps_it_under_a_dummy_space() -> None:
    found = small.vocabulary("sentencepiece")
    encoded = found.encode(" the", add_bos=False)
    assert encoded.exact
    assert b"".join(found.tokens[index] for index in encoded.ids) == b"  the"
    assert encoded.ends[-1] == 4


def test_lower_cased_words_are_exact_when_the_text_is_and_offsets_otherwise() -> None:
    found = small.vocabulary("word_piece")
    assert found.encode(PLAIN).exact
    text = "The Name, THE name"
    encoded = found.encode(text, add_bos=False)
    assert not encoded.exact
    assert [piece.lower() for piece in pieces(encoded, text)] == [
        found.tokens[index].lstrip() if at in (0, 2) else found.tokens[index] for at, index in enumerate(encoded.ids)
    ]


def test_a_character_in_several_tokens_of_a_lossy_text_ends_where_its_last_token_ends() -> None:
    found = small.vocabulary("byte_level")
    tokenizer = Tokenizer.from_str(small.byte_level().to_str())
    tokenizer.normalizer = normalizers.Lowercase()
    lossy = Vocabulary.from_tokenizer(tokenizer)
    text = "a€B"  # the euro sign is three single-byte tokens here
    assert found.encode(text, add_bos=False).ends.tolist() == [1, 2, 3, 4, 5]
    encoded = lossy.encode(text, add_bos=False)
    assert not encoded.exact
    assert encoded.ends.tolist() == [1, 1, 1, 4, 5]


def test_unknown_text_is_one_token_that_ends_in_the_right_byte() -> None:
    found = small.vocabulary("unigram")
    text = "the 日本 name"
    encoded = found.encode(text, add_bos=False)
    unknown = next(index for index, role in found.roles.items() if role == "unk")
    at = encoded.ids.tolist().index(unknown)
    assert not encoded.exact
    assert encoded.ends[at] == 10  # "the " and two characters of three bytes


def test_special_tokens_spelled_in_a_text_are_plain_text() -> None:
    for name in small.BYTE_EXACT:
        found = small.vocabulary(name)
        encoded = found.encode("a<s></s><|endoftext|>b", add_bos=False)
        assert encoded.exact
        assert not set(encoded.ids.tolist()) & set(found.roles)


def test_bos_and_eos_are_ours_and_max_tokens_cuts_them_too() -> None:
    found = Vocabulary.from_tokenizer(small.word_table({"a": 0, "Ġb": 1, "<s>": 2, "</s>": 3}))
    encoded = found.encode("a b b", add_eos=True)
    assert encoded.ids.tolist() == [2, 0, 1, 1, 3]
    assert encoded.ends.tolist() == [0, 1, 3, 5, 5]
    cut = found.encode("a b b", add_eos=True, max_tokens=3)
    assert cut.ids.tolist() == [2, 0, 1]
    assert cut.ends.tolist() == [0, 1, 3]
    assert found.encode("", add_eos=True).ids.tolist() == [2, 3]
    assert found.encode("", add_bos=False).ids.tolist() == []


def test_padding_truncation_templates_and_dropout_of_the_file_are_off() -> None:
    content = json.loads(small.byte_level().to_str())
    content["model"]["dropout"] = 0.9
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(2)
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    found, plain = Vocabulary.from_tokenizer(tokenizer), small.vocabulary("byte_level")
    assert found.encode(MIXED).ids.tolist() == plain.encode(MIXED).ids.tolist()
    assert found.fingerprint == plain.fingerprint
    assert tokenizer.padding is not None, "the caller's tokenizer must stay as it was"


def test_a_batch_gives_what_single_calls_give() -> None:
    texts = [PLAIN, MIXED, "", "a"]
    for name in small.NAMES:
        found = small.vocabulary(name)
        batch = found.encode_batch(texts, add_eos=[True, False, True, False], max_tokens=20)
        for text, eos, encoded in zip(texts, [True, False, True, False], batch, strict=True):
            alone = found.encode(text, add_eos=eos, max_tokens=20)
            assert alone.ids.tolist() == encoded.ids.tolist()
            assert alone.ends.tolist() == encoded.ends.tolist()
            assert alone.exact == encoded.exact
    with pytest.raises(ValueError, match="1 add_eos flags for 4 texts"):
        found.encode_batch(texts, add_eos=[True])


# ------------------------------------------------------------------------------------------------ roles


def test_a_bare_tokenizer_is_understood_by_conventional_spellings() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    found = Vocabulary.from_tokenizer(tokenizer)
    assert found.roles == {0: "unk", 2: "bos", 3: "eos", 4: "pad", 5: "turn"}
    assert (found.bos_id, found.eos_id) == (2, 3)


def test_eos_begins_a_text_where_there_is_no_bos() -> None:
    found = small.vocabulary("byte_level")
    assert found.bos_id == found.eos_id == 0
    assert found.roles == {0: "eos"}


def test_a_vocabulary_without_special_tokens_adds_none() -> None:
    found = Vocabulary.from_tokenizer(char_level())
    assert (found.bos_id, found.eos_id, dict(found.roles)) == (None, None, {})
    assert found.encode("abé", add_eos=True).ids.tolist() == [2, 3]


def test_a_transformers_tokenizer_names_its_own_roles() -> None:
    tokenizer = small.word_table({"a": 0}, specials=("<x>", "<y>", "<z>", "<w>"))
    names = {"bos_token": "<y>", "eos_token": "<z>", "pad_token": "<x>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]  # theirs
    found = Vocabulary.from_tokenizer(fast)
    assert found.roles == {1: "pad", 2: "bos", 3: "eos", 4: "turn"}
    assert (found.bos_id, found.eos_id) == (2, 3)


def test_a_folder_names_roles_in_its_configuration(tmp_path: Path) -> None:
    small.word_table({"a": 0}, specials=("<x>", "<y>", "<z>")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<x>", "unk_token": None}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": "<y>", "lstrip": False}, "pad_token": "<z>"})
    )
    for source in (tmp_path, str(tmp_path)):
        found = Vocabulary.from_tokenizer(source)
        assert found.roles == {1: "turn", 2: "eos", 3: "pad"}


def test_a_pad_borrowed_from_ordinary_text_keeps_its_bytes(tmp_path: Path) -> None:
    small.word_table({"a": 0, "!": 1}).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "!"}))
    found = Vocabulary.from_tokenizer(tmp_path)
    assert found.tokens[1] == b"!"
    assert 1 not in found.roles


def test_a_role_shared_by_several_names_is_the_most_telling_one(tmp_path: Path) -> None:
    small.word_table({"a": 0}, specials=("<x>",)).save(str(tmp_path / "tokenizer.json"))
    names = dict.fromkeys(["bos_token", "eos_token", "pad_token", "unk_token"], "<x>")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    assert Vocabulary.from_tokenizer(tmp_path).roles == {1: "eos"}


# ------------------------------------------------------------------------------------------------ artifacts


@pytest.mark.parametrize("name", small.NAMES)
def test_an_artifact_gives_back_the_same_vocabulary(name: str) -> None:
    found = small.vocabulary(name)
    again = Vocabulary.from_bytes(found.to_bytes())
    assert again == found
    assert again.to_bytes() == found.to_bytes()
    assert (again.tokens, again.roles, again.bos_id, again.eos_id) == (
        found.tokens,
        found.roles,
        found.bos_id,
        found.eos_id,
    )
    assert again.encode(MIXED).ids.tolist() == found.encode(MIXED).ids.tolist()


def test_the_fingerprint_is_the_same_in_every_process(tmp_path: Path) -> None:
    small.byte_level().save(str(tmp_path / "tokenizer.json"))
    code = "import sys; from fedmkt.vocabulary import Vocabulary; v = Vocabulary.from_tokenizer(sys.argv[1])\n"
    code += "import hashlib; print(v.fingerprint, hashlib.sha256(v.to_bytes()).hexdigest())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert outputs.pop().split()[0] == small.vocabulary("byte_level").fingerprint


def test_the_fingerprint_tells_apart_whatever_cuts_or_means_differently() -> None:
    base = small.word_table({"a": 0, "Ġb": 1})
    changed = [small.word_table({"a": 1, "Ġb": 0}), small.word_table({"a": 0, "Ġb": 1}, specials=("</s>", "<s>"))]
    changed.append(small.word_table({"a": 0, "Ġb": 1}))
    changed[-1].normalizer = normalizers.Lowercase()
    changed.append(small.word_table({"a": 0, "Ġb": 1}))
    changed[-1].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    prints = {Vocabulary.from_tokenizer(tokenizer).fingerprint for tokenizer in (base, *changed)}
    assert len(prints) == 5
    same = small.word_table({"a": 0, "Ġb": 1})
    same.decoder = decoders.Sequence([decoders.ByteLevel()])
    assert Vocabulary.from_tokenizer(same).fingerprint == Vocabulary.from_tokenizer(base).fingerprint


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (object(), "no fast backend"),
        (Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>")), "end words with '</w>'"),
        (Tokenizer(models.BPE()), "has no tokens"),
        (small.word_table({"a": 1 << 20}, specials=()), "largest token id is 1048576, at most 1048575"),
        (Tokenizer(models.BPE({"a" * 1025: 0}, [])), "1025 characters, at most 1024"),
    ],
)
def test_a_tokenizer_that_cannot_take_part_is_refused_with_the_reason(tokenizer: object, words: str) -> None:
    with pytest.raises(UnsupportedVocabulary) as raised:
        Vocabulary.from_tokenizer(tokenizer)  # type: ignore[arg-type]  # wrong on purpose
    assert words in raised.value.detail
    assert raised.value.code == "vocabulary.unsupported"


def test_two_tokens_of_one_id_are_refused() -> None:
    """The library keeps either, another one in every process."""
    content = json.loads(small.vocabulary("word_piece").to_bytes())
    vocabulary = content["tokenizer"]["model"]["vocab"]
    first, second = sorted(vocabulary)[:2]
    vocabulary[second] = vocabulary[first]
    with pytest.raises(UnsupportedVocabulary, match=re.escape(f"share the id {vocabulary[first]}; give each its own")):
        Vocabulary.from_bytes(json.dumps(content).encode())


def splitting(pattern: str) -> Tokenizer:
    tokenizer = small.word_table({"a": 0, "b": 1})
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


def test_an_expression_that_slows_a_text_down_is_refused_when_it_arrives() -> None:
    """Cubic in a run of one letter: 4,096 of them would take minutes."""
    data = Vocabulary.from_tokenizer(splitting("a*a*a*b|.")).to_bytes()
    with pytest.raises(
        SlowTokenizer, match=r"it cuts \d+ characters \('a', repeated\) in .* at most 0\.\d+ s"
    ) as found:
        Vocabulary.from_bytes(data)
    assert found.value.code == "vocabulary.too_slow"


def test_an_expression_on_which_the_library_gives_up_is_refused_when_it_arrives() -> None:
    data = Vocabulary.from_tokenizer(splitting("(a+)+b")).to_bytes()  # exponential
    with pytest.raises(UnsupportedVocabulary, match="retry-limit"):
        Vocabulary.from_bytes(data)


def test_ordinary_expressions_are_quick_enough() -> None:
    gpt4 = r"(?i:'s|'t|'re|'ve)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    found = Vocabulary.from_tokenizer(splitting(gpt4))
    assert Vocabulary.from_bytes(found.to_bytes()) == found


def test_text_and_patterns_are_bounded_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedVocabulary, match=r"patterns have \d+ characters together, at most 16384"):
        Vocabulary.from_tokenizer(splitting("a" * 16_400))
    monkeypatch.setattr(token_bytes, "MAX_TEXT_CHARACTERS", 10)
    with pytest.raises(UnsupportedVocabulary, match="tokens have 11 characters together, at most 10"):
        Vocabulary.from_tokenizer(small.word_table({"a" * 4: 0}))


def test_a_folder_without_a_fast_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVocabulary, match=r"no tokenizer\.json"):
        Vocabulary.from_tokenizer(tmp_path)


def hostile(change: dict[str, object], model: dict[str, object] | None = None) -> bytes:
    content = json.loads(small.word_table({"a": 0, "b": 1}).to_str())
    content |= change
    content["model"] |= model or {}
    return json.dumps({"version": 1, "names": {}, "tokenizer": content}).encode()


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'"\xff"',
    "deep": b"[" * 200_000,
    "a list": b"[]",
    "no version": b"{}",
    "a later version": b'{"version":2,"names":{},"tokenizer":{}}',
    "no tokenizer": b'{"version":1,"names":{},"tokenizer":[]}',
    "more keys": b'{"version":1,"names":{},"tokenizer":{},"spare":1}',
    "an empty tokenizer": b'{"version":1,"names":{},"tokenizer":{}}',
    "an unknown name": b'{"version":1,"names":{"boss":1},"tokenizer":{}}',
    "a name that is a text": b'{"version":1,"names":{"bos":"1"},"tokenizer":{}}',
    "a name that is true": b'{"version":1,"names":{"bos":true},"tokenizer":{}}',
    "a model of no kind": hostile({}, {"type": "Oracle"}),
    "a vocabulary that is a number": hostile({}, {"vocab": 5}),
    "an id out of bounds": hostile({}, {"vocab": {"a": 2**31}}),
    "an added id out of bounds": hostile({"added_tokens": [{"id": 2**31, "content": "x", "special": True}]}),
    "an id that is true": hostile({}, {"vocab": {"a": True}}),
    "added tokens that are a number": hostile({"added_tokens": 5}),
    "a piece that is a number": hostile({}, {"type": "Unigram", "vocab": [5]}),
    "a normalizer that is a list": hostile({"normalizer": [1]}),
    "a negative id": hostile({}, {"vocab": {"a": -1}}),
    "merges of absent tokens": hostile({}, {"merges": [["x", "y"]]}),
    "a broken regular expression": hostile(
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}
    ),
    "a character map that panics": hostile({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}),
    "normalizers that explode": hostile({"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 3}}),
    "endless components": hostile({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 65}}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_artifact_is_refused(case: str) -> None:
    with pytest.raises(UnsupportedVocabulary) as raised:
        Vocabulary.from_bytes(BROKEN[case])
    assert raised.value.code in ("vocabulary.malformed", "vocabulary.unsupported")
    assert raised.value.detail


def test_names_outside_the_vocabulary_are_refused() -> None:
    content = json.loads(small.vocabulary("byte_level").to_bytes())
    for index in (500, -1):
        content["names"] = {"eos": index}
        with pytest.raises(MalformedVocabulary, match="outside a vocabulary of 500"):
            Vocabulary.from_bytes(json.dumps(content).encode())


def test_an_artifact_over_the_limit_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "MAX_VOCABULARY_BYTES", 10)
    with pytest.raises(MalformedVocabulary, match="11 bytes, at most 10"):
        Vocabulary.from_bytes(b"x" * 11)


@given(st.integers(0, 2**32 - 1))
def test_a_damaged_artifact_is_refused_or_still_a_vocabulary(seed: int) -> None:
    data = bytearray(small.vocabulary("unigram").to_bytes())
    random = np.random.default_rng(seed)
    for position in random.integers(0, len(data), 4):
        data[position] = random.integers(0, 256)
    try:
        found = Vocabulary.from_bytes(bytes(data))
    except UnsupportedVocabulary:
        return
    assert found.encode("the name").ends[-1] == 8


# ------------------------------------------------------------------------------------------------ real tokenizers

LOSSY = {"babyllama-105"}
REAL = {
    "babyllama-105": 105,
    "babyllama-361": 361,
    "gpt-neox-20b": 50277,
    "gpt2": 50257,
    "llama2": 32000,
    "llama3": 128256,
    "minimind": 6400,
    "mistral-v3": 32768,
    "opt": 50265,
    "stories260K": 512,
}


@pytest.mark.data
@pytest.mark.parametrize("name", REAL)
def test_a_real_tokenizer_reproduces_any_text_byte_for_byte(name: str, data_dir: Path) -> None:
    found = small.real(data_dir / "tokenizers" / name)
    assert found.size == REAL[name]
    assert found.bos_id is not None
    assert found.eos_id is not None
    with gzip.open(data_dir / "datasets/text/grimms_fairy_tales.txt.gz", "rt") as file:
        prose = file.read(20_000)
    code = Path(public_set.__file__).read_text()[:8000]
    # NFC is what gpt-neox normalises to; every other one keeps a decomposed accent
    decomposed = "" if name == "gpt-neox-20b" else "e\u0301"
    for text in (prose, code, MIXED.replace("e\u0301", decomposed), "3.14159 2,718 100%\n\n\n\t\t x", " a", "a "):
        encoded = found.encode(text, add_bos=False)
        if name in LOSSY:
            continue
        assert encoded.exact
        joined = b"".join(found.tokens[index] for index in encoded.ids)
        assert joined in (text.encode(), b" " + text.encode())
        assert encoded.ends[-1] == len(text.encode())
    assert found.encode("日本\nÜ", add_bos=False).exact == (name not in LOSSY)


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "llama2", "minimind", "babyllama-105"])
def test_a_real_tokenizer_is_the_same_vocabulary_by_every_way_in(name: str, data_dir: Path) -> None:
    folder = data_dir / "tokenizers" / name
    found = Vocabulary.from_tokenizer(folder)
    assert Vocabulary.from_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder)) == found
    assert Vocabulary.from_bytes(found.to_bytes()) == found
