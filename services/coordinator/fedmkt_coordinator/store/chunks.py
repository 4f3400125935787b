"""Chunks as they come: what is asked once a chunk is asked rarely, what is written once a chunk is written together."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from fedmkt_coordinator.store.records import SiteRow, UploadRow

KNOWN_S = 10.0
MAX_KNOWN = 1000


class ChunkTransaction(Protocol):
    async def takes_chunks(self, upload_id: str, site_id: str) -> bool: ...

    async def add_chunks(self, chunks: list[tuple[str, int]]) -> None: ...

    async def chunks(self, upload_id: str) -> set[int]: ...


@dataclass(eq=False, slots=True)
class _Come:
    upload_id: str
    site_id: str
    number: int
    there: set[int] | None = None
    written: bool = False


class Chunks:
    """`unsynced` begins a transaction whose commit need not wait for the disk: a lost chunk is sent again."""

    def __init__(self, unsynced: Callable[[], AbstractAsyncContextManager[ChunkTransaction]]) -> None:
        self._unsynced = unsynced
        self._waiting: list[_Come] = []
        self._writing = asyncio.Lock()
        self._known: dict[str, tuple[float, UploadRow]] = {}

    async def add(self, upload_id: str, site_id: str, number: int) -> set[int] | None:
        """The chunks that are there, this one among them; None where the upload takes no more.

        One transaction writes all that came while the one before was written. Where it fails, each tries by itself.
        """
        mine = _Come(upload_id, site_id, number)
        self._waiting.append(mine)
        async with self._writing:
            if not mine.written:
                together = {mine, *self._waiting}
                self._waiting = []
                await self._write(sorted(together, key=lambda each: (each.upload_id, each.number)))
        return mine.there

    async def _write(self, come: list[_Come]) -> None:
        """In one order everywhere: replicas that write the same rows wait for each other, never in a circle."""
        async with self._unsynced() as tx:
            taken = [each for each in come if await tx.takes_chunks(each.upload_id, each.site_id)]
            await tx.add_chunks([(each.upload_id, each.number) for each in taken])
            for each in taken:
                each.there = await tx.chunks(each.upload_id)
        for each in come:
            each.written = True

    def remember(self, upload: UploadRow) -> None:
        """An upload that was just seen open."""
        if len(self._known) >= MAX_KNOWN:
            self._known.clear()
        self._known[upload.id] = asyncio.get_running_loop().time(), upload

    def known(self, upload_id: str, site: SiteRow) -> UploadRow | None:
        """The site's upload, if it was open a moment ago: whether it still is, `add` finds out."""
        seen_at, upload = self._known.get(upload_id, (0.0, None))
        if upload is None or (upload.federation_id, upload.site) != (site.federation_id, site.name):
            return None
        if asyncio.get_running_loop().time() - seen_at > KNOWN_S:
            del self._known[upload_id]
            return None
        return upload
