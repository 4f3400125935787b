"""Mutations that know the formats, so that a fuzzer gets past checksums, compression and JSON.

Each takes a valid or broken input and gives another one. `inner(data, size)` is whoever changes plain bytes: libFuzzer
under `make fuzz`, `random_bytes` in the ordinary tests.
"""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy
import zstandard
from numpy.typing import NDArray

from fedmkt.codec import MAGIC
from fedmkt.errors import Refusal
from fedmkt.map_artifact import _METADATA, COLUMNS, SCHEMA_VERSION, _digest, unpack

Inner = Callable[[bytes, int], bytes]
Tensors = dict[str, NDArray[Any]]

HEAD = len(MAGIC) + 1
MOST_BYTES = 1 << 16  # of one frame's contents, and of one column
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 255, 256, 1 << 20, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400),
    *(
        0.0,
        -0.0,
        0.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "a",
        "\ud800",
        "▁",
        "Ġ",
        "<0x41>",
        "##",
        "(a*)*b",
        "a*a*a*b",
    ),
    *("a" * 1025, [], {}, [[]], [None], {"": 0}, [["a", 0.0]], {"type": "ByteLevel"}, {"Regex": "(a+)+$"}),
)


def random_bytes(rng: random.Random) -> Inner:
    """Flips, overwrites, removes or repeats a few bytes: what a fuzzer without feedback does."""

    def change(data: bytes, size: int) -> bytes:
        found = bytearray(data or b"\0")
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(found) or 1)
            kind = rng.randrange(4)
            if kind == 0 and found:
                found[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                found[place : place + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)))
            elif kind == 2:
                del found[place : place + rng.randint(1, 16)]
            else:
                found[place:place] = found[place : place + rng.randint(1, 64)]
        return bytes(found[:size])

    return change


def changed_json(value: Any, rng: random.Random, inner: Inner) -> Any:
    """The same tree with one node replaced, removed, repeated or, where it is a text, changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        rest = {name: each for name, each in value.items() if name != key}
        return rest if rng.random() < 0.1 else rest | {key: changed_json(value[key], rng, inner)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        middle = rng.choice(([], [value[place]] * 2, [changed_json(value[place], rng, inner)]))
        return [*value[:place], *middle, *value[place + 1 :]]
    if isinstance(value, str) and rng.random() < 0.7:
        return inner(value.encode("utf-8", "replace"), 2048).decode("utf-8", "replace")
    if type(value) is int and rng.random() < 0.5:
        return value + rng.choice((-1, 1, 256, -256))
    return rng.choice(ODD_VALUES)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def json_line(data: bytes, rng: random.Random, inner: Inner) -> bytes:
    """One line of JSON changed as a tree; anything that is no JSON as bytes."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    try:
        lines[place] = _dumped(changed_json(json.loads(lines[place]), rng, inner))
    except (ValueError, RecursionError):
        return inner(data, MOST_BYTES)
    if rng.random() < 0.1:
        lines.append(rng.choice(lines))
    return b"\n".join(lines)


# ------------------------------------------------------------------------------------------------ knowledge


def knowledge(data: bytes, rng: random.Random, inner: Inner) -> bytes:
    """A blob with one frame changed beneath its compression and checksum, or frames dropped, repeated, exchanged."""
    frames = _frames(data)
    if not frames or rng.random() < 0.1:
        return inner(data, 4 * MOST_BYTES)
    place = rng.randrange(len(frames))
    if rng.random() < 0.1:
        frames[place : place + 1] = rng.choice(([], [frames[place]] * 2, [rng.choice(frames)]))
    else:
        frames[place] = _changed_frame(frames[place], rng, inner)
    return data[:HEAD] + b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)


def _frames(data: bytes) -> list[bytes]:
    frames, position = [], HEAD
    while position + 4 <= len(data):
        length = int.from_bytes(data[position : position + 4], "little")
        frames.append(data[position + 4 : position + 4 + length])
        position += 4 + length
    return frames


def _changed_frame(frame: bytes, rng: random.Random, inner: Inner) -> bytes:
    try:
        if not 0 < zstandard.frame_content_size(frame) <= 16 * MOST_BYTES:
            return inner(frame, MOST_BYTES)
        content = zstandard.ZstdDecompressor().decompress(frame)
        tensors = safetensors.numpy.load(content)
    except (zstandard.ZstdError, safetensors.SafetensorError, KeyError, ValueError):
        return inner(frame, MOST_BYTES)
    if rng.random() < 0.1:
        content = inner(content, MOST_BYTES)
    else:
        content = safetensors.numpy.save(_changed_columns(tensors, rng, inner))
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)


def _changed_columns(tensors: Tensors, rng: random.Random, inner: Inner) -> Tensors:
    if not tensors:
        return {"entries.0": np.zeros(1, np.uint8)}
    name = rng.choice(sorted(tensors))
    column = tensors[name]
    kind = rng.randrange(20)
    if kind == 0:
        return {other: values for other, values in tensors.items() if other != name}
    if kind == 1:
        return tensors | {name[:-1] + str(rng.randrange(5)): column}
    if kind == 2:
        return tensors | {name: column.astype(np.uint16)}
    if kind == 3:
        return tensors | {name: np.full_like(column, rng.choice((0, 1, 127, 128, 255)))}
    return tensors | {name: _changed_column(name, column, rng, inner)}


def _changed_column(name: str, column: NDArray[Any], rng: random.Random, inner: Inner) -> NDArray[Any]:
    data = column.tobytes()
    if name == "index" and rng.random() < 0.9:
        data = json_line(data.replace(b"\n", b" "), rng, inner)
    else:
        size = len(data)
        data = inner(data, MOST_BYTES)
        if rng.random() < 0.9:  # of the old length: the sizes still agree
            data = data[:size].ljust(size, b"\0")
    return np.frombuffer(data, np.uint8)


# ------------------------------------------------------------------------------------------------ maps


def vocab_map(data: bytes, rng: random.Random, inner: Inner) -> bytes:
    """A map with one column or its metadata changed, under a SHA-256 that is right again."""
    try:
        header, columns = unpack(data)
    except Refusal:
        return inner(data, MOST_BYTES)
    if rng.random() < 0.2:
        return inner(data, MOST_BYTES)
    name = rng.choice(list(COLUMNS))
    old = columns[name]
    size = old.nbytes
    values = inner(old.tobytes(), MOST_BYTES)
    values = values[:size].ljust(size, b"\0") if rng.random() < 0.8 else values[: len(values) // 4 * 4]
    changed = columns | {name: np.frombuffer(values, old.dtype)}
    content: Any = header.model_dump(mode="json") | {"version": SCHEMA_VERSION, "sha256": _digest(changed)}
    if rng.random() < 0.3:
        content = changed_json(content, rng, inner)
    return safetensors.numpy.save(changed, {_METADATA: json.dumps(content)})
