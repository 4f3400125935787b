"""Private text as it lies at a site: JSONL, CSV, Parquet, a folder of text files or a `datasets` name.

What cannot be read is named by its place (line, row or file) and never quoted: not its text, not the names of its
columns, not a path.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast
from urllib.parse import parse_qsl

from fedmkt.errors import Refusal
from fedmkt.public_set import MAX_PUBLIC_SET_BYTES, MAX_SAMPLE_BYTES

Part = Literal["text", "prompt", "completion", "messages"]
Kind = Literal["encoding", "malformed", "empty", "too_large"]
Columns = Mapping[Part, str]

PARTS: tuple[Part, ...] = ("text", "prompt", "completion", "messages")
SHAPES = ({"text"}, {"prompt", "completion"}, {"messages"})
AS_THEY_ARE: Columns = MappingProxyType({part: part for part in PARTS})
TEXT_ENDINGS = (".txt", ".text", ".md")
SEPARATORS = ",;\t|"
ROWS_AT_ONCE = 1024
DATASETS = "datasets:"
BOM = "\ufeff"
TO_UTF8 = "save it as UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8"
EXPECTED = "{text}, {prompt, completion} or {messages} is needed, one of them"


class PrivateSetRefused(Refusal):
    code = "private_set.malformed"
    title = "The private file cannot be used"


class PrivateFormatUnknown(PrivateSetRefused):
    code = "private_set.format"
    title = "The private file has no known format"


class LibraryMissing(PrivateSetRefused):
    code = "private_set.extra_missing"
    title = "The library that reads the private text is not installed"
    remedy = "Install the extra that the message names, or convert the text to JSONL."


class BadColumns(Refusal):
    code = "private_set.columns"
    title = "The names of the private columns cannot be used"


class Fault(Exception):
    """Why one record cannot be used. `reason` goes on after the record's place."""

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


@dataclass(frozen=True, slots=True)
class Format:
    """`word`: what a record is called. `records`: number (from 1) and content of each, or what is wrong with it."""

    word: Literal["line", "row", "file"]
    records: Callable[[Path, Columns], Iterator[tuple[int, object]]]


def read_columns(given: str) -> Columns:
    """`prompt=question,completion=answer`: which column is which part. "" leaves the names as they are."""
    if not given.strip():
        return AS_THEY_ARE
    pairs = [pair.partition("=") for pair in given.split(",")]
    columns = {part.strip(): column.strip() for part, _, column in pairs}
    if len(columns) < len(pairs) or set(columns) not in SHAPES or not all(columns.values()):
        raise BadColumns(
            "the private columns must be text=COLUMN, or prompt=COLUMN,completion=COLUMN, or messages=COLUMN; "
            "for example prompt=question,completion=answer"
        )
    return cast(Columns, columns)


def format_of(path: Path) -> Format:
    """By the ending of its name; a file without one is JSONL, a folder holds text files.

    `datasets:NAME?split=train&subset=...&revision=...` is loaded by the `datasets` library, which keeps a copy in its
    cache; only the name is needed, it is a folder or the hub's.
    """
    if str(path).startswith(DATASETS):
        return Format("row", _datasets)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PrivateSetRefused(f"the private file cannot be read: {error.strerror}") from None
    if path.is_dir():
        return FOLDER
    form = FORMATS.get(path.suffix.lower())
    if form is None:
        raise PrivateFormatUnknown(
            f"the private file's ending is none of {', '.join(filter(None, FORMATS))}; convert it, or put text files "
            f"({', '.join(TEXT_ENDINGS)}) into a folder and name the folder"
        )
    if form.word == "line" and size > MAX_PUBLIC_SET_BYTES:  # read whole; Parquet is not
        raise PrivateSetRefused(f"private file: {size} bytes, at most {MAX_PUBLIC_SET_BYTES} are allowed; use a part")
    return form


# ------------------------------------------------------------------------------------------------ formats


def _jsonl(path: Path, columns: Columns) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_content(path).split(b"\n"), start=1):
        if line.strip():
            yield number, json_value(line)


def json_value(line: bytes) -> object:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return Fault("encoding", f"is not UTF-8; {TO_UTF8}")
    except json.JSONDecodeError as error:
        return Fault("malformed", f"is not JSON: {error.msg} at column {error.colno}; one object a line is needed")
    except (ValueError, RecursionError):  # a number of thousands of digits, thousands of brackets
        return Fault("malformed", "is not JSON that can be read; one object a line is needed")


def _csv(path: Path, columns: Columns) -> Iterator[tuple[int, object]]:
    # Bytes that are no UTF-8 become lone surrogates, so that the record in which they stand can be named.
    text = _content(path).decode("utf-8", "surrogateescape")
    separator = "\t" if path.suffix.lower() == ".tsv" else max(SEPARATORS, key=text.partition("\n")[0].count)
    limit = csv.field_size_limit(MAX_PUBLIC_SET_BYTES)  # its own is smaller than a sample may be
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    begins = 1
    try:
        header = next(reader, [])
        _check_header(header, columns)
        begins = reader.line_num + 1
        for fields in reader:
            if fields:
                yield begins, _csv_record(header, fields)
            begins = reader.line_num + 1
    except csv.Error:
        yield begins, Fault("malformed", "has quotes that do not match; nothing after it was read")
    finally:
        csv.field_size_limit(limit)


def _csv_record(header: list[str], fields: list[str]) -> object:
    if len(fields) != len(header):
        return Fault("malformed", f"has {len(fields)} columns, the header {len(header)}; quote texts with separators")
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return Fault("encoding", f"is not UTF-8; {TO_UTF8}")
    return dict(zip(header, fields, strict=True))


def _parquet(path: Path, columns: Columns) -> Iterator[tuple[int, object]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise LibraryMissing("reading Parquet needs pyarrow: pip install 'fedmkt[parquet]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_header(names, columns)
            wanted = [column for column in columns.values() if column in names]
            yield from _numbered(file.iter_batches(ROWS_AT_ONCE, columns=wanted))
    except (pyarrow.ArrowException, OSError):
        raise PrivateSetRefused("private file: it is no Parquet that can be read") from None


def _datasets(path: Path, columns: Columns) -> Iterator[tuple[int, object]]:
    name, _, query = str(path).removeprefix(DATASETS).partition("?")
    asked = dict(parse_qsl(query))
    if not name or asked.keys() - {"split", "subset", "revision"}:
        raise PrivateFormatUnknown("give datasets:NAME, or datasets:NAME?split=train&subset=SUBSET&revision=COMMIT")
    try:
        import datasets
    except ModuleNotFoundError:
        raise LibraryMissing("a datasets: name needs the library: pip install 'fedmkt[datasets]'") from None
    datasets.utils.logging.set_verbosity_error()  # what it says otherwise names what it loads
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(
            name, asked.get("subset"), split=asked.get("split", "train"), revision=asked.get("revision")
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PrivateSetRefused(
            f"the data set cannot be loaded ({type(error).__name__}); check its name, subset, split (train where none "
            "is given) and revision, and that this machine may read it"
        ) from None
    _check_header(table.column_names, columns)
    wanted = [column for column in columns.values() if column in table.column_names]
    yield from _numbered(table.select_columns(wanted).with_format("arrow").iter(ROWS_AT_ONCE))


def _numbered(batches: Iterable[Any]) -> Iterator[tuple[int, object]]:
    read = 0
    for batch in batches:
        yield from enumerate(_rows(batch), start=read + 1)
        read += batch.num_rows


def _rows(batch: Any) -> Iterable[object]:
    """Rows of a pyarrow.RecordBatch or Table without nulls: a table of several shapes fills the other columns so."""
    try:
        return [_without_nulls(row) for row in batch.to_pylist()]
    except UnicodeDecodeError:
        return [_row(batch, index) for index in range(batch.num_rows)]


def _row(batch: Any, index: int) -> object:
    try:
        return _without_nulls(batch.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError:
        return Fault("encoding", "is not UTF-8; write the column again from decoded text")


def _without_nulls(row: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if value is not None}


def _folder(path: Path, columns: Columns) -> Iterator[tuple[int, object]]:
    """One record a file, in order of the names below the folder; hidden files and folders are passed over."""
    if "text" not in columns:
        raise PrivateSetRefused("private folder: text files have no columns; leave FEDMKT_PRIVATE_COLUMNS out")
    inside = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    shown = [name for name in inside if not any(piece.startswith(".") for piece in name.split("/"))]
    for number, name in enumerate(shown, start=1):
        yield number, _text_file(path / name, columns)


def _text_file(path: Path, columns: Columns) -> object:
    if not path.name.lower().endswith(TEXT_ENDINGS):
        return Fault("malformed", f"(in order of names) ends in none of {', '.join(TEXT_ENDINGS)}; take it out")
    try:
        size = path.stat().st_size
        if size > MAX_SAMPLE_BYTES:
            return too_large(size)
        return {columns.get("text", "text"): path.read_bytes().decode("utf-8").removeprefix(BOM)}
    except UnicodeDecodeError:
        return Fault("encoding", f"(in order of names) is not UTF-8; {TO_UTF8}")
    except OSError as error:
        return Fault("malformed", f"(in order of names) cannot be read: {error.strerror}")


JSONL, CSV, FOLDER = Format("line", _jsonl), Format("line", _csv), Format("file", _folder)
FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".jsonl": JSONL,
        ".ndjson": JSONL,
        ".json": JSONL,
        "": JSONL,
        ".csv": CSV,
        ".tsv": CSV,
        ".parquet": Format("row", _parquet),
    }
)


def _content(path: Path) -> bytes:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise PrivateSetRefused(f"the private file cannot be read: {error.strerror}") from None
    if source.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise PrivateSetRefused(
            "private file: it is UTF-16; save it as UTF-8, for example with iconv -f UTF-16 -t UTF-8"
        )
    return source.removeprefix(BOM.encode())


def _check_header(header: list[str], columns: Columns) -> None:
    """One shape at least must be there whole, and each of its columns once."""
    known = [part for part in PARTS if columns.get(part) in header]
    if not any(shape <= set(known) for shape in SHAPES):
        raise PrivateSetRefused(
            f"private file: {len(header)} columns, and those to read are not all there; {EXPECTED}: say which columns "
            "they are with FEDMKT_PRIVATE_COLUMNS, for example prompt=question,completion=answer"
        )
    if any(header.count(columns[part]) > 1 for part in known):
        raise PrivateSetRefused("private file: the header names one of the needed columns twice; rename one")


def too_large(size: int) -> Fault:
    return Fault("too_large", f"has {size} bytes, at most {MAX_SAMPLE_BYTES} are allowed; split it")
