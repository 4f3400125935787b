"""The bytes of a vocabulary map: safetensors columns, one JSON text of metadata, nothing of it trusted when read.

The columns are those of `fedmkt.vocab_map.VocabMap`: indptr, ids and distances int32, weights float32. V vocabulary.
"""

import hashlib
import json
from typing import Any, ClassVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from fedmkt.coverage import CoverageAudit
from fedmkt.errors import Refusal
from fedmkt.protocol import Digest, MapMethod
from fedmkt.token_bytes import MAX_VOCABULARY_SIZE

SCHEMA_VERSION = 1
MAX_MAP_BYTES = 64 << 20
MAX_HEADER_BYTES = 1 << 16
MAX_ROW_IDS = 4
WEIGHT_TOLERANCE = 1e-4
COLUMNS = {"indptr": "I32", "ids": "I32", "weights": "F32", "distances": "I32"}
_METADATA = "fedmkt.vocab_map"  # one key: safetensors writes several in no fixed order

Columns = dict[str, NDArray[Any]]


class MalformedMap(Refusal):
    code: ClassVar[str] = "vocab_map.malformed"
    title: ClassVar[str] = "The vocabulary map is broken"
    remedy: ClassVar[str] = "Fetch the map again; if that repeats, upgrade the LLM server that builds it."


class MapTooLarge(Refusal):
    status: ClassVar[int] = 413
    code: ClassVar[str] = "vocab_map.too_large"
    title: ClassVar[str] = "The vocabulary map is too large"
    remedy: ClassVar[str] = "No map of real vocabularies is that large: check which tokenizer the site enrolled with."


class UnsupportedMapVersion(Refusal):
    code: ClassVar[str] = "vocab_map.unsupported_version"
    title: ClassVar[str] = "The vocabulary map has another schema version"


class MapOutOfRange(Refusal):
    code: ClassVar[str] = "vocab_map.out_of_range"
    title: ClassVar[str] = "The vocabulary map holds an impossible value"
    remedy: ClassVar[str] = "Fetch the map again; if that repeats, upgrade the LLM server that builds it."


class CorruptMap(Refusal):
    code: ClassVar[str] = "vocab_map.corrupt"
    title: ClassVar[str] = "The vocabulary map was damaged"


class Header(BaseModel):
    """Whose map it is, how it was made, and what it covers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher_fingerprint: Digest
    student_fingerprint: Digest
    method: MapMethod
    audit: CoverageAudit | None


def pack(header: Header, columns: Columns) -> bytes:
    """The artifact. The same bytes in every process."""
    columns = {name: np.ascontiguousarray(columns[name]) for name in COLUMNS}
    content = header.model_dump() | {"version": SCHEMA_VERSION, "sha256": _digest(columns)}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.numpy.save(columns, {_METADATA: text})


def unpack(data: bytes) -> tuple[Header, Columns]:
    """Header and columns of an artifact, bounded and checked before anything is used; raises this module's Refusals."""
    if len(data) > MAX_MAP_BYTES:
        raise MapTooLarge(f"the map has {len(data)} bytes, at most {MAX_MAP_BYTES} expected")
    header, digest = _read_header(data)
    try:
        columns = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise MalformedMap(f"not a safetensors file: {error}") from error
    if _digest(columns) != digest:
        raise CorruptMap("the columns do not have the SHA-256 that the header names; fetch or build the map again")
    _check_columns(**columns)
    return header, columns


def _read_header(data: bytes) -> tuple[Header, object]:
    """A file's metadata and the SHA-256 of the columns that it names, after a look at the columns it announces."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MalformedMap(f"a header of {length} bytes in a file of {len(data)}, at most {MAX_HEADER_BYTES} expected")
    announced = _parse_object(data[8 : 8 + length])
    metadata = announced.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [_METADATA] or not isinstance(metadata[_METADATA], str):
        raise MalformedMap(f"the metadata must be one text, {_METADATA}")
    kinds = {name: column.get("dtype") for name, column in announced.items() if isinstance(column, dict)}
    if kinds != COLUMNS:
        raise MalformedMap(f"columns {sorted(announced)} of types {kinds}, expected {COLUMNS}")
    content = _parse_object(metadata[_METADATA].encode("utf-8", "surrogatepass"))
    if content.get("version") != SCHEMA_VERSION:
        raise UnsupportedMapVersion(
            f"schema version {content.get('version')!r}, expected {SCHEMA_VERSION}; run the same fedmkt everywhere"
        )
    del content["version"]
    digest = content.pop("sha256", None)
    try:
        return Header.model_validate(content), digest
    except ValidationError as error:
        raise MalformedMap(f"the metadata is not that of a map: {error}") from error


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMap(f"the header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedMap(f"the header must be a JSON object, not {type(content).__name__}")
    return content


def _check_columns(
    indptr: NDArray[np.int32], ids: NDArray[np.int32], weights: NDArray[np.float32], distances: NDArray[np.int32]
) -> None:
    shapes = [column.shape for column in (indptr, ids, weights, distances)]
    rows = indptr.size - 1
    if any(len(shape) != 1 for shape in shapes) or not 0 <= rows <= MAX_VOCABULARY_SIZE:
        raise MalformedMap(f"columns of shapes {shapes}; each is a list, and at most {MAX_VOCABULARY_SIZE} rows")
    counts = indptr[1:].astype(np.int64) - indptr[:-1]
    if indptr[0] != 0 or (counts < 0).any() or (counts > MAX_ROW_IDS).any():
        raise MapOutOfRange(f"row boundaries must begin at 0 and grow by at most {MAX_ROW_IDS} a row")
    if not ids.size == weights.size == indptr[-1] or distances.size != rows:
        raise MalformedMap(
            f"{rows} rows end at {indptr[-1]}, but there are {ids.size} ids, {weights.size} weights and "
            f"{distances.size} distances"
        )
    owners = np.repeat(np.arange(rows), counts)
    if ids.size and not 0 <= ids.min() <= ids.max() < MAX_VOCABULARY_SIZE:
        raise MapOutOfRange(f"student ids from {ids.min()} to {ids.max()}, expected 0 to {MAX_VOCABULARY_SIZE - 1}")
    if np.unique(owners * MAX_VOCABULARY_SIZE + ids).size != ids.size:
        raise MapOutOfRange("a row names the same student id twice")
    if not ((weights >= 0) & (weights <= 1)).all():  # NaN fails both
        raise MapOutOfRange("weights must lie between 0 and 1")
    sums = np.bincount(owners, weights, rows)
    if (np.abs(sums - (counts > 0)) > WEIGHT_TOLERANCE).any():
        raise MapOutOfRange("the weights of a row must sum to 1")
    if ((distances == -1) != (counts == 0)).any() or (distances < -1).any():
        raise MapOutOfRange("a distance is -1 exactly where a row is empty, and never less")


def _digest(columns: Columns) -> str:
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(f"{name} {columns[name].size}\n".encode())
        digest.update(columns[name].tobytes())
    return digest.hexdigest()
