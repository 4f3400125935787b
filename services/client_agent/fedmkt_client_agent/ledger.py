"""Every transfer, in one append-only file: ledger.jsonl in the state folder, one JSON object a line.

A `begun` line is on the disk, fsynced, before the first byte leaves; a `done` line follows with the coordinator's
receipt, where it gives one. So a process killed anywhere leaves no transfer without a line, and what was begun and not
done may or may not have arrived. Budgets are counted from here.

Not in it: asking for the next task, signed assertions and the access tokens they buy, retries within one transfer, and
questions that carry nothing (configuration, versions, keys).
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmkt import fault_points
from fedmkt.client import CoordinatorClient
from fedmkt.durable import sync
from fedmkt_client_agent.store import AgentStore

FILE_NAME = "ledger.jsonl"
Answer = TypeVar("Answer")

Direction = Literal["up", "down"]
Kind = Literal["enrolment", "vocabulary", "model", "knowledge", "adapter", "report", "artifact"]


class Entry(BaseModel):
    """One line. `bytes` and `digest` are of the body, before the transport's own framing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: datetime
    event: Literal["begun", "done"]
    direction: Direction
    kind: Kind
    bytes: int | None = None  # of what is fetched: known when it is there
    digest: str
    round_id: str | None = None
    round_number: int | None = None
    receipt_id: str | None = None
    approved_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """What is about to be sent or fetched."""

    direction: Direction
    kind: Kind
    digest: str
    bytes: int | None = None
    round_id: str | None = None
    round_number: int | None = None
    approved_at: datetime | None = None


def sending(
    kind: Kind, body: BaseModel | bytes, *, round_id: str | None = None, round_number: int | None = None
) -> Transfer:
    """A body about to leave; a model is sent as the client writes it."""
    data = body if isinstance(body, bytes) else body.model_dump_json().encode()
    return Transfer("up", kind, hashlib.sha256(data).hexdigest(), len(data), round_id, round_number)


class Ledger:
    """Written by the agent alone; anybody who may read the folder can read it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._sent: dict[tuple[str | None, str, str], int] | None = None  # what was begun, once for each body

    def begin(self, transfer: Transfer) -> None:
        """On the disk when this returns. Raises OSError, and then nothing may be sent."""
        self._append(Entry(at=datetime.now(UTC), event="begun", **_fields(transfer)))

    def done(self, transfer: Transfer, *, receipt_id: str | None = None) -> None:
        self._append(Entry(at=datetime.now(UTC), event="done", receipt_id=receipt_id, **_fields(transfer)))

    def recorded(
        self,
        transfer: Transfer,
        call: Callable[[], Answer],
        receipt_id: Callable[[Answer], str | None] = lambda _: None,
    ) -> Answer:
        """`call` between its two lines; what it raises leaves the first one alone."""
        self.begin(transfer)
        fault_points.reach(f"agent.{transfer.kind}.begun")
        answer = call()
        self.done(transfer, receipt_id=receipt_id(answer))
        return answer

    def knows(self, transfer: Transfer) -> bool:
        """Whether these bytes were begun before, in this round: sending them again costs no budget."""
        return (transfer.round_id, transfer.kind, transfer.digest) in self._sums()

    def bytes_sent(self) -> int:
        """Of all bodies ever begun; one that was sent again, after a break or a restart, counts once."""
        return sum(self._sums().values())

    def rounds(self) -> frozenset[str]:
        """In which anything was sent, or began to be."""
        return frozenset(round_id for round_id, _, _ in self._sums() if round_id is not None)

    def _sums(self) -> dict[tuple[str | None, str, str], int]:
        if self._sent is None:
            self._sent = {}
            for entry in read_ledger(self.path):
                self._count(entry)
        return self._sent

    def _count(self, entry: Entry) -> None:
        if self._sent is not None and entry.direction == "up" and entry.event == "begun":
            self._sent[entry.round_id, entry.kind, entry.digest] = entry.bytes or 0

    def _append(self, entry: Entry) -> None:
        line = entry.model_dump_json(exclude_none=True).encode() + b"\n"
        new = not self.path.exists()
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write_whole(handle, b"\n" + line if _torn(handle) else line)
            os.fsync(handle)
        finally:
            os.close(handle)
        if new:
            sync(self.path.parent)
        self._count(entry)


def fetched(
    client: CoordinatorClient,
    ledger: Ledger,
    store: AgentStore,
    digest: str,
    max_bytes: int,
    round_id: str | None = None,
) -> Path:
    """The artifact's file; what lies there already is not fetched, and is no transfer."""
    path = store.artifacts / digest
    if path.exists():
        return path
    transfer = Transfer("down", "artifact", digest, round_id=round_id)
    ledger.begin(transfer)
    path = client.fetch_artifact(digest, store.artifacts, max_bytes=max_bytes)
    ledger.done(replace(transfer, bytes=path.stat().st_size))
    return path


def read_ledger(path: Path) -> Iterator[Entry]:
    """The entries, oldest first. A line torn by a full disk or a power cut is passed over: its transfer never began."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                yield Entry.model_validate(json.loads(line))
            except (ValueError, ValidationError):
                continue


def _fields(transfer: Transfer) -> dict[str, Any]:
    return {name: getattr(transfer, name) for name in Transfer.__dataclass_fields__}


def _torn(handle: int) -> bool:
    """Whether the last line has no end."""
    size = os.fstat(handle).st_size
    return size > 0 and os.pread(handle, 1, size - 1) != b"\n"


def _write_whole(handle: int, data: bytes) -> None:
    """Or raise what the system says; what a full disk let through of it is then a torn line."""
    while data:
        data = data[os.write(handle, data) :]
