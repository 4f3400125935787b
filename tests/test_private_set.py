"""The site's own text: read without letting any of it out, and cut so that the gate's part stays the same."""

import csv
import json
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from pydantic import ValidationError

from fedmkt.private_formats import (
    BadColumns,
    LibraryMissing,
    PrivateFormatUnknown,
    PrivateSetRefused,
    read_columns,
)
from fedmkt.private_records import Problem, read_samples
from fedmkt.private_set import MIN_HOLDOUT, PrivateSetTooSmall, read_private_set, split_private
from fedmkt.public_set import MAX_SAMPLE_BYTES, PublicSample, PublicSet
from fedmkt_client_agent.settings import Settings
from live_coordinator import stories

TEMPLATE = "{role}: {content}\n"


def samples(*texts: str) -> tuple[PublicSample, ...]:
    return tuple(PublicSample(str(number), text, 0, False) for number, text in enumerate(texts))


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "patients.jsonl"
    path.write_bytes(content)
    return path


def test_every_shape_of_line_is_read(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"note {n}"} for n in range(20)]
    rows[3] = {"prompt": "Q: why?", "completion": " because"}
    rows[4] = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    private = read_private_set(written(tmp_path, b"\n".join(json.dumps(row).encode() for row in rows)), 0.1, TEMPLATE)
    everything = {sample.text: sample for sample in (*private.train, *private.holdout)}
    assert len(everything) == 20
    assert everything["Q: why? because"].response_start == len("Q: why?")
    assert everything["user: hi\nassistant: hello"].response_start == len("user: hi\nassistant: ")


def test_choices_are_read_beside_a_completion_also_from_a_cell(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}+1=", "completion": f"{n + 1}", "choices": [f"{n}", f"{n + 1}"]} for n in range(20)]
    from_lines = read_private_set(
        written(tmp_path, b"\n".join(json.dumps(row).encode() for row in rows)), 0.1, TEMPLATE
    )
    table = tmp_path / "questions.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("prompt", "completion", "choices"))
        writer.writeheader()
        writer.writerows({**row, "choices": json.dumps(row["choices"])} for row in rows)
    from_cells = read_private_set(table, 0.1, TEMPLATE)
    found = {sample.prompt: sample.choices for sample in (*from_lines.train, *from_lines.holdout)}
    assert found["4+1="] == ("4", "5")
    assert found == {sample.prompt: sample.choices for sample in (*from_cells.train, *from_cells.holdout)}


def test_ids_and_domains_stay_out(tmp_path: Path) -> None:
    rows = [{"id": "patient 4711", "domain": "ward 6", "text": f"note {n}"} for n in range(20)]
    private = read_private_set(written(tmp_path, b"\n".join(json.dumps(row).encode() for row in rows)), 0.1, TEMPLATE)
    assert len(private.train) + len(private.holdout) == 20, "ids that repeat are no obstacle: they are not read"
    for sample in (*private.train, *private.holdout):
        assert sample.id.isdigit()
        assert sample.domain is None
    assert "4711" not in repr(private)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "secret diagnosis', "line 3 is not JSON"),
        (b'{"text": ""}', "line 3 has an empty response; drop it"),
        (b'{"text": 5}', "line 3 has a text that is no text but int"),
        (b'{"prompt": "a", "completion": "diagnosis", "choices": {}}', "rename the column if it is something else"),
        (b'{"prompt": "a", "completion": "b", "choices": ["diagnosis", "c"]}', "line 3 has a completion that is none"),
        (b'["secret diagnosis"]', "line 3 is a JSON list; an object is needed"),
        (b'{"note": "secret diagnosis"}', "line 3 has none of the keys; {text}"),
        (b'{"text": "secret \xff diagnosis"}', "line 3 is not UTF-8"),
        (b'{"id": 9, "text": "secret \\ud800 diagnosis"}', "line 3 has half a character"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path, b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(PrivateSetRefused, match=re.escape(message)) as caught:
        read_private_set(path, 0.1, TEMPLATE)
    said = caught.value.detail
    assert "diagnosis" not in said
    assert str(tmp_path) not in said


def test_a_file_that_is_not_there_is_refused_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(PrivateSetRefused, match="cannot be read: No such file") as caught:
        read_private_set(tmp_path / "nothing.jsonl", 0.1, TEMPLATE)
    assert "nothing" not in caught.value.detail


# ------------------------------------------------------------------------------------------------ formats

ROWS: list[dict[str, object]] = [
    {"prompt": "Q: why?", "completion": ' because, "so"'},
    {"prompt": "", "completion": "two\nlines; one\ttab"},
    {"prompt": "Où?", "completion": "日本語 🎉"},
]
SECRET = "4711 diagnosis"


def read(path: Path, columns: str = "") -> list[PublicSample | Problem]:
    return list(read_samples(path, TEMPLATE, read_columns(columns)))


def jsonl(*rows: object) -> bytes:
    return b"\n".join(json.dumps(row).encode() for row in rows)


def as_csv(path: Path, rows: list[dict[str, object]], separator: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def kept(found: list[PublicSample | Problem]) -> list[tuple[str, int, bool]]:
    assert all(isinstance(each, PublicSample) for each in found), found
    return [(each.text, each.response_start, each.ends) for each in found if isinstance(each, PublicSample)]


def test_every_format_gives_what_the_public_set_would(tmp_path: Path) -> None:
    expected = [(each.text, each.response_start, each.ends) for each in PublicSet.from_jsonl(jsonl(*ROWS)).samples]
    assert kept(read(written(tmp_path, jsonl(*ROWS)))) == expected
    assert kept(read(as_csv(tmp_path / "a.csv", ROWS))) == expected
    assert kept(read(as_csv(tmp_path / "b.CSV", ROWS, ";"))) == expected
    assert kept(read(as_csv(tmp_path / "c.tsv", ROWS, "\t"))) == expected
    assert kept(read(as_parquet(tmp_path / "d.parquet", ROWS))) == expected


def test_a_chat_is_rendered_as_the_public_set_renders_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "{role} é?"}, {"role": "assistant", "content": "yes {content}"}]
    (expected,) = PublicSet.from_jsonl(jsonl({"messages": chat}), TEMPLATE).samples
    wanted = [(expected.text, expected.response_start, True)]
    assert kept(read(written(tmp_path, jsonl({"messages": chat})))) == wanted
    assert kept(read(as_parquet(tmp_path / "a.parquet", [{"messages": chat}]))) == wanted
    assert kept(read(as_csv(tmp_path / "a.csv", [{"messages": json.dumps(chat)}]))) == wanted


def test_columns_of_other_names_are_read_and_the_rest_is_not_looked_at(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"id": SECRET, "question": "why?", "answer": " so", "text": "not this"}]
    given = "prompt=question, completion=answer"
    for path in (
        written(tmp_path, jsonl(*rows)),
        as_csv(tmp_path / "a.csv", rows),
        as_parquet(tmp_path / "a.parquet", rows),
    ):
        assert read(path, given) == [PublicSample("2" if path.suffix == ".csv" else "1", "why? so", 4, True)]


@pytest.mark.parametrize(
    "given", ["prompt=a", "text=a,prompt=b", "text", "text=", "answer=a", "text=a,text=b", "messages=a,"]
)
def test_columns_that_make_no_sample_are_refused(given: str) -> None:
    with pytest.raises(BadColumns, match="prompt=question,completion=answer"):
        read_columns(given)


def test_the_agent_s_setting_of_columns_is_judged_at_its_start(tmp_path: Path) -> None:
    values: dict[str, Any] = {"coordinator_url": "http://c", "model": "m", "private_file": tmp_path}
    assert Settings(**values).private_columns == ""
    assert Settings(**values, private_columns="text=note").private_columns == "text=note"
    with pytest.raises(ValidationError, match="text=COLUMN, or prompt=COLUMN,completion=COLUMN"):
        Settings(**values, private_columns="note")


def test_a_record_of_csv_is_named_by_the_line_where_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,"more\n"\n"one\ntwo",x\n\nthree,x\nfour\n\xff\xe9,x\n,x\n"open ' + SECRET.encode())
    found = read(path)
    assert [each.id for each in found if isinstance(each, PublicSample)] == ["3", "6"]
    assert [(each.place, each.kind) for each in found if isinstance(each, Problem)] == [
        ("line 7", "malformed"),
        ("line 8", "encoding"),
        ("line 9", "empty"),
        ("line 10", "malformed"),
    ]
    assert "diagnosis" not in str(found[-1])


def test_a_text_may_be_longer_than_the_csv_library_s_own_limit(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert kept(read(as_csv(tmp_path / "a.csv", [{"text": "a" * (limit + 1)}]))) == [("a" * (limit + 1), 0, False)]
    assert csv.field_size_limit() == limit


def test_rows_of_parquet_are_numbered_through_and_nulls_make_way_for_other_shapes(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"text": f"note {n}", "prompt": None, "completion": None} for n in range(1500)]
    rows[1400] = {"text": None, "prompt": "why?", "completion": " so"}
    rows[1401] = {"text": "both", "prompt": "why?", "completion": SECRET}
    rows[1402] = {"text": None, "prompt": None, "completion": None}
    found = read(as_parquet(tmp_path / "a.parquet", rows))
    assert len(found) == 1500
    assert found[1400] == PublicSample("1401", "why? so", 4, True)
    expected = "{text}, {prompt, completion} or {messages} is needed, one of them"
    assert found[1401:1403] == [
        Problem("row 1402", "malformed", f"has text and prompt and completion; {expected}"),
        Problem("row 1403", "malformed", f"has none of the keys; {expected}"),
    ]


def test_a_parquet_row_of_bytes_that_are_no_text_is_named_alone(tmp_path: Path) -> None:
    ends = np.array([0, 3, 5, 9], dtype=np.int32).tobytes()
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, [None, pyarrow.py_buffer(ends), pyarrow.py_buffer(b"one\xff\xfefour")]
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path)
    found = read(path)
    assert [each.text for each in found if isinstance(each, PublicSample)] == ["one", "four"]
    assert [(each.place, each.kind) for each in found if isinstance(each, Problem)] == [("row 2", "encoding")]


def test_a_folder_gives_one_sample_a_file_in_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "c.txt").write_bytes(b"\xef\xbb\xbfthird")
    (folder / "a.md").write_text("first")
    (folder / "b" / "x.TXT").write_text("second")
    (folder / ".git" / "d.txt").write_text("hidden")
    (folder / ".hidden.txt").write_text("hidden")
    assert kept(read(folder)) == [("first", 0, False), ("second", 0, False), ("third", 0, False)]
    (folder / f"{SECRET}.docx").write_bytes(b"PK")
    (folder / "z.txt").write_bytes(b"\xe9")
    problems = [each for each in read(folder) if isinstance(each, Problem)]
    assert [(each.place, each.kind) for each in problems] == [("file 1", "malformed"), ("file 5", "encoding")]
    assert "diagnosis" not in str(problems)
    with pytest.raises(PrivateSetRefused, match="text files have no columns"):
        read(folder, "prompt=a,completion=b")


def test_the_ending_says_the_format_and_an_unknown_one_is_refused_without_its_name(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(jsonl({"text": "one"}))
    assert kept(read(tmp_path / "secret")) == [("one", 0, False)]
    (tmp_path / "smith.diagnosis").write_bytes(b"text")
    with pytest.raises(PrivateFormatUnknown, match=r"none of \.jsonl, .*\.parquet; convert it") as caught:
        read(tmp_path / "smith.diagnosis")
    assert "diagnosis" not in caught.value.detail
    assert "smith" not in caught.value.detail


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", SECRET.encode() + b"\nmore\n", "1 columns, and those to read are not all there"),
        ("a.csv", b"", "0 columns"),
        ("a.csv", b"text,text\na,b\n", "one of the needed columns twice"),
        ("a.csv", SECRET.encode("utf-16"), "it is UTF-16"),
        ("a.jsonl", SECRET.encode("utf-16"), "it is UTF-16"),
        ("a.parquet", SECRET.encode(), "no Parquet that can be read"),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused_without_a_word_of_it(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrivateSetRefused, match=message) as caught:
        read(tmp_path / name)
    assert "diagnosis" not in caught.value.detail
    assert str(tmp_path) not in caught.value.detail


def test_parquet_without_its_columns_or_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_parquet(tmp_path / "a.parquet", [{SECRET: "a"}])
    with pytest.raises(PrivateSetRefused, match="1 columns, and those to read are not all there") as caught:
        read(path)
    assert "diagnosis" not in caught.value.detail
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(LibraryMissing, match=r"pip install 'fedmkt\[parquet\]'"):
        read(path)


@pytest.fixture
def data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a data set of two splits, 30 and 5 rows."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "notes").mkdir()
    for split, count in (("train", 30), ("test", 5)):
        rows = [{"id": n, "note": f"{split} {n}", "other": SECRET} for n in range(count)]
        (tmp_path / "notes" / f"{split}.jsonl").write_bytes(jsonl(*rows))
    return f"datasets:{tmp_path}/notes"


def test_a_data_set_is_loaded_by_name(data_set: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert kept(read(Path(data_set), "text=note")) == [(f"train {n}", 0, False) for n in range(30)]
    assert kept(read(Path(f"{data_set}?split=test"), "text=note")) == [(f"test {n}", 0, False) for n in range(5)]
    assert capfd.readouterr() == ("", "")


def test_a_data_set_that_cannot_be_read_is_refused_without_its_name(
    data_set: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given, message in (
        (f"{data_set}?split=diagnosis", r"cannot be loaded \(ValueError\); check its name, subset, split"),
        (f"{data_set}?part=diagnosis", "give datasets:NAME"),
        ("datasets:?split=train", "give datasets:NAME"),
        (data_set, "3 columns, and those to read are not all there"),
    ):
        with pytest.raises(PrivateSetRefused, match=message) as caught:
            read(Path(given))
        assert "diagnosis" not in caught.value.detail
        assert "notes" not in caught.value.detail
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LibraryMissing, match=r"pip install 'fedmkt\[datasets\]'"):
        read(Path(data_set))


def test_a_sample_beyond_the_limit_is_named_with_both_numbers(tmp_path: Path) -> None:
    size = MAX_SAMPLE_BYTES + 1
    chat = [{"role": "user", "content": "a" * size}, {"role": "assistant", "content": "b"}]
    found = read(written(tmp_path, jsonl({"text": "a" * size}, {"text": "a" * MAX_SAMPLE_BYTES}, {"messages": chat})))
    assert found[0] == Problem("line 1", "too_large", f"has {size} bytes, at most {size - 1} are allowed; split it")
    assert isinstance(found[1], PublicSample)
    assert isinstance(found[2], Problem)
    assert found[2].kind == "too_large"
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a" * size)
    assert read(tmp_path / "texts") == [Problem("file 1", "too_large", found[0].reason)]


@pytest.mark.parametrize(
    "messages",
    [[], "diagnosis", [1], [{"role": "user"}], [{"role": "user", "content": ["diagnosis"]}], {"diagnosis": "a"}, None],
)
def test_a_chat_that_is_none_is_named_and_never_quoted(tmp_path: Path, messages: object) -> None:
    (found,) = read(written(tmp_path, jsonl({"messages": messages})))
    assert isinstance(found, Problem)
    assert (found.place, found.kind) == ("line 1", "malformed")
    assert "diagnosis" not in found.reason


# ------------------------------------------------------------------------------------------------ split


def test_the_held_out_part_has_its_share_and_no_text_in_common() -> None:
    private = split_private(PublicSet.from_jsonl(stories(0, 400)).samples, 0.1)
    assert 20 < len(private.holdout) < 60
    assert not {sample.text for sample in private.holdout} & {sample.text for sample in private.train}


def test_a_few_samples_still_leave_eight_for_the_gate() -> None:
    private = split_private(samples(*(f"text {n}" for n in range(16))), 0.1)
    assert (len(private.train), len(private.holdout)) == (8, 8)


def test_fewer_are_refused_with_both_numbers() -> None:
    with pytest.raises(PrivateSetTooSmall, match=f"15 different private samples, at least {2 * MIN_HOLDOUT} needed"):
        split_private(samples(*(f"text {n % 15}" for n in range(100))), 0.1)


def test_the_choice_depends_on_the_text_alone() -> None:
    texts = [f"text {n}" for n in range(300)]
    held = {sample.text for sample in split_private(samples(*texts), 0.1).holdout}
    shuffled = {sample.text for sample in split_private(samples(*reversed(texts)), 0.1).holdout}
    grown = {sample.text for sample in split_private(samples(*texts, *(f"more {n}" for n in range(90))), 0.1).holdout}
    assert held == shuffled
    assert held == {text for text in grown if text in texts}


def test_a_text_that_occurs_twice_is_on_one_side() -> None:
    texts = [f"text {n}" for n in range(40)]
    private = split_private(samples(*texts, *texts), 0.25)
    assert not {sample.text for sample in private.holdout} & {sample.text for sample in private.train}
    assert len(private.train) + len(private.holdout) == 80


def test_large_shares_leave_eight_for_training() -> None:
    private = split_private(samples(*(f"text {n}" for n in range(16))), 0.5)
    assert len(private.train) >= 8
