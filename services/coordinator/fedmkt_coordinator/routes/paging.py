"""Cursors: opaque to the client; here the list they belong to and the last item that was seen.

The item itself is named, not its place, so that what is added meanwhile shifts nothing.
"""

import base64
import binascii
from typing import Annotated

from fastapi import Query

from fedmkt.errors import Refusal

Limit = Annotated[int, Query(ge=1, le=200, description="items on a page")]
Cursor = Annotated[
    str | None,
    Query(
        max_length=200, pattern=r"^[A-Za-z0-9_-]+$", description="next_cursor of the page before; none for the first"
    ),
]
MAX_NUMBER = 2**53


class BadCursor(Refusal):
    code = "cursor.invalid"
    title = "The cursor is not one of this list"


def cursor_after(listed: str, item: str | int) -> str:
    """For the page that follows `item` in the list called `listed`."""
    return base64.urlsafe_b64encode(f"{listed}:{item}".encode()).decode().rstrip("=")


def item_before(listed: str, cursor: str) -> str:
    """The last item of the page before. Raises BadCursor for what `cursor_after` did not make for this list."""
    try:
        name, _, item = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().partition(":")
    except (binascii.Error, ValueError):
        name, item = "", ""
    if name != listed or not item or cursor_after(listed, item) != cursor:
        raise BadCursor(
            f"cursor {cursor[:80]!r} is no next_cursor of the list of {listed}; begin again without a cursor"
        )
    return item


def number_before(listed: str, cursor: str | None) -> int | None:
    """The same for lists that go by number; None without a cursor."""
    if cursor is None:
        return None
    item = item_before(listed, cursor)
    if not (item.isascii() and item.isdigit() and len(item) <= 16 and int(item) <= MAX_NUMBER):
        raise BadCursor(f"cursor {cursor[:80]!r} names no item of the list of {listed}; begin again without a cursor")
    return int(item)
