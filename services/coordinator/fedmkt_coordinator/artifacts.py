"""Immutable bytes named by their SHA-256, and the chunks of uploads that are not complete yet.

A local folder by default; S3 and compatible stores by URL, with credentials from the usual AWS_ variables. An artifact
that was put survives a power cut: receipts and finished jobs name it. Chunks may not, and are sent again then.
"""

import asyncio
import errno
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Self

from starlette.requests import Request

from fedmkt import fault_points
from fedmkt.errors import Refusal
from fedmkt.protocol import CHUNK_BYTES, ArtifactReceipt
from fedmkt_coordinator.arrivals import Arrivals, Pieces, read_range
from fedmkt_coordinator.objects import READ_BYTES, Objects, telling

MAX_ARTIFACT_BYTES = 4 << 30
MOST_TRIES = 100  # to write where another request takes folders away
MAX_PART_BYTES = 8 << 20  # of an artifact that comes in parts: held in memory

ARTIFACTS = "artifacts"  # artifacts/<first two digits>/<digest>
UPLOADS = "uploads"  # uploads/<upload id>/<chunk number>; on a disk uploads/<upload id>/whole, all chunks in one file
INCOMING = "incoming"  # incoming/<random>: streams whose digest is not known yet


class ArtifactUnknown(Refusal):
    status = 404
    code = "artifact.unknown"
    title = "No such artifact"
    remedy = "Take the digest from the coordinator's last answer. A site sees only artifacts that its tasks name."


class ArtifactDigest(Refusal):
    code = "artifact.digest"
    title = "The bytes are not those that the digest names"


class ArtifactTooLarge(Refusal):
    status = 413
    code = "artifact.too_large"
    title = "The artifact is too large"
    remedy = "Send something smaller: a subset of the public set, or an adapter of lower rank."


class PartTooLarge(Refusal):
    status = 413
    code = "artifact.part_too_large"
    title = "The part is too large"


class ArtifactStore:
    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.arrivals = Arrivals(objects, INCOMING)
        # An object store has kept what it has answered; a file system keeps what it was asked to synchronise.
        self._disk = None if objects.root is None else _Disk(objects.root)

    @classmethod
    def open(cls, url: str | None, state_dir: Path) -> Self:
        if url is None:
            objects = Objects.in_folder(state_dir / "objects")
            _sync(state_dir)
            return cls(objects)
        return cls(Objects.at(url))

    async def ping(self) -> None:
        """Raises DependencyDown when the store cannot be written to and read from."""
        await self._objects.put(f"{INCOMING}/ping", b"ping")
        await self._objects.size(f"{INCOMING}/ping")

    # -------------------------------------------------------------------------------------------- artifacts

    async def put(self, data: bytes) -> str:
        digest = (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
        if self._disk is None:
            await self._objects.put(_path(digest), data)
        else:
            draft = _draft()
            await self._objects.put(draft, data)
            await self._name(draft, digest)
        return digest

    async def put_stream(self, digest: str, pieces: AsyncIterator[bytes]) -> int:
        """Store what comes if it has that digest, and return its size; ArtifactDigest otherwise, with nothing kept."""
        draft = _draft()
        seen = _Hashed(pieces)
        await self._objects.put(draft, seen)
        if seen.digest != digest:
            await self._objects.delete(draft)
            raise ArtifactDigest(
                f"{seen.size_bytes} bytes came with SHA-256 {seen.digest}, the address says {digest}; send them again"
            )
        await self._name(draft, digest)
        return seen.size_bytes

    async def put_part(self, digest: str, content_range: str, request: Request) -> ArtifactReceipt:
        """Take some bytes of an artifact, and make it one when all are there; says how many that are."""
        span = read_range(content_range)
        key = f"parts/{digest}"
        if await self._exists(digest):
            return ArtifactReceipt(digest=digest, size_bytes=span.total, arrived_bytes=span.total)
        if span.total > MAX_ARTIFACT_BYTES:
            raise ArtifactTooLarge(f"{span.total} bytes are announced, at most {MAX_ARTIFACT_BYTES} are accepted")
        if span.stop - span.start > MAX_PART_BYTES:
            raise PartTooLarge(
                f"{span.stop - span.start} bytes in one part, at most {MAX_PART_BYTES}; send smaller ones"
            )
        if span.stop > span.start:
            await self.arrivals.keep(key, span, b"".join(await self.arrivals.receive(key, span, request)))
        await self.arrivals.settle(key)
        arrived = await self.arrivals.there(key)
        if arrived == span.total:
            try:
                await self.put_stream(digest, self.arrivals.stream(key, span.total))
            except ArtifactDigest:
                await self.arrivals.drop(key)
                raise
            await self.arrivals.drop(key)
        return ArtifactReceipt(digest=digest, size_bytes=span.total, arrived_bytes=arrived)

    async def _exists(self, digest: str) -> bool:
        try:
            await self.size(digest)
        except ArtifactUnknown:
            return False
        return True

    async def _name(self, draft: str, digest: str) -> None:
        """Make a draft the artifact of that digest: first its bytes are safe, then its name, so no name lacks bytes."""
        path = _path(digest)
        if self._disk is not None:
            with telling():
                await asyncio.to_thread(self._disk.sync_bytes, draft)
        fault_points.reach("artifact.drafted")
        await self._objects.rename(draft, path)
        if self._disk is not None:
            with telling():
                await asyncio.to_thread(self._disk.sync_name, path)
        fault_points.reach("artifact.stored")

    async def size(self, digest: str) -> int:
        try:
            return await self._objects.size(_path(digest))
        except FileNotFoundError as error:
            raise ArtifactUnknown(f"there is no artifact {digest}") from error

    async def get(self, digest: str) -> bytes:
        await self.size(digest)
        return await self._objects.get(_path(digest))

    async def stream(self, digest: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes start..stop-1 in pieces; an answer may begin once this has returned them."""
        return _nothing() if start == stop else await self._objects.stream(_path(digest), start, stop)

    # -------------------------------------------------------------------------------------------- chunks of uploads

    async def put_chunk(self, upload_id: str, number: int, pieces: Pieces, check: Callable[[bytes], None]) -> None:
        """Keep the chunk if `check` lets it pass; that hashes, and runs in the thread that writes.

        The pieces are copied together first: with each one hashed and written by itself, the thread and the event loop
        would take the interpreter from each other at every step, which costs more than the copy.
        """
        disk, path = self._disk, _whole(upload_id)

        def keep() -> bytes:
            data = b"".join(pieces)
            check(data)
            if disk is not None:
                disk.write_at(path, number * CHUNK_BYTES, data)
            return data

        with telling():
            data = await asyncio.to_thread(keep)
        if disk is None:
            await self._objects.put(_chunk(upload_id, number), data)

    async def keep_upload(self, upload_id: str, digest: str, blob: bytes | None) -> None:
        """Make the assembled upload the artifact of that digest, which it has. On a disk its bytes lie there."""
        if self._disk is None:
            assert blob is not None, "what has no digest in its place was assembled"
            await self._objects.put(_path(digest), blob)
            return
        try:
            await self._name(_whole(upload_id), digest)
        except FileNotFoundError:  # named before, by an attempt that got no further
            await self.size(digest)

    async def digest_of_upload(self, upload_id: str) -> str | None:
        """Of all its bytes, which are not held for it; None where they lie in more than one place, or are gone."""
        if self._disk is None:
            return None
        with telling(), suppress(FileNotFoundError):
            return await asyncio.to_thread(self._disk.digest, _whole(upload_id))
        return None

    async def assemble(self, upload_id: str, chunks: int) -> bytes:
        """The whole upload in memory: it is checked as one piece. FileNotFoundError when something of it is gone."""
        if self._disk is not None:
            with telling():
                return await asyncio.to_thread(self._disk.read, _whole(upload_id))
        whole = bytearray()
        for number in range(chunks):
            whole += await self._objects.get(_chunk(upload_id, number))
        return bytes(whole)

    async def drop_chunks(self, upload_id: str) -> None:
        if self._disk is not None:
            with telling():
                await asyncio.to_thread(self._disk.remove, _whole(upload_id))
            return
        await self._drop(f"{UPLOADS}/{upload_id}/")

    async def sweep_incoming(self, before: datetime) -> int:
        """Delete what broken streams left; returns how many."""
        return await self._drop(f"{INCOMING}/", before)

    async def _drop(self, prefix: str, before: datetime | None = None) -> int:
        paths = await self._objects.paths(prefix, before)
        for path in paths:
            await self._objects.delete(path)
        return len(paths)


class _Disk:
    """The folder of a LocalStore, which itself leaves it to the system when bytes and names reach the disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: set[Path] = set()  # folders whose own names are safe

    def write_at(self, path: str, offset: int, data: bytes) -> None:
        """All chunks of an upload go into one file, each in its place: what is complete need not be written again."""
        handle = self._open(self._root / path)
        try:
            left = memoryview(data)
            while left:
                written = os.pwrite(handle, left, offset)
                left, offset = left[written:], offset + written
        finally:
            os.close(handle)

    def _open(self, target: Path) -> int:
        """Also while another request removes the folder: whoever empties one of these takes it away."""
        flags = os.O_WRONLY | os.O_CREAT
        for _ in range(MOST_TRIES):
            with suppress(FileNotFoundError):
                return os.open(target, flags, 0o600)
            with suppress(FileNotFoundError):  # the folder above went, too
                target.parent.mkdir(parents=True, exist_ok=True)
        return os.open(target, flags, 0o600)

    def read(self, path: str) -> bytes:
        return (self._root / path).read_bytes()

    def digest(self, path: str) -> str:
        found, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        with (self._root / path).open("rb", buffering=0) as file:
            while size := file.readinto(buffer):
                found.update(buffer[:size])
        return found.hexdigest()

    def remove(self, path: str) -> None:
        """The file and its folder, unless another request was faster, or writes there again: that one clears it up."""
        target = self._root / path
        target.unlink(missing_ok=True)
        try:
            target.parent.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                raise

    def sync_bytes(self, path: str) -> None:
        _sync(self._root / path)

    def sync_name(self, path: str) -> None:
        folder = (self._root / path).parent
        _sync(folder)
        if folder not in self._kept:  # from the root down: a folder counts as kept once all above it are
            for each in (*(up for up in reversed(folder.parents) if self._root in up.parents), folder):
                _sync(each.parent)
                self._kept.add(each)


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


def _sync(path: Path) -> None:
    """Until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def _nothing() -> AsyncIterator[bytes]:
    return
    yield b""


def _draft() -> str:
    return f"{INCOMING}/{secrets.token_hex(16)}"


def _path(digest: str) -> str:
    return f"{ARTIFACTS}/{digest[:2]}/{digest}"


def _whole(upload_id: str) -> str:
    return f"{UPLOADS}/{upload_id}/whole"


def _chunk(upload_id: str, number: int) -> str:
    return f"{UPLOADS}/{upload_id}/{number:05d}"
