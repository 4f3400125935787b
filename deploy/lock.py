"""Print constraints.txt for the environment that runs this: every pin below the extra that first needs it.

`make lock` runs it in a fresh environment that holds nothing but `.[dev]`.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = "fedmkt"
GROUPS = {
    "": "the library",
    "coordinator": "the coordinator",
    "ml": "models",
    "llm-server": "the LLM server",
    "client-agent": "the agent",
    "dev": "tests and checks",
}
HEADER = """\
# What `make setup`, the images and CI install, to the exact version. Renew it with `make lock`, on the oldest Python
# that the project supports, so that backports are pinned too; then run `make test`.
# Plain versions, no hashes: one file serves the CPU build of torch and the CUDA build, which carry the same number."""


def needed(name: str, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    """The direct requirements of an installed distribution, in this environment, with these of its extras."""
    for line in distribution(name).requires or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(requirement.name), frozenset(requirement.extras)


def closure(extra: str) -> set[str]:
    """Every distribution that the project with one extra brings along, the project itself left out."""
    todo = [(PROJECT, frozenset({extra} - {""}))]
    seen = set(todo)
    while todo:
        for found in needed(*todo.pop()):
            if found not in seen:
                seen.add(found)
                todo.append(found)
    return {name for name, _ in seen} - {PROJECT}


def pins() -> Iterator[str]:
    """The lines of the file: each distribution once, in the first group whose closure has it."""
    yield HEADER
    listed: set[str] = set()
    for extra, title in GROUPS.items():
        names = closure(extra) - listed
        listed |= names
        if names:
            yield f"\n# {title}"
        for name in sorted(names):
            yield f"{name}=={Version(distribution(name).version).public}"


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins()) + "\n")
