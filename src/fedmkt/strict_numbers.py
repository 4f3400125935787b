"""Numbers that arrive as numbers: pydantic would also take "5", true and "no" for an integer or a bool."""

from typing import Any

from pydantic_core import CoreSchema, core_schema


def _number(value: Any) -> Any:
    if isinstance(value, bool | str | bytes):
        raise ValueError(f"a number is needed, a {type(value).__name__} came")
    return value


def _truth(value: Any) -> Any:
    if isinstance(value, int | float | str | bytes) and not isinstance(value, bool):
        raise ValueError(f"true or false is needed, a {type(value).__name__} came")
    return value


GUARDS = {"int": _number, "float": _number, "bool": _truth}
# Where a core schema holds others.
INSIDE = ("schema", "items_schema", "values_schema", "choices")  # keys of JSON objects are always text


def guarded(schema: CoreSchema) -> CoreSchema:
    """The schema of a model whose own numbers and bools take nothing else; models inside it see to themselves."""
    made: CoreSchema = _guard({**schema}, own=True)
    return made


def _guard(node: Any, *, own: bool = False) -> Any:
    """`own`: above the fields of the model that is made, so its own schema is gone into."""
    if isinstance(node, list | tuple):
        return type(node)(_guard(each) for each in node)
    if not isinstance(node, dict) or (node.get("type") == "model" and not own):
        return node
    below = own and node["type"] != "model"
    made = {key: _inside(key, value, own=below) for key, value in node.items()}
    guard = GUARDS.get(node["type"])
    return made if guard is None else core_schema.no_info_before_validator_function(guard, made)


def _inside(key: str, value: Any, *, own: bool) -> Any:
    if key in ("fields", "choices") and isinstance(value, dict):  # by name
        return {name: _guard(each) for name, each in value.items()}
    return _guard(value, own=own) if key in INSIDE else value
