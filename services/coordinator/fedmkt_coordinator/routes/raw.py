"""Headers and bodies that several routes describe alike."""

from typing import Annotated, Any

from fastapi import Header

IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="the same key has its effect once")
]
ContentRange = Annotated[
    str | None,
    Header(max_length=100, description="bytes FIRST-LAST/TOTAL: these bytes of the body; bytes */TOTAL asks what came"),
]


def raw_body(media_type: str, description: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary", "description": description}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
