"""Chunks as they come: what is asked once a chunk is asked rarely, what is written once a chunk is written together."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from fedmkt_coordinator.store.records import SiteRow, UploadRow

GATHER_S = 0.01  # how long a write waits for chunks that are just coming: one costs as much as ten
KNOWN_S = 10.0
MAX_KNOWN = 1000


class ChunkTransaction(Protocol):
    async def takes_chunks(self, upload_id: str, site_id: str) -> bool: ...

    async def add_chunks(self, chunks: list[tuple[str, int]]) -> None: ...

    async def chunks(self, upload_id: str) -> set[int]: ...

    async def forget_chunks(self, upload_id: str) -> None: ...


@dataclass(eq=False, slots=True)
class _Come:
    upload_id: str
    site_id: str = ""
    number: int = -1  # all are to be forgotten
    there: set[int] | None = None
    written: bool = False


class Chunks:
    """`unsynced` begins a transaction whose commit need not wait for the disk: a lost chunk is sent again."""

    def __init__(self, unsynced: Callable[[], AbstractAsyncContextManager[ChunkTransaction]]) -> None:
        self._unsynced = unsynced
        self._waiting: list[_Come] = []
        self._writing = asyncio.Lock()
        self._coming = 0
        self._known: dict[str, tuple[float, UploadRow, SiteRow]] = {}

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Around the receiving and adding of one."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def add(self, upload_id: str, site_id: str, number: int) -> set[int] | None:
        """The chunks that are there, this one among them; None where the upload takes no more.

        One transaction writes all that came while the one before was written. Where it fails, each tries by itself.
        """
        mine = _Come(upload_id, site_id, number)
        await self._written(mine)
        return mine.there

    async def forget(self, upload_id: str) -> None:
        """The chunks are gone: the rows say what there is to delete."""
        await self._written(_Come(upload_id))

    async def _written(self, mine: _Come) -> None:
        self._waiting.append(mine)
        async with self._writing:
            if not mine.written:
                if self._coming > len(self._waiting):
                    await asyncio.sleep(GATHER_S)
                together = {mine, *self._waiting}
                self._waiting = []
                await self._write(sorted(together, key=lambda each: (each.upload_id, each.number)))

    async def _write(self, come: list[_Come]) -> None:
        """In one order everywhere: replicas that write the same rows wait for each other, never in a circle."""
        async with self._unsynced() as tx:
            for each in come:
                if each.number < 0:
                    await tx.forget_chunks(each.upload_id)
            new = [each for each in come if each.number >= 0]
            taken = [each for each in new if await tx.takes_chunks(each.upload_id, each.site_id)]
            await tx.add_chunks([(each.upload_id, each.number) for each in taken])
            for each in taken:
                each.there = await tx.chunks(each.upload_id)
        for each in come:
            each.written = True

    def remember(self, upload: UploadRow, site: SiteRow) -> None:
        """An open upload of an enrolled site, just seen in the database."""
        if len(self._known) >= MAX_KNOWN and upload.id not in self._known:
            self._known.clear()
        self._known[upload.id] = asyncio.get_running_loop().time(), upload, site

    def known(self, upload_id: str, site_id: str) -> tuple[UploadRow, SiteRow] | None:
        """The site's upload and the site, if both were good a moment ago: whether they still are, `add` finds out."""
        found = self._known.get(upload_id)
        if found is None or found[2].id != site_id:
            return None
        seen_at, upload, site = found
        if asyncio.get_running_loop().time() - seen_at > KNOWN_S:
            del self._known[upload_id]
            return None
        return upload, site
