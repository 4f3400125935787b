"""How routes that read raw bytes describe their body."""

from typing import Any


def raw_body(media_type: str, description: str) -> dict[str, Any]:
    schema = {"type": "string", "format": "binary", "description": description}
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}
