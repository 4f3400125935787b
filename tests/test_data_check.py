"""`fedmkt data check`: what it counts, what it advises, and that no text, name or packet leaves it."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fedmkt.cli import app
from fedmkt.private_check import (
    Lengths,
    ModelFolderUnreadable,
    Places,
    Report,
    check_private,
    normalised_hash,
    usable_tokens,
)
from fedmkt.private_records import Problem
from fedmkt.public_set import PublicSample, PublicSet
from fedmkt.tokenized_set import response_rows
from fedmkt.vocabulary import Vocabulary
from small_tokenizers import byte_level, prose, vocabulary

CANARY = "zebra-4711"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("FEDMKT_")]:
        monkeypatch.delenv(name)


def plain(*texts: str) -> list[PublicSample]:
    return [PublicSample(str(number), text, 0, False) for number, text in enumerate(texts, start=1)]


def notes(count: int) -> list[str]:
    return [f"note {number}" for number in range(count)]


def report_on(*found: PublicSample | Problem, public: PublicSet | None = None) -> Report:
    return check_private(found, "line", 0.1, public=public)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)], catch_exceptions=False)


# ------------------------------------------------------------------------------------------------ what is counted


def test_lengths_are_those_that_occur() -> None:
    report = report_on(*plain(*("é" * size for size in range(1, 21))))
    assert report.bytes == Lengths(least=2, median=20, percentile_95=38, most=40, total=420)


def test_a_good_set_is_usable_and_nothing_is_to_do() -> None:
    report = report_on(*plain(*notes(40)))
    assert (report.usable, report.samples, report.train + report.holdout, report.advice) == (True, 40, 40, ())
    assert report.holdout >= 8


def test_an_empty_file_is_said_to_be_too_small() -> None:
    report = report_on()
    assert (report.usable, report.bytes, report.train, report.holdout) == (False, None, 0, 0)
    assert report.advice[0].startswith("0 different private samples, at least 16 needed")


def test_problems_make_it_unusable_and_all_are_counted_though_few_are_listed() -> None:
    problems = [Problem(f"line {number}", "encoding", "is not UTF-8") for number in range(30)]
    report = report_on(*plain(*notes(40)), *problems, Problem("line 99", "empty", "has an empty response"))
    assert not report.usable
    assert report.problem_counts == {"encoding": 30, "empty": 1}
    assert report.problems == tuple(problems[:20])
    assert report.advice == ("mend or drop 31 records: the agent refuses the file with them",)


@pytest.mark.parametrize(
    ("one", "other"),
    [("Ein  Haus\n", "ein haus"), ("STRASSE", "straße"), ("ﬁn", "fin"), ("e\u0301", "é"), ("a\u00a0b", " a\tb ")],
)
def test_copies_that_differ_in_form_alone_are_one_text(one: str, other: str) -> None:
    assert normalised_hash(one) == normalised_hash(other)


def test_other_texts_stay_apart() -> None:
    assert len({normalised_hash(text) for text in ("a b", "ab", "a b.", "a-b", "á b")}) == 5


def test_repeats_are_all_but_the_first() -> None:
    report = report_on(*plain(*notes(40), "Note 0", "NOTE  0 ", "note 7"))
    assert report.repeats == Places(3, ("line 41", "line 42", "line 43"))
    assert report.advice[0].startswith("3 samples repeat an earlier one: drop them")


def test_texts_of_the_public_set_are_found_in_whatever_shape() -> None:
    rows = [{"prompt": "Why?", "completion": " So."}, {"text": "Note  3"}, {"text": "elsewhere"}]
    public = PublicSet.from_jsonl("\n".join(json.dumps(row) for row in rows).encode())
    report = report_on(*plain(*notes(38), "why? so.", "why?"), public=public)
    assert report.overlap is not None
    assert (report.overlap.public_samples, report.overlap.share) == (3, 2 / 40)
    assert report.overlap.shared == Places(2, ("line 4", "line 39"))
    assert report.usable
    assert "tell the operator of the federation" in report.advice[0]


def test_of_many_places_the_first_twenty_are_named() -> None:
    report = report_on(*plain(*["same"] * 40))
    assert report.repeats == Places(39, tuple(f"line {number}" for number in range(2, 22)))


@pytest.mark.parametrize("text", ["cafÃ©", "itâ€™s", "Â£5", "GrÃ¶ÃŸe", "naÃ¯ve"])
def test_text_that_was_decoded_wrongly_is_noticed(text: str) -> None:
    report = report_on(*plain(*notes(40), text))
    assert report.garbled == Places(1, ("line 41",))
    assert report.advice == (
        "1 samples hold letters that were garbled by a wrong encoding: export them again as UTF-8",
    )


def test_right_letters_of_many_languages_are_no_encoding_problem() -> None:
    right = ["São Tomé, Ânimo, EDUCAÇÃO", "âge, château €5", "日本語", "Привет", "😀", "“quoted”—so…", "a\tb\r\nc"]
    report = report_on(*plain(*notes(40), *right))
    assert (report.garbled.count, report.replaced.count, report.control.count) == (0, 0, 0)


def test_lost_letters_and_control_characters_are_noticed() -> None:
    report = report_on(*plain(*notes(40), "caf\ufffd", "bell\x07", "nul\x00"))
    assert report.replaced == Places(1, ("line 41",))
    assert report.control == Places(2, ("line 42", "line 43"))
    assert len(report.advice) == 2


# ------------------------------------------------------------------------------------------------ tokens


@pytest.mark.parametrize("name", ["byte_level", "sentencepiece", "unigram", "word_piece"])
@pytest.mark.parametrize("limit", [8, 40, 100_000])
def test_what_is_cut_and_what_is_learned_is_what_training_sees(name: str, limit: int) -> None:
    words, source = vocabulary(name), random.Random(3)
    samples = []
    for number in range(60):
        start, size = source.randrange(6000), source.randrange(2, 200)
        text = prose()[start : start + size] + "."
        response_start = source.choice([0, len(text.encode()) // 2, len(text.encode()) - 1])
        samples.append(PublicSample(str(number), text, response_start, response_start > 0))
    sizes, taught = [], 0
    for sample in samples:
        sizes.append(len(words.encode(sample.text, add_eos=sample.ends).ids))
        cut = words.encode(sample.text, add_eos=sample.ends, max_tokens=limit)
        taught += len(response_rows(cut, sample.response_start)) > 0
    tokens = check_private(samples, "line", 0.1, words, limit).tokens
    assert tokens is not None
    assert (tokens.limit, tokens.lengths.total, tokens.lengths.most) == (limit, sum(sizes), max(sizes))
    assert (tokens.cut, tokens.with_response_rows) == (sum(size > limit for size in sizes), taught)
    assert (tokens.cut_share, tokens.with_response_rows_share) == (tokens.cut / 60, taught / 60)


def test_tokens_worked_by_hand() -> None:
    words = Vocabulary.from_tokenizer(byte_level(size=257))  # an id a byte, and <|endoftext|> before and after
    prompt = PublicSample("1", "12345678ab", 8, True)  # 12 tokens: bos, 8 of the prompt, 2, eos
    report = check_private([prompt, *plain(*notes(40))], "line", 0.1, words, 9)
    tokens = report.tokens
    assert tokens is not None
    assert tokens.lengths.most == 12
    assert (tokens.cut, tokens.with_response_rows) == (1, 40)
    assert report.advice[0].startswith("1 samples have more than 9 tokens")
    assert report.advice[1].startswith("1 samples teach nothing: no response within 9 tokens")
    again = check_private([prompt, *plain(*notes(40))], "line", 0.1, words, 10).tokens
    assert again is not None
    assert (again.cut, again.with_response_rows) == (1, 41)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"n_positions": 64, "n_ctx": 32}, 64),
        ({"text_config": {"max_position_embeddings": 256}}, 256),
        ({"max_position_embeddings": 4096}, 512),
        ({"max_position_embeddings": -1, "vocab_size": 5}, 512),
        ({}, 512),
    ],
)
def test_a_sample_is_as_long_as_federation_and_model_allow(
    tmp_path: Path, config: dict[str, object], expected: int
) -> None:
    write(tmp_path / "config.json", config)
    assert usable_tokens(tmp_path, 512) == expected


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderUnreadable, match=r"no config\.json that can be read \(FileNotFoundError\)"):
        usable_tokens(tmp_path, 512)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelFolderUnreadable, match="AttributeError"):
        usable_tokens(tmp_path, 512)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    byte_level().save(str(folder / "tokenizer.json"))
    write(folder / "config.json", {"n_positions": 64})
    return folder


def test_the_command_prints_everything_as_json(tmp_path: Path, model: Path) -> None:
    rows: list[object] = [{"question": f"why {n}?", "answer": " so" * 5} for n in range(40)]
    file = write(tmp_path / "a.jsonl", *rows, {"question": "long", "answer": " because" * 300})
    public = write(tmp_path / "public.jsonl", {"text": "WHY 3? so so so so so"})
    given = ("--columns", "prompt=question,completion=answer", "--model", model, "--public", public)
    done = run(file, *given, "--json", "--holdout-share", "0.5")
    told = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (told["usable"], told["samples"], told["with_prompt"]) == (True, 41, 41)
    assert told["train"] + told["holdout"] == 41
    assert (told["tokens"]["limit"], told["tokens"]["cut"]) == (64, 1)
    assert told["overlap"]["shared"] == {"count": 1, "first": ["line 4"]}
    assert len(told["advice"]) == 2


def test_the_command_says_it_in_words(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": text} for text in (*notes(40), "note 5")), {"text": ""})
    public = write(tmp_path / "public.jsonl", {"text": "note 3"})
    done = run(file, "--model", model, "--public", public)
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "41 samples, 0 with a prompt; 1 records that cannot be used"
    assert lines[2] == "line 42 has an empty response; drop it"
    assert lines[3] == "bytes a sample: 6 to 7, half of them up to 7, 95 % up to 7; 276 in all"
    assert "0.0% cut at 64 tokens" in lines
    assert "100.0% have a response to learn within them" in lines
    assert "1 repeat an earlier sample: line 41" in lines
    assert "2.4% are among the 1 public samples" in lines
    assert "1 are in the public set: line 4" in lines
    assert lines[-3].startswith("to do: mend or drop 1 records")


def test_a_good_file_ends_with_nothing_to_do(tmp_path: Path) -> None:
    done = run(write(tmp_path / "a.jsonl", *({"text": text} for text in notes(40))))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "to do: nothing")


def test_no_text_key_or_name_is_shown_and_no_socket_is_opened(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket(*_: object, **__: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_socket)
    rows: list[object] = [{"id": CANARY, "text": f"{CANARY} {number}"} for number in range(40)]
    bad: list[object] = [
        {CANARY: 1},
        [CANARY],
        {"text": [CANARY]},
        {"text": CANARY + "\ud800"},
        {"text": f"{CANARY}Ã©"},
    ]
    file = write(tmp_path / f"{CANARY}.jsonl", *rows, *rows[:1], *bad)
    with file.open("ab") as more:
        more.write(b'{"text": "' + CANARY.encode() + b"\n\xff" + CANARY.encode())
    public = write(tmp_path / "public.jsonl", rows[0])
    for options in ((), ("--json",)):
        done = run(file, "--model", model, "--public", public, *options)
        assert done.exit_code == 1
        assert CANARY not in done.output
        assert "line 42" in done.stdout


def test_the_command_loads_neither_torch_nor_an_http_client(tmp_path: Path, model: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({"text": text} for text in notes(40)))
    code = (
        "import sys; from fedmkt import cli\n"
        f"sys.argv = ['fedmkt', 'data', 'check', {str(file)!r}, '--model', {str(model)!r}]\n"
        "try: cli.main()\nexcept SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'transformers', 'httpx', 'pyarrow'} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
