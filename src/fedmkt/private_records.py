"""Samples from the records of private text: {text}, {prompt, completion} or {messages: [{role, content}, ...]}.

Beside a completion, `choices` may list the answers of which it is one. Other columns are not looked at, ids and domains
neither: they may be a patient's or a customer's. A record that cannot be used becomes a Problem, which says where and
why, without a word of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmkt.private_formats import (
    AS_THEY_ARE,
    EXPECTED,
    SHAPES,
    Columns,
    Fault,
    Kind,
    PrivateSetRefused,
    format_of,
    json_value,
    too_large,
)
from fedmkt.public_set import (
    MAX_PUBLIC_SET_BYTES,
    MAX_SAMPLE_BYTES,
    MAX_SAMPLES,
    PublicSample,
    PublicSet,
    PublicSetTooLarge,
    checked_choices,
)


@dataclass(frozen=True, slots=True)
class Problem:
    """A record that cannot be used: "line 3" and "is not JSON"."""

    place: str
    kind: Kind
    reason: str


def read_samples(path: Path, chat_template: str, columns: Columns = AS_THEY_ARE) -> Iterator[PublicSample | Problem]:
    """Samples and problems in file order; a sample's id is the number of its line, row or file.

    Raises PrivateSetRefused when nothing at all can be read: no such file, an unknown ending, a column that is not
    there, more than MAX_SAMPLES samples or MAX_PUBLIC_SET_BYTES of text.
    """
    form = format_of(path)
    count = size = 0
    for number, record in form.records(path, columns):
        try:
            if isinstance(record, Fault):
                raise record
            sample = _sample(number, record, columns, chat_template)
        except Fault as fault:
            yield Problem(f"{form.word} {number}", fault.kind, fault.reason)
            continue
        count, size = count + 1, size + len(sample.text.encode())
        if count > MAX_SAMPLES or size > MAX_PUBLIC_SET_BYTES:
            raise PrivateSetRefused(
                f"private file: more than {MAX_SAMPLES} samples or {MAX_PUBLIC_SET_BYTES} bytes of text; use a part"
            )
        yield sample


def _sample(number: int, record: object, columns: Columns, chat_template: str) -> PublicSample:
    if not isinstance(record, Mapping):
        raise Fault("malformed", f"is a JSON {type(record).__name__}; an object is needed")
    row = {part: record[column] for part, column in columns.items() if column in record}
    if set(row) not in SHAPES:
        raise Fault("malformed", f"has {' and '.join(row) or 'none of the keys'}; {EXPECTED}")
    choices: tuple[str, ...] = ()
    if "messages" in row:
        prompt, response = _rendered(row["messages"], chat_template)
    else:
        prompt = _text(row.get("prompt", ""), "prompt")
        response = _text(row["text"] if "text" in row else row["completion"], "text" if "text" in row else "completion")
        _check_response(response)
        choices = _choices(record, row.get("completion"))
    start, size = len(prompt.encode()), len(prompt.encode()) + len("".join(choices or (response,)).encode())
    if size > MAX_SAMPLE_BYTES:
        raise too_large(size)
    return PublicSample(str(number), prompt + response, start, "text" not in row, choices=choices)


def _choices(record: Mapping[str, object], completion: object) -> tuple[str, ...]:
    """Answers to choose from, in a column of that name; a CSV cell holds them as a JSON list."""
    choices = record.get("choices")
    if choices in (None, "") or completion is None:
        return ()
    if isinstance(choices, str):
        choices = json_value(choices.encode(errors="surrogatepass"))
    try:
        found = checked_choices(choices, completion)
    except ValueError as error:
        raise Fault("malformed", f"{error}, or rename the column if it is something else") from error
    return tuple(_text(choice, "choice") for choice in found)


def _rendered(messages: object, chat_template: str) -> tuple[str, str]:
    """Prompt and response of a chat, as the public set has them."""
    if isinstance(messages, str):  # a cell of a CSV file
        messages = json_value(messages.encode(errors="surrogatepass"))
    if not isinstance(messages, list) or not messages or not all(isinstance(each, Mapping) for each in messages):
        raise Fault("malformed", "has messages that are no list of {role, content}, at least one")
    chat = [{name: _text(each.get(name), name) for name in ("role", "content")} for each in messages]
    _check_response(chat[-1]["content"])
    try:
        (sample,) = PublicSet.from_jsonl(json.dumps({"messages": chat}).encode(), chat_template).samples
    except PublicSetTooLarge:
        raise too_large(sum(len(text.encode()) for message in chat for text in message.values())) from None
    data = sample.text.encode()
    return data[: sample.response_start].decode(), data[sample.response_start :].decode()


def _text(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise Fault("malformed", f"has a {name} that is no text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Fault("encoding", f"has half a character (a lone surrogate) in its {name}; drop it") from None
    return value


def _check_response(response: str) -> None:
    if not response.strip():
        raise Fault("empty", "has an empty response; drop it")
