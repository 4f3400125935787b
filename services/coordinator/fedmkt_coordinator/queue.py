"""Redis: carries the ids of jobs to LLM servers, and wakes whoever waits. Holds nothing that the database does not.

Only commands of Redis 6.2, so that Valkey and older servers do.
"""

import secrets
from collections.abc import AsyncGenerator, Sequence
from urllib.parse import urlsplit

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

# Stream of {job_id}. Written here, read by LLM servers as one consumer group; lives until it is flushed, trimmed below.
JOBS = "fedmkt:jobs"
GROUP = "llm-servers"
# String per job and number of claims so far: it is in the stream. Owner: the coordinator. Ends after MARKER_S, so that
# an entry that was lost on the way is added again.
MARKER = "fedmkt:queued:"
# Channel per federation: something was committed. "<who published> <who has to hear of it>". Owner: the coordinator.
WAKE = "fedmkt:wake:"

MARKER_S = 600
MAX_ENTRIES = 10_000

# Marker and entry appear together or not at all; the group exists from the first entry on.
_ADD = """
redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
if redis.call('SET', KEYS[1], '1', 'NX', 'EX', ARGV[2]) then
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'job_id', ARGV[4])
  return 1
end
return 0
"""

Unavailable = (RedisError, OSError)  # what a Redis that is down, gone or overloaded raises


class JobQueue:
    def __init__(self, client: Redis) -> None:
        self._client = client
        self._name = secrets.token_hex(8)  # of this replica, which need not hear what it said itself
        self._add = client.register_script(_ADD)

    @classmethod
    def connect(cls, url: str) -> "JobQueue":
        """Opens no connection yet. It gives up soon: the loops that use it come back anyway."""
        client = Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=5,
            socket_connect_timeout=2,
            health_check_interval=30,
            retry=Retry(NoBackoff(), 1),  # once, for a connection that Redis closed while it lay idle
        )
        return cls(client)

    async def add(self, jobs: Sequence[tuple[str, int]]) -> int:
        """Put (job id, claims so far) into the stream unless it was put there before; returns how many were new."""
        added = 0
        for job_id, claims in jobs:
            keys = [f"{MARKER}{job_id}:{claims}", JOBS]
            added += int(await self._add(keys=keys, args=[GROUP, MARKER_S, MAX_ENTRIES, job_id]))
        return added

    async def wake(self, federation_id: str, hears: str) -> None:
        await self._client.publish(WAKE + federation_id, f"{self._name} {hears}")

    async def heard(self) -> AsyncGenerator[tuple[str, str]]:
        """(federation id, who has to hear) as other replicas wake them; empty once, when listening has begun.

        Ends by an exception.
        """
        async with self._client.pubsub() as pubsub:
            await pubsub.psubscribe(f"{WAKE}*")
            while True:
                message = await pubsub.get_message(ignore_subscribe_messages=False, timeout=5)
                if message is None:
                    continue
                if message["type"] == "psubscribe":
                    yield "", ""
                elif message["type"] == "pmessage":
                    name, _, hears = str(message["data"]).partition(" ")
                    if name != self._name:
                        yield str(message["channel"]).removeprefix(WAKE), hears

    async def ping(self) -> None:
        await self._client.ping()

    async def close(self) -> None:
        await self._client.aclose()


def without_password(url: str) -> str:
    """For logs."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"
