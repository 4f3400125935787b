"""The public set: the ordered samples that all parties hold, named by the digest of their canonical form.

A line of the JSONL source is `{id, prompt, completion}`, `{id, text}` or `{id, messages: [{role, content}, ...]}`, each
with an optional `domain`; `id` defaults to the line's number. Only the response counts for knowledge and loss: the
completion, the whole text, or the last message. Beside a completion may stand `choices`, a list of answers of which it
is one: held-out samples that have them are also evaluated as questions with several answers.
"""

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from fedmkt.errors import Refusal

MAX_PUBLIC_SET_BYTES = 1 << 30
MAX_SAMPLES = 5_000_000
MAX_SAMPLE_BYTES = 1 << 20
MAX_ID_CHARACTERS = 200
MAX_DOMAIN_CHARACTERS = 100
MAX_CHOICES = 100
DEFAULT_CHAT_TEMPLATE = "{role}: {content}\n"


class PublicSetRefusal(Refusal):
    code: ClassVar[str] = "public_set.malformed"
    title: ClassVar[str] = "The public set is malformed"
    remedy: ClassVar[str] = "Correct the line that is named: an object with {prompt, completion}, {text} or {messages}."


class MalformedSample(PublicSetRefusal):
    """A line that is not one of the three shapes."""


class DuplicateSample(PublicSetRefusal):
    code: ClassVar[str] = "public_set.duplicate_id"
    title: ClassVar[str] = "Two samples have one id"
    remedy: ClassVar[str] = "Give each line an id of its own, or leave the ids out."


class EmptyResponse(PublicSetRefusal):
    code: ClassVar[str] = "public_set.empty_response"
    title: ClassVar[str] = "A sample has nothing to learn from"


class NotUnicode(PublicSetRefusal):
    code: ClassVar[str] = "public_set.not_unicode"
    title: ClassVar[str] = "A sample holds half a character"
    remedy: ClassVar[str] = "Drop or repair the character; text has to be valid UTF-8."


class PublicSetTooLarge(PublicSetRefusal):
    status: ClassVar[int] = 413
    code: ClassVar[str] = "public_set.too_large"
    title: ClassVar[str] = "The public set is too large"


class EmptyPublicSet(PublicSetRefusal):
    code: ClassVar[str] = "public_set.empty"
    title: ClassVar[str] = "The public set has no samples"


class TooFewSamples(PublicSetRefusal):
    code: ClassVar[str] = "public_set.too_few_samples"
    title: ClassVar[str] = "The public set is too small for its slices"


class BadChatTemplate(PublicSetRefusal):
    code: ClassVar[str] = "public_set.chat_template"
    title: ClassVar[str] = "The chat template cannot be used"
    remedy: ClassVar[str] = "Write the template with {content} once, for example 'User: {content}\n'."


@dataclass(frozen=True, slots=True)
class PublicSample:
    """One sample. `response_start`: byte offset in the UTF-8 text at which the response begins (0 for `{id, text}`).

    `ends`: an end-of-text token follows the text, where the vocabulary has one (prompt/completion and chat). `choices`:
    answers to choose from, of which the response is one; empty for no such question.
    """

    id: str
    text: str
    response_start: int
    ends: bool
    domain: str | None = None
    choices: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        return self.text.encode()[: self.response_start].decode()

    @property
    def response(self) -> str:
        return self.text.encode()[self.response_start :].decode()


@dataclass(frozen=True, slots=True)
class PublicParts:
    """Sample indices, ascending: a held-out part for evaluation and gates, and the slices, one a round."""

    holdout: tuple[int, ...]
    slices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class PublicSet:
    samples: tuple[PublicSample, ...]
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.samples:
            raise EmptyPublicSet("the public set has 0 samples; give at least one line of JSON")
        object.__setattr__(self, "digest", hashlib.sha256(self._canonical).hexdigest())

    def __len__(self) -> int:
        return len(self.samples)

    @classmethod
    def from_jsonl(cls, source: bytes, chat_template: str = DEFAULT_CHAT_TEMPLATE) -> "PublicSet":
        """Read JSONL (UTF-8, blank lines skipped). Raises a PublicSetRefusal that names the line.

        `chat_template` renders one message; `{role}` and `{content}` are replaced, nothing is evaluated. The rendering
        of the last message stops at its content, which is the response.
        """
        if len(source) > MAX_PUBLIC_SET_BYTES:
            raise PublicSetTooLarge(f"{len(source)} bytes, at most {MAX_PUBLIC_SET_BYTES} are allowed; use a subset")
        if chat_template.count("{content}") != 1:
            raise BadChatTemplate(f"the chat template {chat_template!r} must hold {{content}} exactly once")
        samples: list[PublicSample] = []
        line_of: dict[str, int] = {}
        for number, line in enumerate(source.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
            if not line.strip():
                continue
            sample = _read_line(line, number, chat_template)
            if sample.id in line_of:
                raise DuplicateSample(f"lines {line_of[sample.id]} and {number} both have id {sample.id!r}")
            line_of[sample.id] = number
            samples.append(sample)
            if len(samples) > MAX_SAMPLES:
                raise PublicSetTooLarge(f"more than {MAX_SAMPLES} samples; use a subset")
        return cls(tuple(samples))

    @cached_property
    def _canonical(self) -> bytes:
        return b"".join(map(_canonical_line, self.samples))

    def to_jsonl(self) -> bytes:
        """Canonical form, whose SHA-256 is `digest`: one shape per line, fixed key order, no spare white space."""
        return self._canonical

    def parts(self, slices: int, holdout_share: float) -> PublicParts:
        """Cut into a held-out part and `slices` slices that differ by at most one sample.

        Every party computes the same cut: samples are ordered by SHA-256 of their id within their domain, and the
        domains interleaved in proportion, so each part holds each domain's share to within a sample.
        """
        order = self._mixed_order()
        held = round(holdout_share * len(order))
        if holdout_share > 0:
            held = max(1, held)
        rest = order[held:]
        if len(rest) < slices:
            raise TooFewSamples(
                f"{len(self)} samples less {held} held out leave {len(rest)} for {slices} slices; "
                "add samples or cut fewer slices"
            )
        bounds = [len(rest) * index // slices for index in range(slices + 1)]
        cuts = (tuple(sorted(rest[start:stop])) for start, stop in itertools.pairwise(bounds))
        return PublicParts(tuple(sorted(order[:held])), tuple(cuts))

    def _mixed_order(self) -> list[int]:
        keys = [hashlib.sha256(sample.id.encode()).digest() for sample in self.samples]
        by_domain: dict[str | None, list[int]] = defaultdict(list)
        for index in sorted(range(len(keys)), key=keys.__getitem__):
            by_domain[self.samples[index].domain].append(index)
        placed = [
            ((2 * rank + 1) / len(members), keys[index], index)
            for members in by_domain.values()
            for rank, index in enumerate(members)
        ]
        return [index for _, _, index in sorted(placed)]


def _read_line(line: bytes, number: int, chat_template: str) -> PublicSample:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedSample(f"line {number} is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise MalformedSample(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise MalformedSample(f"line {number} is a JSON {type(row).__name__}, an object expected")
    sample_id = number if row.get("id") is None else row["id"]
    if isinstance(sample_id, bool) or not isinstance(sample_id, str | int) or sample_id == "":
        raise MalformedSample(f"line {number}: id must be a text or a whole number, not {sample_id!r}")
    prompt, response, ends = _prompt_and_response(row, number, chat_template)
    choices = _choices(row, number)
    domain = _text(row, "domain", number, optional=True)
    return _checked(str(sample_id), prompt, response, ends, domain, choices, number)


def _choices(row: Mapping[str, Any], number: int) -> tuple[str, ...]:
    if "choices" not in row:
        return ()
    try:
        return checked_choices(row["choices"], row.get("completion"))
    except ValueError as error:
        raise MalformedSample(f"line {number} {error}") from error


def checked_choices(choices: object, completion: object) -> tuple[str, ...]:
    """A question's answers: 2 to MAX_CHOICES different texts, one of them the completion. Raises ValueError."""
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("has choices that are no list of texts with something in them")
    if not 2 <= len(choices) <= MAX_CHOICES or len(set(choices)) < len(choices):
        raise ValueError(f"has {len(choices)} choices; give 2 to {MAX_CHOICES}, no two of them equal")
    if completion not in choices:
        raise ValueError("has a completion that is none of its choices; write the right one exactly as among them")
    return tuple(choices)


def _checked(
    sample_id: str,
    prompt: str,
    response: str,
    ends: bool,
    domain: str | None,
    choices: tuple[str, ...],
    number: int,
) -> PublicSample:
    if not response.strip():
        raise EmptyResponse(f"line {number}: sample {sample_id!r} has an empty response; drop it")
    try:
        start, length = len(prompt.encode()), len("".join(choices or (response,)).encode())
        (sample_id + (domain or "")).encode()
    except UnicodeEncodeError as error:
        raise NotUnicode(f"line {number}: sample {sample_id!a} holds a lone surrogate: {error}") from error
    if start + length > MAX_SAMPLE_BYTES:
        raise PublicSetTooLarge(
            f"line {number}: {start + length} bytes in a sample, at most {MAX_SAMPLE_BYTES} allowed"
        )
    for name, value, limit in (("id", sample_id, MAX_ID_CHARACTERS), ("domain", domain or "", MAX_DOMAIN_CHARACTERS)):
        if len(value) > limit:
            raise PublicSetTooLarge(f"line {number}: {name} has {len(value)} characters, at most {limit} allowed")
    return PublicSample(sample_id, prompt + response, start, ends, domain, choices)


def _prompt_and_response(row: Mapping[str, Any], number: int, chat_template: str) -> tuple[str, str, bool]:
    shapes = [key for key in ("completion", "text", "messages") if key in row]
    if len(shapes) != 1 or ("prompt" in row) != (shapes == ["completion"]):
        raise MalformedSample(
            f"line {number} has {', '.join(map(repr, row)) or 'no keys'}; expected {{prompt, completion}}, {{text}} or "
            "{messages}, one of them"
        )
    if shapes == ["text"]:
        return "", _text(row, "text", number) or "", False
    if shapes == ["completion"]:
        return _text(row, "prompt", number) or "", _text(row, "completion", number) or "", True
    return (*_render(row["messages"], number, chat_template), True)


def _text(row: Mapping[str, Any], key: str, number: int, *, optional: bool = False) -> str | None:
    value = row.get(key)
    if value is None and optional:
        return None
    if not isinstance(value, str):
        raise MalformedSample(f"line {number}: {key} must be a text, not {type(value).__name__}")
    return value


def _render(messages: object, number: int, chat_template: str) -> tuple[str, str]:
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise MalformedSample(f"line {number}: messages must be a list of {{role, content}}, at least one")
    pairs = [(_text(message, "role", number) or "", _text(message, "content", number) or "") for message in messages]
    rendered = "".join(_fill(chat_template, role, content) for role, content in pairs[:-1])
    role, response = pairs[-1]
    return rendered + _fill(chat_template.split("{content}")[0], role, ""), response


def _fill(template: str, role: str, content: str) -> str:
    """One pass, so braces inside a message stay as they are."""
    return re.sub(r"\{(role|content)\}", lambda match: role if match[1] == "role" else content, template)


def _canonical_line(sample: PublicSample) -> bytes:
    row: dict[str, object] = {"id": sample.id}
    if sample.ends:
        row |= {"prompt": sample.prompt, "completion": sample.response}
    else:
        row["text"] = sample.text
    if sample.choices:
        row["choices"] = sample.choices
    if sample.domain is not None:
        row["domain"] = sample.domain
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
