"""Immutable bytes named by their SHA-256, and the chunks of uploads that are not complete yet.

A local folder by default; S3 and compatible stores by URL, with credentials from the usual AWS_ variables.
"""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from fedmkt.errors import Refusal

READ_BYTES = 1 << 20  # one piece of a stream

ARTIFACTS = "artifacts"  # artifacts/<first two digits>/<digest>
UPLOADS = "uploads"  # uploads/<upload id>/<chunk number>
INCOMING = "incoming"  # incoming/<random>: streams whose digest is not known yet


class ArtifactUnknown(Refusal):
    status = 404
    code = "artifact.unknown"
    title = "No such artifact"


class ArtifactDigest(Refusal):
    code = "artifact.digest"
    title = "The bytes are not those that the digest names"


class ArtifactStore:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @classmethod
    def open(cls, url: str | None, state_dir: Path) -> Self:
        if url is None:
            return cls(LocalStore(state_dir / "objects", mkdir=True, automatic_cleanup=True))
        return cls(from_url(url))

    async def ping(self) -> None:
        """Raises what the store raises when it cannot be written to and read from."""
        await obstore.put_async(self._store, f"{INCOMING}/ping", b"ping")
        await obstore.head_async(self._store, f"{INCOMING}/ping")

    # -------------------------------------------------------------------------------------------- artifacts

    async def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        await obstore.put_async(self._store, _path(digest), data)
        return digest

    async def put_stream(self, digest: str, pieces: AsyncIterator[bytes]) -> int:
        """Store what comes if it has that digest, and return its size; ArtifactDigest otherwise, with nothing kept."""
        draft = f"{INCOMING}/{secrets.token_hex(16)}"
        seen = _Hashed(pieces)
        await obstore.put_async(self._store, draft, seen)
        if seen.digest != digest:
            await obstore.delete_async(self._store, draft)
            raise ArtifactDigest(
                f"{seen.size_bytes} bytes came with SHA-256 {seen.digest}, the address says {digest}; send them again"
            )
        await obstore.rename_async(self._store, draft, _path(digest))
        return seen.size_bytes

    async def size(self, digest: str) -> int:
        try:
            return int((await obstore.head_async(self._store, _path(digest)))["size"])
        except FileNotFoundError as error:
            raise ArtifactUnknown(f"there is no artifact {digest}") from error

    async def get(self, digest: str) -> bytes:
        await self.size(digest)
        return bytes(await (await obstore.get_async(self._store, _path(digest))).bytes_async())

    async def stream(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes start..stop-1 in pieces."""
        if start == stop:
            return
        found = await obstore.get_async(self._store, _path(digest), options={"range": (start, stop)})
        async for piece in found.stream(min_chunk_size=READ_BYTES):
            yield bytes(piece)

    # -------------------------------------------------------------------------------------------- chunks of uploads

    async def put_chunk(self, upload_id: str, number: int, data: bytes) -> None:
        await obstore.put_async(self._store, _chunk(upload_id, number), data)

    async def assemble(self, upload_id: str, chunks: int) -> bytes:
        """The whole upload in memory: it is checked as one piece."""
        whole = bytearray()
        for number in range(chunks):
            found = await obstore.get_async(self._store, _chunk(upload_id, number))
            whole += await found.bytes_async()
        return bytes(whole)

    async def drop_chunks(self, upload_id: str) -> None:
        await self._drop(f"{UPLOADS}/{upload_id}/")

    async def sweep_incoming(self, before: datetime) -> int:
        """Delete what broken streams left; returns how many."""
        return await self._drop(f"{INCOMING}/", before)

    async def _drop(self, prefix: str, before: datetime | None = None) -> int:
        dropped = 0
        async for page in obstore.list(self._store, prefix):
            paths = [each["path"] for each in page if before is None or each["last_modified"] < before]
            for path in paths:
                with suppress(FileNotFoundError):  # another request or replica was faster
                    await obstore.delete_async(self._store, path)
            dropped += len(paths)
        return dropped


class _Hashed:
    """A stream that knows, once it has passed, how long it was and what its digest is."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._hash = hashlib.sha256()
        self.size_bytes = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for piece in self._pieces:
            if not piece:
                continue
            self.size_bytes += len(piece)
            await asyncio.to_thread(self._hash.update, piece) if len(piece) > READ_BYTES else self._hash.update(piece)
            yield piece


def _path(digest: str) -> str:
    return f"{ARTIFACTS}/{digest[:2]}/{digest}"


def _chunk(upload_id: str, number: int) -> str:
    return f"{UPLOADS}/{upload_id}/{number:05d}"
