"""The ledger: on the disk before anything leaves, readable after any crash, and what budgets are counted from."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedmkt_client_agent.ledger import FILE_NAME, Ledger, Transfer, read_ledger, sending
from fedmkt_client_agent.ledger_report import together

ROUND = "rnd_0123456789abcdef"


def knowledge(data: bytes) -> Transfer:
    return sending("knowledge", data, round_id=ROUND, round_number=3)


def test_a_transfer_has_two_lines_and_the_first_is_there_while_it_goes_on(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)

    def send() -> str:
        (begun,) = read_ledger(tmp_path / FILE_NAME)
        assert (begun.event, begun.kind, begun.bytes, begun.round_number) == ("begun", "knowledge", 3, 3)
        return "upl_1"

    assert ledger.recorded(knowledge(b"abc"), send, lambda receipt: receipt) == "upl_1"
    begun, done = read_ledger(tmp_path / FILE_NAME)
    assert (done.event, done.receipt_id, done.digest) == ("done", "upl_1", begun.digest)
    assert (tmp_path / FILE_NAME).stat().st_mode & 0o777 == 0o600


def test_a_transfer_that_fails_stays_begun(tmp_path: Path) -> None:
    def fail() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Ledger(tmp_path).recorded(knowledge(b"abc"), fail)
    assert [entry.event for entry in read_ledger(tmp_path / FILE_NAME)] == ["begun"]
    assert [done for _, done in together(read_ledger(tmp_path / FILE_NAME))] == [None]


def test_a_body_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for _ in range(3):
        ledger.begin(knowledge(b"abc"))
    ledger.begin(Transfer("down", "artifact", "ab" * 32))
    ledger.begin(sending("vocabulary", b"12345"))
    assert ledger.bytes_sent() == Ledger(tmp_path).bytes_sent() == 8
    assert ledger.rounds() == {ROUND}
    assert ledger.knows(knowledge(b"abc"))
    assert not ledger.knows(knowledge(b"abd"))


def test_a_torn_line_is_passed_over_and_the_next_one_stands_for_itself(tmp_path: Path) -> None:
    Ledger(tmp_path).begin(knowledge(b"abc"))
    whole = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(whole + whole[:40])
    Ledger(tmp_path).begin(knowledge(b"defg"))
    assert [entry.bytes for entry in read_ledger(tmp_path / FILE_NAME)] == [3, 4]
    assert (tmp_path / FILE_NAME).read_bytes().startswith(whole), "nothing that was written changes"


def test_a_disk_that_takes_no_line_lets_nothing_leave(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    left: list[int] = []
    with pytest.raises(OSError, match="No space left") as refused:
        Ledger(tmp_path).recorded(knowledge(b"abc"), lambda: left.append(1))
    assert refused.value.errno == errno.ENOSPC
    assert left == []


def test_transfers_are_put_together_by_what_was_sent(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.begin(knowledge(b"abc"))  # broken off
    ledger.recorded(knowledge(b"abc"), lambda: "upl_1", lambda receipt: receipt)
    found = [
        (begun.kind, None if done is None else done.receipt_id) for begun, done in together(read_ledger(ledger.path))
    ]
    assert found == [("knowledge", None), ("knowledge", "upl_1")]


def test_the_command_shows_it_for_eyes_and_for_scripts(tmp_path: Path) -> None:
    Ledger(tmp_path).recorded(knowledge(b"abc"), lambda: "upl_1", lambda receipt: receipt)

    def said(*options: str) -> str:
        command = [sys.executable, "-m", "fedmkt_client_agent", "ledger", "--state-dir", str(tmp_path), *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout

    assert "1 transfers, 3 bytes begun to be sent; 0 without an end" in said()
    (one,) = json.loads(said("--json"))
    assert (one["kind"], one["bytes"], one["round_id"], one["receipt_id"]) == ("knowledge", 3, ROUND, "upl_1")
    assert one["begun_at"] <= one["done_at"]
