"""Bytes that have to get through bad lines: sent in parts, fetched by range, taken up where the line broke.

How large a part is adapts to the line. A request ends within seconds on a slow one, and on a fast one a part is a whole
chunk. What a broken request brought is not sent again: the coordinator keeps it and says how much that was.
"""

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx

from fedmkt.answers import CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt.protocol import CHUNK_BYTES
from fedmkt.session import CoordinatorUnreachable, Session

FIRST_PART_BYTES = 1 << 18  # 40 seconds at 56 kbit/s, less than a request's timeout
SMALLEST_PART_BYTES = 1 << 15
LARGEST_PART_BYTES = CHUNK_BYTES
QUICK_S, SLOW_S = 1.0, 10.0  # a part that took less, or more, lets the next one be larger, or smaller
SLOWEST_BYTES_S = 1000  # a transfer that comes to less than this, patience aside, is given up
MAX_ARTIFACT_BYTES = 2 << 30

Arrived = Callable[[httpx.Response], int]  # reads from an answer how many of the body's bytes are there


class ArtifactCorrupt(Refusal):
    status = 502
    code = "artifact.corrupt"
    title = "The artifact is not what its name says"
    remedy = "Fetch it again; if that repeats, a proxy changes bytes, or the coordinator's store is damaged."


class ArtifactTooLarge(Refusal):
    status = 413
    code = "artifact.too_large"
    title = "The artifact is too large"
    remedy = "The coordinator names something larger than its kind may be: check that both have one version."


class Transfers:
    """Of one session. Several threads may send at the same time; they share what was learned of the line."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._part_bytes = FIRST_PART_BYTES

    # ------------------------------------------------------------------------------------------ sending

    def send(self, path: str, data: bytes, arrived: Arrived, have: int = 0) -> None:
        """PUT `data`, of which the coordinator has the first `have` bytes, until it has all of them.

        Whatever gets through starts patience anew. Raises CoordinatorUnreachable when nothing does, or next to nothing.
        """
        sending = _Sending(self._session, path, data, arrived, have)
        ends = self._end(len(data))
        while sending.have < len(data):
            if time.monotonic() > ends:
                raise self._too_slow(f"PUT {path}", sending.have, len(data))
            sending.part_bytes = self._part_bytes
            began = time.monotonic()
            try:
                self._session.persist(f"PUT {path}", sending.attempt)
            finally:
                self._part_bytes = _next_part(sending.part_bytes, time.monotonic() - began)

    # ------------------------------------------------------------------------------------------ fetching

    def fetch(self, digest: str, folder: Path, max_bytes: int) -> Path:
        """The artifact as a file in `folder`, named by its digest; taken from there when it lies there already."""
        target = folder / digest
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{digest}.part"
        begun_with = _size(part)
        began = time.monotonic()
        while not self._session.persist(f"GET artifact {digest}", partial(self._continue, digest, part, max_bytes)):
            # the line broke, but bytes came: patience starts anew
            came = max(0, _size(part) - begun_with)
            if time.monotonic() > began + self._session.patience_s + came / SLOWEST_BYTES_S:
                raise self._too_slow(f"GET artifact {digest}", came, None)
        found = sha256_of(part)
        if found != digest:
            part.unlink()
            raise ArtifactCorrupt(f"artifact {digest} came with SHA-256 {found}: fetch it again")
        part.replace(target)
        return target

    def _continue(self, digest: str, part: Path, max_bytes: int) -> bool:
        """Append to `part` what is missing. True when it is whole; False when the line broke after some bytes."""
        have = _size(part)
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with (
                self._session.stream("GET", f"/v1/artifacts/{digest}", headers=headers) as response,
                part.open("ab" if response.status_code == 206 else "wb") as file,
            ):
                self._copy(response, file.write, file.tell(), max_bytes)
        except httpx.TransportError:
            if _size(part) <= have:  # no progress: this counts against patience
                raise
            return False
        except CoordinatorProblem as problem:
            if problem.problem.status != 416 or have == 0:
                raise
            # The part is as long as the artifact or longer. Its digest decides; if wrong, it is fetched anew.
            if sha256_of(part) != digest:
                part.unlink()
                return False
        return True

    def _copy(self, response: httpx.Response, write: Callable[[bytes], object], size: int, max_bytes: int) -> None:
        """As it arrives: nothing waits in a buffer when the line breaks. A line that trickles counts as broken."""
        began, came = time.monotonic(), 0
        for piece in response.iter_bytes():
            size, came = size + len(piece), came + len(piece)
            if size > max_bytes:
                raise ArtifactTooLarge(f"{response.request.url.path} is longer than {max_bytes} bytes")
            write(piece)
            if time.monotonic() > began + self._session.patience_s + came / SLOWEST_BYTES_S:
                raise httpx.ReadTimeout(f"less than {SLOWEST_BYTES_S} bytes a second come", request=response.request)

    # ------------------------------------------------------------------------------------------ giving up

    def _end(self, size_bytes: int) -> float:
        return time.monotonic() + self._session.patience_s + size_bytes / SLOWEST_BYTES_S

    def _too_slow(self, what: str, came: int, of: int | None) -> CoordinatorUnreachable:
        whole = "" if of is None else f" of {of}"
        return CoordinatorUnreachable(
            f"{what} at {self._session.base_url}: {came}{whole} bytes got through, fewer than {SLOWEST_BYTES_S} a "
            "second; they are kept for the next try, which needs a better line"
        )


class _Sending:
    """One body on its way. `attempt` ends when something got through, so that patience is for silence alone."""

    def __init__(self, session: Session, path: str, data: bytes, arrived: Arrived, have: int) -> None:
        self.have = have
        self.part_bytes = FIRST_PART_BYTES
        self._session = session
        self._path = path
        self._data = data
        self._arrived = arrived
        self._unsure = False  # a request broke: how much of it arrived, only the coordinator knows

    def attempt(self) -> None:
        if self._unsure:
            there = self._arrived(self._put(b"", "*"))  # asks
            self._unsure = False
            self._session.count(up=max(0, there - self.have))
            if there != self.have:
                self.have = there
                return
        stop = min(len(self._data), self.have + self.part_bytes)
        self._unsure = True
        answer = self._put(self._data[self.have : stop], f"{self.have}-{stop - 1}")
        self._unsure = False
        self.have = self._arrived(answer)

    def _put(self, body: bytes, span: str) -> httpx.Response:
        headers = {"Content-Range": f"bytes {span}/{len(self._data)}"}
        try:
            return self._session.once("PUT", self._path, body=body, headers=headers)
        except (httpx.TransportError, CoordinatorProblem):
            self.part_bytes = max(SMALLEST_PART_BYTES, self.part_bytes // 2)
            raise


def _next_part(part_bytes: int, seconds: float) -> int:
    """Larger after a quick part, smaller after a slow one; breaks have halved it already."""
    if seconds < QUICK_S:
        return min(LARGEST_PART_BYTES, 2 * part_bytes)
    return max(SMALLEST_PART_BYTES, part_bytes // 2) if seconds > SLOW_S else part_bytes


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
