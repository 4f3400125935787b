"""Cursors: opaque to the client, here the number of the last item it has seen."""

from typing import Annotated

from fastapi import Query

from fedmkt.errors import Refusal

Limit = Annotated[int, Query(ge=1, le=200, description="items on a page")]
Cursor = Annotated[str | None, Query(max_length=40, description="next_cursor of the page before")]


class BadCursor(Refusal):
    code = "cursor.invalid"
    title = "The cursor is not one of ours"


def number(cursor: str | None) -> int | None:
    if cursor is None or cursor == "":
        return None
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= 18):
        raise BadCursor(f"cursor {cursor!r} is no next_cursor of an earlier page; begin without one")
    return int(cursor)
