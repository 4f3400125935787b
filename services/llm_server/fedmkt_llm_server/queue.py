"""The Redis stream that carries job ids to LLM servers. Only commands of Redis 6.2 and Valkey.

Stream and group are named by the coordinator (`GET /v1/jobs/queue`), which also owns and trims them. An entry is
`{"job_id": "job_..."}`. An entry says only "look at this job": the coordinator's claim decides whether there is
anything to do, so entries may be lost, repeated or outlive their job.
"""

import logging
import secrets
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import redis
from redis.exceptions import ResponseError

from fedmkt.protocol import QueueView

log = logging.getLogger(__name__)

JOB_ID = "job_id"
ORPHANED_AFTER_S = 30.0  # an entry that another worker took and never acknowledged for this long is taken over
OWN_AT_ONCE = 100
ORPHANS_AT_ONCE = 16  # Redis 6.2 keeps naming trimmed entries, so one alone might never be a real one
SOCKET_TIMEOUT_S = 15.0

Entries = list[tuple[str | None, dict[str, str] | None]]


def lasting_name(state_dir: Path) -> str:
    """A consumer's name that its next process has too, so that what it took and left is found again.

    The folder belongs to one process at a time (`fedmkt.service.locked`), and so does the name.
    """
    path = state_dir / "worker-name"
    if not path.exists():
        state_dir.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".new")
        draft.write_text(f"{socket.gethostname()}-{secrets.token_hex(4)}")
        draft.replace(path)
    return path.read_text()


@dataclass(frozen=True, slots=True)
class Delivery:
    """One entry of the stream; it stays pending for this consumer until it is acknowledged."""

    entry_id: str
    job_id: str


class JobQueue:
    """This worker's end of the consumer group. Every method raises redis.RedisError when Redis is away."""

    def __init__(self, view: QueueView, consumer: str) -> None:
        self._redis: redis.Redis = redis.Redis.from_url(
            view.redis_url,
            decode_responses=True,
            protocol=2,  # answers to XREADGROUP have another shape in RESP3
            socket_timeout=SOCKET_TIMEOUT_S,
            socket_connect_timeout=5.0,
        )
        self._stream = view.stream
        self._group = view.group
        self._consumer = consumer
        self._left: deque[Delivery] = deque()  # taken before, by this worker or a dead one, and not acknowledged
        self._own_asked = False

    def close(self) -> None:
        self._redis.close()

    def take(self, block_s: float) -> Delivery | None:
        """The next entry: one that this worker or a dead one took and left, else a new one; None after `block_s`."""
        try:
            if not self._own_asked:
                self._take_up()
            if not self._left:
                self._take_over()
            return self._left.popleft() if self._left else self._new(block_s)
        except ResponseError as error:
            if not str(error).startswith("NOGROUP"):
                raise
        self._create_group()  # first use, or Redis was flushed
        return None

    def acknowledge(self, delivery: Delivery) -> None:
        self._redis.xack(self._stream, self._group, delivery.entry_id)

    def _take_up(self) -> None:
        """What this worker's last connection, or last process, took and did not acknowledge."""
        answer = self._redis.xreadgroup(self._group, self._consumer, {self._stream: "0"}, count=OWN_AT_ONCE)
        self._own_asked = True
        streams = cast(list[tuple[str, Entries]], answer)
        self._left.extend(self._deliveries(streams[0][1]) if streams else ())

    def _take_over(self) -> None:
        idle_ms = int(ORPHANED_AFTER_S * 1000)
        answer = self._redis.xautoclaim(self._stream, self._group, self._consumer, idle_ms, count=ORPHANS_AT_ONCE)
        self._left.extend(self._deliveries(cast(Entries, answer[1])))

    def _new(self, block_s: float) -> Delivery | None:
        answer = self._redis.xreadgroup(
            self._group, self._consumer, {self._stream: ">"}, count=1, block=int(block_s * 1000)
        )
        streams = cast(list[tuple[str, Entries]], answer)
        return next(self._deliveries(streams[0][1]), None) if streams else None

    def _deliveries(self, entries: Entries) -> Iterator[Delivery]:
        for entry_id, content in entries:
            if entry_id is None:  # Redis 6.2 hands trimmed entries over as nil
                continue
            job_id = (content or {}).get(JOB_ID)
            if job_id is not None:
                yield Delivery(entry_id, job_id)
                continue
            log.warning("queue.entry_unreadable", extra={"entry_id": entry_id})
            self._redis.xack(self._stream, self._group, entry_id)

    def _create_group(self) -> None:
        try:
            self._redis.xgroup_create(self._stream, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):  # another worker was faster
                raise
