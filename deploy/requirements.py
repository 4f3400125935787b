"""Print what one extra of pyproject.toml asks for, without the project itself: what an image installs first.

`python requirements.py coordinator pyproject.toml`: a change of code then leaves the dependency layer alone.
"""

import re
import sys
import tomllib
from pathlib import Path

OWN_EXTRAS = re.compile(r"fedmkt\[([\w,-]+)\]")


def requirements(project: dict[str, object], extra: str) -> list[str]:
    """The project's dependencies and those of the extra, with references to its own extras resolved; sorted."""
    extras = project["optional-dependencies"]
    if not isinstance(extras, dict) or extra not in extras:
        raise SystemExit(f"pyproject.toml has no extra {extra!r}")
    found: set[str] = set(_strings(project["dependencies"]))
    todo = [extra]
    while todo:
        for line in _strings(extras[todo.pop()]):
            own = OWN_EXTRAS.fullmatch(line)
            if own:
                todo += own[1].split(",")
            else:
                found.add(line)
    return sorted(found)


def _strings(value: object) -> list[str]:
    if not isinstance(value, list):
        raise SystemExit(f"a list of requirements was expected, not {value!r}")
    return [str(item) for item in value]


if __name__ == "__main__":
    table = tomllib.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["project"]
    sys.stdout.write("\n".join(requirements(table, sys.argv[1])) + "\n")
