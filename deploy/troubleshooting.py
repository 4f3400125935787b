"""Print docs/troubleshooting.md: every problem code with its causes and remedies, read from the source.

    python deploy/troubleshooting.py > docs/troubleshooting.md

Codes, titles and remedies are attributes of the `Refusal` classes; causes are the messages that the source gives them,
and those of the table of problems that the coordinator answers before any rule is asked.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType

import fedmkt
import fedmkt_client_agent
import fedmkt_coordinator
import fedmkt_llm_server
from fedmkt.answers import CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt_coordinator import problems
from fedmkt_coordinator.dependencies import REMEDIES

PACKAGES = (fedmkt, fedmkt_coordinator, fedmkt_llm_server, fedmkt_client_agent)
WITHOUT_MEANING = (Refusal, CoordinatorProblem)  # the base, and the one that carries the coordinator's own code
INTRODUCTION = """\
# Troubleshooting: every problem code

Whatever is refused has a stable code: `code` of an HTTP problem and of a log line; the command line prints the message.
Here stand, for each code, its messages (`...` is what the moment fills in; behind the semicolon stands what to do) and
the remedy where they leave it open. `GET /v1/problems` of a running coordinator lists those that its API answers with;
codes that begin with `http.` are HTTP's own statuses. Made by `make troubleshooting` from the source.
"""


@dataclass
class Entry:
    """What is known of one code; several classes may share it, one on each side of the wire."""

    titles: list[str] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)

    @property
    def helps(self) -> bool:
        """Whether a reader learns what to do: from a remedy, or from a message's part behind the semicolon."""
        return bool(self.remedies) or any(";" in message for message in self.messages)


def entries() -> dict[str, Entry]:
    """By code, in alphabetical order."""
    messages = _messages()
    found: dict[str, Entry] = defaultdict(Entry)
    for refusal in sorted(_classes(), key=lambda each: (each.__module__, each.__qualname__)):
        _join(found[refusal.code], refusal.title, refusal.status, messages[refusal], vars(refusal).get("remedy", ""))
    for known in _known():
        _join(found[known.code], known.title, known.status, known.details, known.remedy)
    for name in problems.NEEDED:
        _join(found[f"{name}.unavailable"], "", 0, (), f"Operators: {REMEDIES[name]}.")
    return dict(sorted(found.items()))


def page() -> str:
    """The whole of docs/troubleshooting.md."""
    lines, area = [INTRODUCTION], ""
    for code, entry in entries().items():
        if code.partition(".")[0] != area:
            area = code.partition(".")[0]
            lines.append(f"## {area}\n")
        lines.append(f"### {code}\n")
        status = " or ".join(str(each) for each in dict.fromkeys(entry.statuses))
        lines.append(f"{'; or: '.join(entry.titles)} (HTTP status {status}).\n")
        lines += [f"- {_quoted(message)}" for message in entry.messages]
        lines += [""] if entry.messages else []
        lines += [f"**Remedy.** {' '.join(entry.remedies)}\n"] if entry.remedies else []
    return "\n".join(lines).rstrip("\n") + "\n"


def _join(entry: Entry, title: str, status: int, messages: tuple[str, ...], remedy: str) -> None:
    for known, new in ((entry.titles, title), (entry.remedies, remedy)):
        if new and new not in known:
            known.append(new)
    if status and status not in entry.statuses:
        entry.statuses.append(status)
    entry.messages += [each for each in messages if each not in entry.messages]


def _quoted(message: str) -> str:
    """As text that Markdown leaves alone."""
    return re.sub(r"([<*\\])", r"\\\1", message)


def _known() -> Iterator[problems.Known]:
    for each in vars(problems).values():
        for known in each.values() if isinstance(each, dict) else each if isinstance(each, tuple) else (each,):
            if isinstance(known, problems.Known):
                yield known


# ------------------------------------------------------------------------------------------- from the source


def _modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        for each in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not each.name.endswith("__main__") and ".migrations." not in each.name:
                yield importlib.import_module(each.name)


def _classes() -> set[type[Refusal]]:
    """Every subclass of `Refusal` that is ours; all modules have to be imported."""
    todo: list[type[Refusal]] = [Refusal]
    found: set[type[Refusal]] = set()
    while todo:
        todo += (new := [each for each in todo.pop().__subclasses__() if each not in found])
        found.update(new)
    packages = {package.__name__ for package in PACKAGES}
    return {each for each in found if each.__module__.partition(".")[0] in packages} - set(WITHOUT_MEANING)


def _messages() -> dict[type[Refusal], tuple[str, ...]]:
    """What each class is given as its message, wherever one is made, or stands beside it in a table."""
    found: dict[type[Refusal], list[str]] = defaultdict(list)
    for module in _modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            parts = [node.func, *node.args] if isinstance(node, ast.Call) else getattr(node, "elts", [])
            refusal = _named(parts[0], module) if len(parts) > 1 else None
            text = re.sub(r"(\.\.\.)+", "...", _text(parts[1])) if refusal else ""
            if refusal and text.strip(". :;,"):
                found[refusal].append(" ".join(text.split()))
    return defaultdict(tuple, {refusal: tuple(dict.fromkeys(each)) for refusal, each in found.items()})


def _named(node: ast.expr, module: ModuleType) -> type[Refusal] | None:
    """The refusal that a name or `module.name` stands for."""
    found = None
    if isinstance(node, ast.Name):
        found = getattr(module, node.id, None)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        found = getattr(getattr(module, node.value.id, None), node.attr, None)
    return found if isinstance(found, type) and issubclass(found, Refusal) else None


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "..."


if __name__ == "__main__":
    sys.stdout.write(page())
