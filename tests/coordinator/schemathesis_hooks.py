"""What schemathesis has to be told: how bodies that are no JSON are made, and one check more of ours."""

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/jsonl")
def jsonl(_: schemathesis.SerializationContext, value: Any) -> bytes:
    """What it makes up as it is; now and then as a line of JSON."""
    if isinstance(value, bytes):
        return value
    return value.encode() if isinstance(value, str) else json.dumps(value, default=str).encode() + b"\n"


@schemathesis.check
def problems_say_what_to_do(_: schemathesis.CheckContext, response: schemathesis.Response, __: Any) -> None:
    """Every refusal is a problem document for this address, whose detail shows no inside of ours."""
    if response.status_code < 400:
        return
    problem = response.json()
    assert problem["status"] == response.status_code
    assert problem["type"] == f"urn:fedmkt:problem:{problem['code']}"
    assert problem["detail"]
    for inside in ("Traceback", "sqlalchemy", "sqlite3", "asyncpg", "object at 0x"):
        assert inside not in problem["detail"], problem["detail"]
