"""The bytes of a knowledge blob: framing, columns and number grids. What the numbers mean is `fedmkt.knowledge`'s.

A blob is an 8-byte magic and a sequence of frames; a frame is a little-endian u32 length and one zstd frame that states
its decompressed size and carries a checksum; inside lies a safetensors file whose tensors are all U8 vectors. A column
of non-negative integers is stored as byte planes `name.0` (lowest byte) to `name.3`, planes above the highest used byte
left out: each plane then has one distribution, and zstd's Huffman coder comes within 2 % of its entropy.
docs/protocol.md lays out every byte.
"""

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import safetensors
import zstandard
from numpy.typing import NDArray
from safetensors.numpy import save as save_tensors

from fedmkt.errors import Refusal

MAGIC = b"FEDMKT-K"
VERSION = 2
# Level 1 wins on both counts here: planes of residues hold no repeats worth finding, and higher levels trade Huffman
# literals for short chance matches (k=128, V=128,256: 270 bytes a row at level 1, 278 at level 3, four times slower).
ZSTD_LEVEL = 1
MAX_PLANES = 4
MAX_FRAMES = 1 << 14  # a frame holds up to 65,536 rows, so the default limits need fewer than 1,000
MAX_COLUMN_TABLE_BYTES = 4096  # safetensors' JSON table of a frame; ours are under 800 bytes

Octets = NDArray[np.uint8]
Floats = NDArray[np.float32]
Columns = Mapping[str, Octets]


class MalformedKnowledge(Refusal):
    code: ClassVar[str] = "knowledge.malformed"
    title: ClassVar[str] = "The knowledge breaks its format"
    remedy: ClassVar[str] = (
        "The blob was changed on its way, or its maker breaks docs/protocol.md: send it again, then look at the maker."
    )


class TruncatedKnowledge(MalformedKnowledge):
    code: ClassVar[str] = "knowledge.truncated"
    title: ClassVar[str] = "The knowledge ends too early"
    remedy: ClassVar[str] = "The file was cut off: send the whole one again."


class UnsupportedKnowledge(MalformedKnowledge):
    code: ClassVar[str] = "knowledge.unsupported_version"
    title: ClassVar[str] = "The knowledge has another format version"


class KnowledgeTooLarge(Refusal):
    status: ClassVar[int] = 413
    code: ClassVar[str] = "knowledge.too_large"
    title: ClassVar[str] = "The knowledge is larger than the receiver accepts"
    remedy: ClassVar[str] = "Lower knowledge.top_k or knowledge.max_tokens, or cut the public set into more slices."


class KnowledgeBomb(KnowledgeTooLarge):
    code: ClassVar[str] = "knowledge.bomb"
    title: ClassVar[str] = "The knowledge would unpack to more than its format allows"
    remedy: ClassVar[str] = "Refuse it, and ask the sender how it was made: no honest encoder writes such a frame."


@dataclass(frozen=True, slots=True)
class Limits:
    """What a receiver is willing to hold; every bound is checked before the memory for it is asked for.

    Decoded arrays take 8 bytes an entry and 16 bytes a row; while decoding comes one block (under 64 MiB) on top.
    """

    blob_bytes: int = 1 << 30
    samples: int = 1 << 23
    rows: int = 1 << 24
    entries: int = 1 << 28


DEFAULT_LIMITS = Limits()


# ------------------------------------------------------------------------------------------------ frames


def write_frame(tensors: Columns) -> bytes:
    """One frame: u32 length, zstd frame with content size and checksum, safetensors file of U8 vectors."""
    content = memoryview(save_tensors(dict(tensors)))
    coder = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compressobj(size=len(content))
    pieces: list[bytes] = []
    # A zstd block that ended in the middle of a column would share one Huffman table over two distributions: up to a
    # tenth of a small blob.
    for start, stop in itertools.pairwise([0, *_column_ends(content)]):
        pieces += [coder.compress(content[start:stop]), coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    packed = b"".join([*pieces, coder.flush()])
    return len(packed).to_bytes(4, "little") + packed


def _column_ends(content: memoryview) -> list[int]:
    """Byte offsets at which the column table and each column of a safetensors file of our own end, ascending."""
    data = 8 + int.from_bytes(content[:8], "little")
    table = json.loads(bytes(content[8:data]))
    return sorted({data, *(data + tensor["data_offsets"][1] for tensor in table.values())})


def split_frames(blob: bytes, limits: Limits) -> list[memoryview]:
    """The compressed frames of a blob, in order, after checks of size, magic, version and lengths. Copies nothing."""
    if len(blob) > limits.blob_bytes:
        raise KnowledgeTooLarge(f"the blob has {len(blob)} bytes, at most {limits.blob_bytes} are accepted")
    _check_magic(blob[: len(MAGIC) + 1])
    frames: list[memoryview] = []
    view, position = memoryview(blob), len(MAGIC) + 1
    while position < len(view):
        length = int.from_bytes(view[position : position + 4], "little")
        position += 4
        if position + length > len(view):
            raise TruncatedKnowledge(f"frame {len(frames)} needs {position + length} bytes, the blob has {len(view)}")
        if len(frames) == MAX_FRAMES:
            raise MalformedKnowledge(f"the blob has more than {MAX_FRAMES} frames")
        frames.append(view[position : position + length])
        position += length
    if not frames:
        raise TruncatedKnowledge(f"the blob has {len(blob)} bytes and ends before its first frame")
    return frames


def _check_magic(start: bytes) -> None:
    if not start.startswith(MAGIC):
        if MAGIC.startswith(start):
            raise TruncatedKnowledge(f"the blob ends after {len(start)} bytes, inside its magic number")
        raise MalformedKnowledge(f"a knowledge blob begins with {MAGIC!r}, this one with {start[: len(MAGIC)]!r}")
    if len(start) == len(MAGIC):
        raise TruncatedKnowledge(f"the blob ends after {len(start)} bytes, before its version")
    if start[-1] != VERSION:
        raise UnsupportedKnowledge(
            f"the blob has format version {start[-1]}, this program reads version {VERSION}; "
            "upgrade the older of the two programs"
        )


def stated_bytes(frame: memoryview, limit: int) -> int:
    """The decompressed size that a frame states; refused when it states none or more than `limit` bytes."""
    try:
        stated = zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise MalformedKnowledge(f"a frame of {len(frame)} bytes is not zstd: {error}") from error
    if stated < 0:
        raise MalformedKnowledge("a zstd frame does not state its decompressed size")
    if stated > limit:
        raise KnowledgeBomb(f"a frame of {len(frame)} bytes unpacks to {stated} bytes, at most {limit} are allowed")
    return int(stated)


def read_frame(frame: memoryview, limit: int) -> dict[str, Octets]:
    """The tensors of one frame, decompressed to at most `limit` bytes; read-only arrays."""
    stated = stated_bytes(frame, limit)
    try:
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MalformedKnowledge(f"a frame of {len(frame)} bytes does not unpack: {error}") from error
    if len(content) != stated:
        raise MalformedKnowledge(f"a frame states {stated} bytes and unpacks to {len(content)}")
    return _read_tensors(content)


def _read_tensors(content: bytes) -> dict[str, Octets]:
    table_bytes = int.from_bytes(content[:8], "little")
    if len(content) < 8 or table_bytes > MAX_COLUMN_TABLE_BYTES:
        raise MalformedKnowledge(
            f"a column table of {table_bytes} bytes in a frame of {len(content)}, at most {MAX_COLUMN_TABLE_BYTES}"
        )
    try:
        tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # the package ships no types
    except safetensors.SafetensorError as error:
        raise MalformedKnowledge(f"a frame does not hold a safetensors file: {error}") from error
    for name, tensor in tensors:
        if tensor["dtype"] != "U8" or len(tensor["shape"]) != 1:
            raise MalformedKnowledge(f"column {name!r} is {tensor['dtype']} {tensor['shape']}, a U8 vector expected")
    return {name: np.frombuffer(tensor["data"], dtype=np.uint8) for name, tensor in tensors}


# ------------------------------------------------------------------------------------------------ columns


def to_planes(name: str, values: NDArray[Any]) -> Iterator[tuple[str, Octets]]:
    """Byte planes of integers in [0, 2^32), lowest first: (`name.0`, uint8 [N]), ... up to the highest byte in use."""
    words = np.ascontiguousarray(values, dtype="<u4")
    top = int(words.max(initial=0))
    octets = words.view(np.uint8).reshape(-1, 4)
    for plane in range(max(1, (top.bit_length() + 7) // 8)):
        yield f"{name}.{plane}", np.ascontiguousarray(octets[:, plane])


def from_planes(tensors: dict[str, Octets], name: str, size: int, planes: int = MAX_PLANES) -> NDArray[np.uint32]:
    """Takes the planes of a column of `size` integers out of `tensors` and joins them: uint32 [size]."""
    octets = np.zeros((size, 4), dtype=np.uint8)
    octets[:, 0] = from_plane(tensors, name, size)
    for plane in range(1, planes):
        if f"{name}.{plane}" not in tensors:
            break
        octets[:, plane] = _take(tensors, f"{name}.{plane}", size)
    return octets.view("<u4").reshape(-1).astype(np.uint32, copy=False)


def from_plane(tensors: dict[str, Octets], name: str, size: int) -> Octets:
    """Takes a column of `size` integers below 256 out of `tensors`: uint8 [size]."""
    return _take(tensors, f"{name}.0", size)


def _take(tensors: dict[str, Octets], plane: str, size: int) -> Octets:
    values = tensors.pop(plane, None)
    if values is None or values.size != size:
        found = "is missing" if values is None else f"has {values.size} values"
        raise MalformedKnowledge(f"column {plane!r} {found}, {size} expected")
    return values


def refuse_unknown(tensors: Columns) -> None:
    """Refuses what is left after every known column was taken out."""
    if tensors:
        raise MalformedKnowledge(f"unknown column {min(tensors)!r}; this format version has no such column")


# ------------------------------------------------------------------------------------------------ number grids
#
# A row's probabilities are stored relative to its largest one, and its tail mass apart, so that the kept mass stays
# exact where a plain grid of log-probabilities would round it above 1. Level l lies (1 + l/22)^2 - 1 nats below the
# row's largest: steps of 1/11 nat where the mass is, coarser below, since an error of u nats at probability p costs
# p u^2 / 2 nats. Measured (benchmarks): mean KL divergence 3e-4 to 7e-4 nats, 4 to 5 bits an entry.

LEVELS_PER_ROOT = 22
TAIL_STEPS_PER_NAT = 10
TAIL_ZERO_LOGIT = 110

LEVEL_NATS: NDArray[np.float64] = (1 + np.arange(256) / LEVELS_PER_ROOT) ** 2 - 1
LEVEL_ODDS: NDArray[np.float64] = np.exp(-LEVEL_NATS)
# Tail code t is the tail mass 1 / (1 + exp((110 - t) / 10)): 1.7e-5 at 0, 0.5 at 110, 1 - 5e-7 at 255.
LOG_KEPT: NDArray[np.float64] = -np.log1p(np.exp((np.arange(256) - TAIL_ZERO_LOGIT) / TAIL_STEPS_PER_NAT))


def to_grid(
    logprobs: Floats, gold_logprobs: Floats, splits: NDArray[Any], vocabulary_size: int
) -> tuple[Octets, Octets, Octets]:
    """Nearest grid codes of rows: levels of their entries [n], levels of their realised tokens [r], tail codes [r].

    logprobs float32 [n] and gold_logprobs float32 [r], nats; splits int [r+1], rising from 0, no row empty. A realised
    token that is kept gets its entry's level. Distances beyond the grid share its last level. A row that keeps the
    whole vocabulary has no tail; its code is 0 and means nothing.
    """
    counts, starts = np.diff(splits), splits[:-1]
    largest = np.maximum.reduceat(logprobs, starts)
    levels = _to_levels(np.repeat(largest, counts) - logprobs)
    gold_levels = _to_levels(np.maximum(largest - gold_logprobs, np.float32(0)))
    mass = np.add.reduceat(np.exp(logprobs, dtype=np.float64), starts)
    return levels, gold_levels, np.where(counts < vocabulary_size, _to_tails(mass), np.uint8(0))


def from_grid(
    levels: Octets, gold_levels: Octets, tails: Octets, splits: NDArray[Any], vocabulary_size: int
) -> tuple[Floats, Floats]:
    """Log-probabilities of rows from their grid codes: float32 of the entries [n] and of the realised tokens [r].

    Computed in float64 and rounded once, so that equal codes give equal values and every value gives its code again.
    """
    counts = np.diff(splits)
    kept = np.where(counts < vocabulary_size, LOG_KEPT[tails], 0.0)
    largest = kept - np.log(np.add.reduceat(LEVEL_ODDS.take(levels), splits[:-1]))
    logprobs = np.repeat(largest, counts)
    logprobs -= LEVEL_NATS.take(levels)
    return logprobs.astype(np.float32), (largest - LEVEL_NATS[gold_levels]).astype(np.float32)


def _to_levels(nats_below: Floats) -> Octets:
    """Levels of distances (>= 0) below a row's largest log-probability."""
    roots = np.sqrt(nats_below + np.float32(1))
    roots -= np.float32(1)
    roots *= np.float32(LEVELS_PER_ROOT)
    np.rint(roots, out=roots)
    return np.asarray(np.minimum(roots, np.float32(255)), dtype=np.uint8)


def _to_tails(kept_mass: NDArray[np.float64]) -> Octets:
    """Tail codes of rows that keep the mass `kept_mass` (> 0; 1 and slightly above become the smallest tail)."""
    odds = np.maximum(1.0 - kept_mass, 1e-9) / np.maximum(kept_mass, 1e-9)
    codes = np.rint(np.log(odds) * TAIL_STEPS_PER_NAT + TAIL_ZERO_LOGIT)
    return np.asarray(np.clip(codes, 0, 255), dtype=np.uint8)
