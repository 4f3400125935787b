"""What the groups of typed calls share; `fedmkt.client` puts them together."""

import secrets
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar, Unpack

import httpx
from pydantic import BaseModel

from fedmkt.session import Call, Method, Session
from fedmkt.transfers import Transfers

View = TypeVar("View", bound=BaseModel)
Item = TypeVar("Item")
ItemOnPage = TypeVar("ItemOnPage", covariant=True)


class Calls:
    """Calls over one session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._transfers = Transfers(session)

    def _read(self, model: type[View], answer: httpx.Response) -> View:
        return self.session.read(model, answer)

    def _send(self, method: Method, path: str, **call: Unpack[Call]) -> httpx.Response:
        return self.session.request(method, path, **call)


class Page(Protocol[ItemOnPage]):
    @property
    def items(self) -> tuple[ItemOnPage, ...]: ...

    @property
    def next_cursor(self) -> str | None: ...


def all_items(read: Callable[[str | None], Page[Item]]) -> Iterator[Item]:
    """What a call that answers with pages has in all of them; `read` gets the cursor, None for the first page."""
    cursor: str | None = None
    while True:
        page = read(cursor)
        yield from page.items
        if (cursor := page.next_cursor) is None:
            return


def once() -> dict[str, str]:
    """A key under which the coordinator does this once, however often the request arrives."""
    return {"Idempotency-Key": secrets.token_hex(16)}


def from_cursor(cursor: str | None) -> dict[str, str]:
    return {} if cursor is None else {"cursor": cursor}
