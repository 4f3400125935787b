"""What the entries of a Hugging Face `tokenizer.json` stand for: the exact bytes of every token.

The kind of a tokenizer is read from the model, normalizer, pre-tokenizer and decoder in the file, never from class
names, so a tokenizer of a model that nobody has heard of works when its parts are known:

* byte_level   the GPT-2 alphabet, one printable character per byte (GPT-2, Llama-3, Qwen, Mistral Tekken, Bloom, ...)
* metaspace    SentencePiece: U+2581 is a space, `<0xNN>` a byte (Llama-2, Mistral, Gemma, T5, XLM-R, ...)
* word_piece   `##` continues a word, anything else begins one and therefore carries a leading space (BERT, ...)
* plain        the token is its own text (character-level and word-level models)
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from fedmkt.errors import Refusal

MAX_VOCABULARY_SIZE = 1 << 20
MAX_TOKEN_CHARACTERS = 1024  # the longest of known tokenizers are 512 spaces
MAX_TEXT_CHARACTERS = 8 << 20  # of all tokens together: the largest known vocabularies have seven million
MAX_PATTERN_CHARACTERS = 1 << 14  # of all regular expressions together
MAX_COMPONENTS = 64  # normalizers, pre-tokenizers and decoders, nested ones counted
MAX_GROWTH = 4096  # a chain of normalizers may make a text at most this many times longer

Kind = Literal["byte_level", "metaspace", "word_piece", "plain"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LISTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


class UnsupportedVocabulary(Refusal):
    code: ClassVar[str] = "vocabulary.unsupported"
    title: ClassVar[str] = "This tokenizer cannot take part"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How token strings are read: the kind, the character that stands for a space, the mark of a continued word."""

    kind: Kind
    space: str = "▁"
    continuation: str = "##"
    byte_fallback: bool = False


def byte_alphabet() -> dict[int, int]:
    """Code point -> byte of the GPT-2 alphabet: printable Latin-1 is itself, the other 68 bytes follow U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: byte for byte in printable} | {0x100 + rank: byte for rank, byte in enumerate(others)}


_ALPHABET = byte_alphabet()


def components(tokenizer: dict[str, Any], part: str) -> Iterator[dict[str, Any]]:
    """The parts of a `Sequence` in order, at any depth; a single part as itself; nothing for null."""
    waiting = [tokenizer.get(part)]
    while waiting:
        component = waiting.pop(0)
        if component is None:
            continue
        if not isinstance(component, dict):
            raise UnsupportedVocabulary(f"tokenizer.json: {part} holds {type(component).__name__}, an object expected")
        inner = component.get(_LISTS[part])
        if isinstance(inner, list):
            waiting[:0] = inner
        else:
            yield component


def detect_scheme(tokenizer: dict[str, Any]) -> Scheme:
    """The scheme of a parsed tokenizer.json; raises UnsupportedVocabulary for one whose tokens have no exact bytes."""
    model = tokenizer["model"]
    if model.get("end_of_word_suffix"):
        raise UnsupportedVocabulary(
            f"tokens end words with {model['end_of_word_suffix']!r}, so their bytes are not defined within a text; "
            "use a byte-level BPE, SentencePiece or WordPiece tokenizer"
        )
    parts = [component for part in _LISTS for component in components(tokenizer, part)]
    if any(component.get("type") == "ByteLevel" for component in parts):
        return Scheme("byte_level")
    continuation = model.get("continuing_subword_prefix")
    if continuation or model.get("type") == "WordPiece":
        return Scheme("word_piece", continuation=continuation or "##")
    fallback = bool(model.get("byte_fallback")) or any(part.get("type") == "ByteFallback" for part in parts)
    space = _space_character(parts)
    return Scheme("metaspace", space=space, byte_fallback=fallback) if space else Scheme("plain")


def _space_character(parts: list[dict[str, Any]]) -> str:
    for part in parts:
        if part.get("type") == "Metaspace":
            return str(part.get("replacement") or "▁")
        if part.get("type") == "Replace":
            pattern = part.get("pattern", {}).get("String")
            content = part.get("content")
            if pattern == " " and content and len(content) == 1:
                return str(content)
            if content == " " and pattern and len(pattern) == 1:
                return str(pattern)
    return ""


def token_bytes(token: str, scheme: Scheme) -> bytes:
    """The exact bytes that a token of the model's own vocabulary adds to a text."""
    if scheme.kind == "byte_level":
        return _from_alphabet(token)
    if scheme.kind == "metaspace":
        if scheme.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(scheme.space, " ").encode()
    if scheme.kind == "word_piece":
        inside = token.startswith(scheme.continuation)
        return (token.removeprefix(scheme.continuation) if inside else " " + token).encode()
    return token.encode()


def _from_alphabet(token: str) -> bytes:
    """Bytes of a byte-level token; one with a character outside the alphabet is plain text, as its decoder does it."""
    try:
        return bytes([_ALPHABET[ord(character)] for character in token])
    except KeyError:
        return token.encode()


def added_bytes(content: str, scheme: Scheme) -> bytes:
    """The bytes of an added token that is plain text: matched in the text itself, so never in a byte alphabet."""
    return content.replace(scheme.space, " ").encode() if scheme.kind == "metaspace" else content.encode()


def model_tokens(tokenizer: dict[str, Any]) -> list[tuple[str, int]]:
    """(token, id) of the model's own vocabulary."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        tokens = list(vocabulary.items())
    elif isinstance(vocabulary, list) and all(isinstance(piece, list) and piece for piece in vocabulary):
        tokens = [(piece[0], index) for index, piece in enumerate(vocabulary)]
    else:
        raise UnsupportedVocabulary("tokenizer.json: model.vocab is neither a table nor a list of pieces")
    return _checked_tokens(tokens)


def added_tokens(tokenizer: dict[str, Any]) -> list[tuple[str, int]]:
    """(content, id) of the added tokens, special and plain."""
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise UnsupportedVocabulary("tokenizer.json: added_tokens is not a list of objects")
    return _checked_tokens([(token.get("content"), token.get("id")) for token in added])


def _checked_tokens(tokens: list[tuple[Any, Any]]) -> list[tuple[str, int]]:
    for token, index in tokens:
        if type(token) is not str or type(index) is not int or index < 0:
            raise UnsupportedVocabulary(f"tokenizer.json: token {token!r:.80} has id {index!r:.80}, a number expected")
    return tokens


def check_bounds(tokenizer: dict[str, Any]) -> int:
    """Size of the vocabulary (largest id + 1). Refuses what could exhaust memory or time before the library sees it.

    And an id with two tokens: the library keeps either of them, another one in every process.
    """
    own = model_tokens(tokenizer)
    if len({index for _, index in own}) < len(own):
        shared, _ = Counter(index for _, index in own).most_common(1)[0]
        names = sorted(token for token, index in own if index == shared)[:2]
        raise UnsupportedVocabulary(f"tokens {names[0]!r} and {names[1]!r} share the id {shared}; give each its own")
    tokens = own + added_tokens(tokenizer)
    if not tokens:
        raise UnsupportedVocabulary("the tokenizer has no tokens; train it first")
    size = max(index for _, index in tokens) + 1
    if size > MAX_VOCABULARY_SIZE:
        raise UnsupportedVocabulary(f"the largest token id is {size - 1}, at most {MAX_VOCABULARY_SIZE - 1} is allowed")
    longest = max(len(token) for token, _ in tokens)
    if longest > MAX_TOKEN_CHARACTERS:
        raise UnsupportedVocabulary(f"a token has {longest} characters, at most {MAX_TOKEN_CHARACTERS} are allowed")
    total = sum(len(token) for token, _ in tokens)
    if total > MAX_TEXT_CHARACTERS:
        raise UnsupportedVocabulary(
            f"the tokens have {total} characters together, at most {MAX_TEXT_CHARACTERS} are allowed"
        )
    _check_components(tokenizer)
    return size


def _check_components(tokenizer: dict[str, Any]) -> None:
    parts = [component for part in _LISTS for component in components(tokenizer, part)]
    if len(parts) > MAX_COMPONENTS:
        raise UnsupportedVocabulary(f"the tokenizer has {len(parts)} components, at most {MAX_COMPONENTS} are allowed")
    patterns = sum(len(str(part["pattern"])) for part in parts if part.get("pattern"))
    if patterns > MAX_PATTERN_CHARACTERS:
        raise UnsupportedVocabulary(
            f"its patterns have {patterns} characters together, at most {MAX_PATTERN_CHARACTERS} are allowed"
        )
    growth = 1
    for component in components(tokenizer, "normalizer"):
        added = max(len(str(component.get(key) or "")) for key in ("content", "prepend"))
        growth *= max(1, added)
        if growth > MAX_GROWTH:
            raise UnsupportedVocabulary(f"its normalizers may make a text more than {MAX_GROWTH} times longer")
