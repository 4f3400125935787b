"""A tokenizer as every party sees it: the exact bytes of each id, the roles of special ids, and where tokens end.

Two tokenizers have nothing in common but the text they cut. So a `Vocabulary` speaks of byte offsets in the UTF-8 text
and of bytes per token; positions, spellings and classes stay inside. V vocabulary, T tokens of one text.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding as RawEncoding
from tokenizers import Tokenizer

from fedmkt.cutting_speed import check_cutting_speed
from fedmkt.protocol import MAX_VOCABULARY_BYTES
from fedmkt.token_bytes import (
    UnsupportedVocabulary,
    added_bytes,
    check_bounds,
    detect_scheme,
    model_tokens,
    token_bytes,
)

ARTIFACT_VERSION = 1
Role = Literal["bos", "eos", "pad", "unk", "turn"]
Name = Literal["bos", "eos", "pad", "unk", "cls", "sep"]
NAMES: tuple[Name, ...] = ("bos", "eos", "pad", "unk", "cls", "sep")

# Spellings by which a bare `tokenizers.Tokenizer`, which names no roles, is understood; the first one present counts.
CONVENTIONAL_SPELLINGS: Mapping[Name, tuple[str, ...]] = MappingProxyType(
    {
        "bos": ("<s>", "<bos>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<|begin▁of▁sentence|>"),
        "eos": ("</s>", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>", "<|eos|>", "<|end▁of▁sentence|>"),
        "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>"),
        "unk": ("<unk>", "[UNK]", "<|unk|>"),
        "cls": ("[CLS]", "<cls>"),
        "sep": ("[SEP]", "<sep>"),
    }
)

_Result = TypeVar("_Result")


class MalformedVocabulary(UnsupportedVocabulary):
    code: ClassVar[str] = "vocabulary.malformed"
    title: ClassVar[str] = "The vocabulary artifact is broken"
    remedy: ClassVar[str] = (
        "Enrol with the tokenizer.json that save_pretrained wrote, and the same version on both sides."
    )


@runtime_checkable
class FastTokenizer(Protocol):
    """A transformers fast tokenizer, as far as it matters here."""

    @property
    def backend_tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True, slots=True)
class Encoding:
    """One text in tokens. ids int32 [T]; ends int32 [T], the byte offset at which each token's text ends.

    Ends never decrease; a leading bos ends at 0, a trailing eos at the text's length. `exact`: the tokens' bytes are
    the text's bytes, so each end is exact. Otherwise (unk, lower-casing, NFC, ...) ends come from character offsets,
    and a token that stops inside a character ends where that character begins. The last text token ends with the text.
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]
    exact: bool


class Cutter(Protocol):
    """What cuts texts for a vocabulary: the library, here or in a process of its own."""

    def cut(self, texts: list[str]) -> list[Encoding]:
        """Each text without bos and eos."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Immutable. `tokens` [V] exact bytes, b"" for special ids and holes; `roles` special id -> role.

    `bos_id` is the id that begins a text: bos, else cls, else eos (as GPT-2 does); `eos_id` ends one: eos, else sep.
    """

    tokens: tuple[bytes, ...]
    roles: Mapping[int, Role]
    bos_id: int | None
    eos_id: int | None
    fingerprint: str
    _artifact: bytes = field(repr=False)
    _cutter: Cutter = field(repr=False)

    @property
    def size(self) -> int:
        return len(self.tokens)

    @cached_property
    def byte_lengths(self) -> NDArray[np.int32]:
        """int32 [V]: bytes of each token."""
        return np.fromiter(map(len, self.tokens), dtype=np.int32, count=len(self.tokens))

    @classmethod
    def from_tokenizer(cls, tok: "FastTokenizer | Tokenizer | Path | str") -> "Vocabulary":
        """From a transformers fast tokenizer, a `tokenizers.Tokenizer`, or a folder with tokenizer.json.

        Raises UnsupportedVocabulary, with the reason, for anything whose tokens have no exact bytes.
        """
        if isinstance(tok, str | Path):
            return _from_folder(Path(tok))
        if isinstance(tok, Tokenizer):
            return _build(tok.to_str(), None)
        backend = getattr(tok, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise UnsupportedVocabulary(
                f"{type(tok).__name__} has no fast backend; load the model's tokenizer with use_fast=True, or convert "
                "it to tokenizer.json"
            )
        return _build(backend.to_str(), {name: getattr(tok, f"{name}_token_id", None) for name in NAMES})

    def to_bytes(self) -> bytes:
        """The artifact: canonical JSON {names, tokenizer, version}. Same bytes for the same tokenizer, everywhere."""
        return self._artifact

    @classmethod
    def from_bytes(cls, data: bytes) -> "Vocabulary":
        """Read an artifact from another party. Nothing in it is trusted: size, ids, growth and speed are bounded.

        What ends the tokenizer library's process all the same ends this one: services read with `VocabularyProcess`.
        """
        if len(data) > MAX_VOCABULARY_BYTES:
            raise MalformedVocabulary(f"the vocabulary has {len(data)} bytes, at most {MAX_VOCABULARY_BYTES} expected")
        content = _parse_object(data)
        if content.get("version") != ARTIFACT_VERSION:
            raise MalformedVocabulary(f"vocabulary version {content.get('version')!r}, expected {ARTIFACT_VERSION}")
        names, tokenizer = content.get("names"), content.get("tokenizer")
        if not isinstance(names, dict) or not isinstance(tokenizer, dict) or len(content) != 3:
            raise MalformedVocabulary("a vocabulary has exactly names (object), tokenizer (object) and version")
        if any(
            name not in NAMES or isinstance(index, bool) or not isinstance(index, int) for name, index in names.items()
        ):
            raise MalformedVocabulary(f"names must map some of {', '.join(NAMES)} to token ids")
        check_bounds(tokenizer)
        found = _build(json.dumps(tokenizer), names)
        check_cutting_speed(lambda text: found._cutter.cut([text]))
        return found

    def encode(
        self, text: str, *, add_bos: bool = True, add_eos: bool = False, max_tokens: int | None = None
    ) -> Encoding:
        """Cut a text. Special tokens spelled out in it are plain text; only our own bos and eos are special."""
        return self.encode_batch([text], add_bos=add_bos, add_eos=add_eos, max_tokens=max_tokens)[0]

    def encode_batch(
        self,
        texts: Sequence[str],
        *,
        add_bos: bool = True,
        add_eos: bool | Sequence[bool] = False,
        max_tokens: int | None = None,
    ) -> list[Encoding]:
        """Encode many texts; `add_eos` may differ by text. `max_tokens` counts bos and eos, what exceeds it is cut."""
        eos = [add_eos] * len(texts) if isinstance(add_eos, bool) else list(add_eos)
        if len(eos) != len(texts):
            raise ValueError(f"{len(eos)} add_eos flags for {len(texts)} texts")
        bodies = self._cutter.cut(list(texts))
        bos_id = self.bos_id if add_bos else None
        encodings = []
        for body, text, with_eos in zip(bodies, texts, eos, strict=True):
            eos_id = self.eos_id if with_eos else None
            encodings.append(_framed(body, len(text.encode()), bos_id, eos_id, max_tokens))
        return encodings

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Callable[[bytes], "Vocabulary"], tuple[bytes]]:
        return Vocabulary.from_bytes, (self._artifact,)


# ------------------------------------------------------------------------------------------------ encoding


@dataclass(frozen=True, eq=False)
class LibraryCutter:
    """The tokenizer library in this process. `tokens` [V] are those of the vocabulary."""

    tokenizer: Tokenizer
    tokens: tuple[bytes, ...]

    @cached_property
    def _byte_lengths(self) -> NDArray[np.int32]:
        return np.fromiter(map(len, self.tokens), dtype=np.int32, count=len(self.tokens))

    def cut(self, texts: list[str]) -> list[Encoding]:
        """Ends from the tokens' bytes where they make the text, else from character offsets."""
        raw = _guarded(self.tokenizer.encode_batch_fast, texts, add_special_tokens=False)
        found = [self._exact(encoding.ids, text.encode()) for encoding, text in zip(raw, texts, strict=True)]
        lossy = [index for index, encoding in enumerate(found) if encoding is None]
        if lossy:
            again = _guarded(self.tokenizer.encode_batch, [texts[index] for index in lossy], add_special_tokens=False)
            for index, encoding in zip(lossy, again, strict=True):
                found[index] = _from_offsets(encoding, texts[index])
        return cast(list[Encoding], found)

    def _exact(self, id_list: list[int], data: bytes) -> Encoding | None:
        """Ends by summing token lengths, if the tokens' bytes are the text or a dummy space and the text; else None."""
        joined = b"".join(map(self.tokens.__getitem__, id_list))
        dummy = len(joined) - len(data)
        if not (joined == data if dummy == 0 else dummy == 1 and joined[0] == 0x20 and joined[1:] == data):
            return None
        ids = np.array(id_list, dtype=np.int32)
        ends = np.cumsum(self._byte_lengths[ids], dtype=np.int32)
        return Encoding(ids, np.maximum(ends - dummy, 0).astype(np.int32), exact=True)


def _framed(body: Encoding, length: int, bos_id: int | None, eos_id: int | None, max_tokens: int | None) -> Encoding:
    before = [] if bos_id is None else [bos_id]
    after = [] if eos_id is None else [eos_id]
    ids = np.concatenate([np.array(before, np.int32), body.ids, np.array(after, np.int32)])[:max_tokens]
    ends = np.concatenate([np.zeros(len(before), np.int32), body.ends, np.full(len(after), length, np.int32)])
    return Encoding(ids, ends[:max_tokens], body.exact)


def _from_offsets(encoding: RawEncoding, text: str) -> Encoding:
    """Ends from character offsets. A token ends where the next one begins if that is earlier: inside a character.

    The last token ends with the text, so what a tokenizer drops at the end (spaces, in BERT) belongs to it.
    """
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    stops = spans[:, 1].copy()
    if len(stops):
        stops[:-1] = np.minimum(stops[:-1], np.maximum(spans[1:, 0], spans[:-1, 0]))
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])
    ends = np.maximum.accumulate(offsets[stops]).astype(np.int32)
    ends[-1:] = offsets[-1]
    return Encoding(np.array(encoding.ids, dtype=np.int32), ends, exact=False)


def _guarded(call: Callable[..., _Result], *arguments: object, **options: object) -> _Result:
    """Call into the tokenizer library. It raises bare `Exception`, and panics with a BaseException, on broken input."""
    try:
        return call(*arguments, **options)
    except Exception as error:
        raise UnsupportedVocabulary(f"the tokenizer library refuses it: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UnsupportedVocabulary(f"the tokenizer library fails on it: {error}") from error


# ------------------------------------------------------------------------------------------------ building


def _parse_object(data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MalformedVocabulary(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedVocabulary(f"a JSON object expected, not {type(content).__name__}")
    return content


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def _from_folder(folder: Path) -> Vocabulary:
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedVocabulary(
            f"{folder} has no tokenizer.json; save the model's fast tokenizer there with save_pretrained"
        )
    spellings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings = _parse_object((folder / name).read_bytes())
            spellings |= {key: settings[f"{key}_token"] for key in NAMES if settings.get(f"{key}_token")}
    source = file.read_text(encoding="utf-8")
    if not spellings:
        return _build(source, None)
    tokenizer: Tokenizer = _guarded(Tokenizer.from_str, source)
    contents = {key: value["content"] if isinstance(value, dict) else value for key, value in spellings.items()}
    return _build(source, {key: tokenizer.token_to_id(str(content)) for key, content in contents.items()})


def _build(source: str, named: Mapping[str, int | None] | None) -> Vocabulary:
    """From the text of a tokenizer.json and the ids of named special tokens; None: go by conventional spellings."""
    tokenizer, content = _load(source)
    size = check_bounds(content)
    if named is None:
        named = _names_by_spelling(content)
    names = {name: index for name in NAMES if (index := named.get(name)) is not None}
    if outside := {name: index for name, index in names.items() if not 0 <= index < size}:
        raise MalformedVocabulary(f"special ids {outside} lie outside a vocabulary of {size}")
    roles = _roles(content, names)
    tokens = _token_table(content, size, roles)
    bos_id = next((names[name] for name in ("bos", "cls", "eos", "sep") if name in names), None)
    eos_id = next((names[name] for name in ("eos", "sep") if name in names), None)
    artifact = _canonical({"version": ARTIFACT_VERSION, "names": names, "tokenizer": content})
    fingerprint = _fingerprint(content, tokens, roles, bos_id, eos_id)
    return Vocabulary(
        tokens, MappingProxyType(roles), bos_id, eos_id, fingerprint, artifact, LibraryCutter(tokenizer, tokens)
    )


def _load(source: str) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer as we use it and its JSON: no padding, truncation, templates or dropout."""
    tokenizer: Tokenizer = _guarded(Tokenizer.from_str, source)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True  # "</s>" in a text is four characters, not the end of the text
    return tokenizer, json.loads(tokenizer.to_str())


def _names_by_spelling(content: dict[str, Any]) -> dict[str, int | None]:
    special = {added["content"]: added["id"] for added in content["added_tokens"] if added["special"]}
    names: dict[str, int | None] = {}
    for name, spellings in CONVENTIONAL_SPELLINGS.items():
        names[name] = next((special[spelling] for spelling in spellings if spelling in special), None)
    return names


def _roles(content: dict[str, Any], names: Mapping[Name, int]) -> dict[int, Role]:
    """Role of every special id. An id with several names has the first of eos, bos, pad, unk; none: turn."""
    roles: dict[int, Role] = {added["id"]: "turn" for added in content["added_tokens"] if added["special"]}
    model = content["model"]
    unknown = model.get("unk_id")
    if model.get("unk_token") is not None:
        unknown = dict(model_tokens(content)).get(model["unk_token"])
    if unknown is not None:
        roles[unknown] = "unk"
    order: tuple[tuple[Name, Role], ...] = (("unk", "unk"), ("pad", "pad"), ("cls", "bos"), ("sep", "eos"))
    for name, role in (*order, ("bos", "bos"), ("eos", "eos")):
        # pad and unk may be borrowed from ordinary text tokens, which keep their bytes
        if name in names and (names[name] in roles or role in ("bos", "eos")):
            roles[names[name]] = role
    return dict(sorted(roles.items()))


def _token_table(content: dict[str, Any], size: int, roles: Mapping[int, Role]) -> tuple[bytes, ...]:
    scheme = detect_scheme(content)
    table = [b""] * size
    for token, index in model_tokens(content):
        table[index] = token_bytes(token, scheme)
    for added in content["added_tokens"]:
        table[added["id"]] = added_bytes(added["content"], scheme)
    for index in roles:
        table[index] = b""
    return tuple(table)


def _fingerprint(
    content: dict[str, Any], tokens: tuple[bytes, ...], roles: Mapping[int, Role], bos: int | None, eos: int | None
) -> str:
    """SHA-256 over the table and everything that changes how text is cut.

    Settings that are off are left out, so a library that gains one more switch does not change the fingerprint; merges
    and scores are in, decoders are not: what they decode to is in the table.
    """
    model = {key: value for key, value in content["model"].items() if value not in (None, False, "", [])}
    cut = {"model": model} | {part: content[part] for part in ("normalizer", "pre_tokenizer", "added_tokens")}
    digest = hashlib.sha256(_canonical({"roles": sorted(roles.items()), "bos": bos, "eos": eos, "cut": cut}))
    digest.update(np.array([len(token) for token in tokens], dtype="<i4").tobytes())
    digest.update(b"".join(tokens))
    return digest.hexdigest()
