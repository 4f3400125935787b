"""docs/security.md names tests: they exist, and every threat has one."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
NAMES = re.compile(r"`(test_[a-z0-9_]+)`")


def table_rows() -> list[list[str]]:
    """The cells of the table of threats, without its head and the lines that only name a group."""
    text = (REPOSITORY / "docs" / "security.md").read_text(encoding="utf-8")
    table = text.split("## Threats")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [row for row in rows[2:] if not row[0].startswith("**")]


def all_tests() -> set[str]:
    found: set[str] = set()
    for path in (REPOSITORY / "tests").rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found |= {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
        }
    return found


def test_every_threat_says_what_stops_it_and_names_a_test() -> None:
    rows = table_rows()
    assert len(rows) >= 35
    assert [row for row in rows if len(row) != 3 or not row[1] or not NAMES.search(row[2])] == []


def test_every_test_that_the_table_names_exists() -> None:
    named = {name for row in table_rows() for name in NAMES.findall(row[2])}
    assert sorted(named - all_tests()) == []
