"""Which refusals a route can answer with, read from the source: its own `raise` statements and those of all it calls.

The API's description is made from this, so it cannot fall behind the code. Names are resolved as Python would: globals,
modules, annotated parameters, fields and properties of classes. What is reached in another way (a class in a variable)
is not seen; the tests compare every problem that they get with the description.
"""

import ast
import builtins
import inspect
import textwrap
import threading
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

from fedmkt.errors import Refusal
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.uploads import Desk

OURS = "fedmkt"
# Names that always mean one thing here, where no annotation says it.
ALWAYS: Mapping[str, type] = {"tx": Transaction, "desk": Desk}


@dataclass(frozen=True)
class Raised:
    """One `raise`: the class, and its message with `...` for what is filled in."""

    refusal: type[Refusal]
    message: str


def raised_by(function: Callable[..., Any]) -> frozenset[Raised]:
    """Everything that `function` and all it calls can raise and nobody catches on the way.

    Raises OSError where the source is not installed, as in a distribution of bytecode alone.
    """
    with _walking:  # a walk in another thread would take what is not finished for the whole
        return _walk(inspect.unwrap(getattr(function, "__func__", function)))


@dataclass(frozen=True)
class _Instance:
    """Some object of this class."""

    of: type


_known: dict[Any, frozenset[Raised]] = {}
_walking = threading.Lock()


def _walk(function: Any) -> frozenset[Raised]:
    if function in _known:
        return _known[function]
    _known[function] = frozenset()  # for a function that comes back to itself
    if not isinstance(function, FunctionType) or function.__code__.co_filename.startswith("<"):
        return frozenset()  # a library's, or made by one (a dataclass's __init__): nothing of ours in it
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    _known[function] = frozenset(_Body(function, tree).of(tree))
    return _known[function]


class _Body:
    """One function's source, with the types of its names."""

    def __init__(self, function: FunctionType, tree: ast.AST) -> None:
        self._tree = tree
        self._globals = function.__globals__
        self._owner = _owner(function)
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):  # names that only a type checker imports
            hints = {}
        self._types = {name: _Instance(kind) for name, hint in hints.items() if (kind := _class_of(hint)) is not None}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                made = self._resolve(node.value)
                if isinstance(made, _Instance):
                    self._types[node.targets[0].id] = made

    def of(self, node: ast.AST) -> Iterator[Raised]:
        if isinstance(node, ast.Try):
            yield from self._tried(node)
            return
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found = self._resolve(node.exc.func)
            for refusal in [found] if isinstance(found, type) else self._tabled():
                if issubclass(refusal, Refusal):
                    yield Raised(refusal, _message(node.exc))
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield from self._reached(self._resolve(node))
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.arg | ast.AnnAssign):
                yield from self.of(child)

    def _tabled(self) -> Iterator[type]:
        """The classes in the tables that this function reads: one of them is in the variable that is raised."""
        for node in ast.walk(self._tree):
            table = self._globals.get(node.id) if isinstance(node, ast.Name) else None
            for row in table.values() if isinstance(table, dict) else ():
                yield from (each for each in (row if isinstance(row, tuple) else (row,)) if isinstance(each, type))

    def _tried(self, node: ast.Try) -> Iterator[Raised]:
        caught = tuple(kind for handler in node.handlers if _ends_it(handler) for kind in self._caught(handler))
        for part in node.body:
            yield from (each for each in self.of(part) if not issubclass(each.refusal, caught))
        for later in (*node.handlers, *node.orelse, *node.finalbody):
            yield from self.of(later)

    def _caught(self, handler: ast.ExceptHandler) -> Iterator[type]:
        given = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type] if handler.type else []
        for each in given:
            found = self._resolve(each)
            if isinstance(found, type):
                yield found

    def _reached(self, found: Any) -> Iterator[Raised]:
        """A function of ours that is called, or handed on to be called."""
        found = getattr(found, "__func__", found)
        if isinstance(found, FunctionType):
            plain = inspect.unwrap(found)
            if isinstance(plain, FunctionType) and plain.__module__.startswith(OURS):
                yield from _walk(plain)
        elif isinstance(found, type) and found.__module__.startswith(OURS) and not issubclass(found, Refusal):
            for name in ("__init__", "__post_init__"):
                yield from self._reached(vars(found).get(name))

    def _resolve(self, node: ast.expr) -> Any:
        """What an expression stands for: a module, a class, a function, an `_Instance`; None for the rest."""
        if isinstance(node, ast.Await):
            return self._resolve(node.value)
        if isinstance(node, ast.Call):
            made = self._resolve(node.func)
            return _Instance(made) if isinstance(made, type) else _returned(made)
        if isinstance(node, ast.Attribute):
            return self._attribute(self._resolve(node.value), node.attr)
        if not isinstance(node, ast.Name):
            return None
        if node.id in ("self", "cls") and self._owner is not None:
            return _Instance(self._owner)
        if node.id in self._types:
            return self._types[node.id]
        if node.id in ALWAYS:
            return _Instance(ALWAYS[node.id])
        return self._globals.get(node.id, getattr(builtins, node.id, None))

    def _attribute(self, base: Any, name: str) -> Any:
        if isinstance(base, ModuleType | type):
            return getattr(base, name, None)
        if not isinstance(base, _Instance):
            return None
        found = inspect.getattr_static(base.of, name, None)
        if isinstance(found, property):
            return _returned(found.fget)
        if isinstance(found, classmethod | staticmethod):
            return found.__func__
        if isinstance(found, FunctionType):
            return found
        kind = _class_of(_fields(base.of).get(name))
        return None if kind is None else _Instance(kind)


def _owner(function: FunctionType) -> type | None:
    """The class that a method belongs to."""
    names = function.__qualname__.split(".")[:-1]
    found: Any = inspect.getmodule(function)
    for name in names:
        found = getattr(found, name, None)
    return found if isinstance(found, type) else None


@cache
def _fields(kind: type) -> dict[str, Any]:
    """Types of an object's fields: as annotated, or as `__init__` assigns annotated arguments to them."""
    try:
        fields = dict(typing.get_type_hints(kind))
        given = typing.get_type_hints(vars(kind).get("__init__") or (lambda: None))
    except (NameError, TypeError):
        return {}
    return {**{f"_{name}": hint for name, hint in given.items()}, **given, **fields}


def _class_of(hint: Any) -> type | None:
    """The class of ours that an annotation names, without Annotated, Optional and the like."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and part.__module__.startswith(OURS):
            return part
    return None


def _returned(function: Any) -> _Instance | None:
    try:
        hint = typing.get_type_hints(getattr(function, "__func__", function)).get("return")
    except (NameError, TypeError, AttributeError):
        return None
    kind = getattr(function, "__self__", None) if hint is typing.Self else _class_of(hint)
    return _Instance(kind) if isinstance(kind, type) else None


def _ends_it(handler: ast.ExceptHandler) -> bool:
    """Whether what is caught goes no further: neither raised again nor made into an answer."""
    inside = list(ast.walk(handler))
    again = any(isinstance(each, ast.Raise) and each.exc is None for each in inside)
    answered = any(isinstance(each, ast.Name) and each.id == "problem_response" for each in inside)
    return not again and not answered


def _message(call: ast.Call) -> str:
    """The text that a refusal is given, `...` for what the moment fills in."""
    if not call.args:
        return ""
    parts = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
    return "".join(str(each.value) if isinstance(each, ast.Constant) else "..." for each in parts)
