"""The object store below artifacts and uploads: a local folder, or S3 and what is compatible with it.

Whatever it raises when it is away, full or not allowed becomes DependencyDown; what is not there, FileNotFoundError.
"""

from collections.abc import AsyncIterable, AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from fedmkt_coordinator.dependencies import DependencyDown

if TYPE_CHECKING:  # names that obstore has for type checkers alone
    from obstore import BytesStream
    from obstore.store import ClientConfig, RetryConfig

READ_BYTES = 1 << 20  # one piece of a stream
FETCH_BYTES = 8 << 20  # one request to a remote store: short enough for its timeout, however slow our own reader is

# A request that waits on a store that is away fails within seconds, so that whoever sent it can be told to come again.
# Plain HTTP only where the operator's own endpoint says http://.
CLIENT: "ClientConfig" = {"connect_timeout": timedelta(seconds=3), "timeout": timedelta(seconds=30), "allow_http": True}
RETRY: "RetryConfig" = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}


class Objects:
    """Paths to bytes. `root` is the folder where they lie, None for a remote store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.root = Path(store.prefix) if isinstance(store, LocalStore) and store.prefix else None

    @classmethod
    def in_folder(cls, folder: Path) -> Self:
        with telling():
            return cls(LocalStore(folder, mkdir=True, automatic_cleanup=True))

    @classmethod
    def at(cls, url: str) -> Self:
        """file:///folder, s3://bucket/prefix and the like; AWS_ variables say where and as whom."""
        if url.startswith("file:"):
            return cls(from_url(url))
        return cls(from_url(url, client_options=CLIENT, retry_config=RETRY))

    async def put(self, path: str, data: bytes | AsyncIterable[bytes]) -> None:
        """What the stream itself raises passes through, and nothing is stored then."""
        with telling():
            await obstore.put_async(self._store, path, data)

    async def size(self, path: str) -> int:
        with telling():
            return int((await obstore.head_async(self._store, path))["size"])

    async def get(self, path: str) -> bytes:
        with telling():
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

    async def stream(self, path: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes start..stop-1 in pieces. What is wrong with the first is raised here, before any is handed out."""
        if self.root is not None:
            with telling():
                found = await obstore.get_async(self._store, path, options={"range": (start, stop)})
            return self._pieces(found.stream(min_chunk_size=READ_BYTES))
        first = await self._range(path, start, min(stop, start + FETCH_BYTES))
        return self._ranges(path, first, start + len(first), stop)

    async def _pieces(self, pieces: "BytesStream") -> AsyncIterator[bytes]:
        with telling():
            async for piece in pieces:
                yield bytes(piece)

    async def _ranges(self, path: str, first: bytes, at: int, stop: int) -> AsyncIterator[bytes]:
        yield first
        while at < stop:
            piece = await self._range(path, at, min(stop, at + FETCH_BYTES))
            yield piece
            at += len(piece)

    async def _range(self, path: str, start: int, stop: int) -> bytes:
        with telling():
            return bytes(await obstore.get_range_async(self._store, path, start=start, end=stop))

    async def rename(self, path: str, to: str) -> None:
        with telling():
            await obstore.rename_async(self._store, path, to)

    async def delete(self, path: str) -> None:
        """What is gone already stays so: another request or replica may be faster."""
        with telling(), suppress(FileNotFoundError):
            await obstore.delete_async(self._store, path)

    async def paths(self, prefix: str, before: datetime | None = None) -> list[str]:
        """Of everything below `prefix`, or of what was last written before that time."""
        with telling():
            return [
                each["path"]
                async for page in obstore.list(self._store, prefix)
                for each in page
                if before is None or each["last_modified"] < before
            ]


@contextmanager
def telling() -> Iterator[None]:
    """The store's failures as DependencyDown. Also around direct work in its folder: a full disk is one of them."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (BaseError, OSError) as error:
        raise DependencyDown("artifacts", error) from error
