"""The site's own text: read without letting any of it out, and cut so that the gate's part stays the same."""

import json
from pathlib import Path

import pytest

from fedmkt.private_set import MIN_HOLDOUT, PrivateSetRefused, PrivateSetTooSmall, read_private_set, split_private
from fedmkt.public_set import PublicSample, PublicSet
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
        (b'{"text": ""}', "line 3: sample '3' has an empty response"),
        (b'{"text": 5}', "line 3: text must be a text, not int"),
        (b'["secret diagnosis"]', "line 3 is a JSON list"),
        (b'{"note": "secret diagnosis"}', "line 3 has 'note'"),
        (b'{"text": "secret \xff diagnosis"}', "line 3 is not UTF-8"),
        (b'{"id": 9, "text": "secret \\ud800 diagnosis"}', "line 3: sample '3' holds a lone surrogate"),
    ],
)
def test_a_bad_line_is_named_and_never_quoted(tmp_path: Path, line: bytes, message: str) -> None:
    path = written(tmp_path, b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(PrivateSetRefused, match=message) as caught:
        read_private_set(path, 0.1, TEMPLATE)
    said = caught.value.detail
    assert "diagnosis" not in said
    assert str(tmp_path) not in said


def test_a_file_that_is_not_there_is_refused_without_its_path(tmp_path: Path) -> None:
    with pytest.raises(PrivateSetRefused, match="cannot be read: No such file") as caught:
        read_private_set(tmp_path / "nothing.jsonl", 0.1, TEMPLATE)
    assert "nothing" not in caught.value.detail


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
