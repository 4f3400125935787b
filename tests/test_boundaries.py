"""The import rules of CONTRIBUTING.md, proved over every source file: who may import whom, and who may import torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = (REPOSITORY / "src", *sorted((REPOSITORY / "services").iterdir()))
SERVICES = ("fedmkt_coordinator", "fedmkt_llm_server", "fedmkt_client_agent")
HEAVY = ("torch", "transformers", "peft", "accelerate")
# Not imported with torch absent: what needs it, and what alembic runs as a script.
NOT_IMPORTED = ("fedmkt.ml", "fedmkt.demo", "fedmkt_coordinator.migrations.")
TORCH_SIDE = ("fedmkt.ml", "fedmkt.demo", "fedmkt_llm_server", "fedmkt_client_agent")


@dataclass(frozen=True)
class Import:
    """One import statement's target, dotted, and whether it runs when the module is imported."""

    target: str
    line: int
    at_module_level: bool


Imports = dict[str, tuple[Import, ...]]  # dotted module name -> what it imports


def imports_of(source: str, module: str, is_package: bool) -> Iterator[Import]:
    """Every import in a source text; `from a import b` counts as both `a` and `a.b`."""
    package = module if is_package else module.rpartition(".")[0]

    def walk(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, child.lineno, at_module_level)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")
                    base = ".".join([*parents[: len(parents) - child.level + 1], *([base] if base else [])])
                yield Import(base, child.lineno, at_module_level)
                for alias in child.names:
                    yield Import(f"{base}.{alias.name}", child.lineno, at_module_level)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_module_level and not inside)

    return walk(ast.parse(source), True)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


@pytest.fixture(scope="module")
def imports() -> Imports:
    """Dotted module name -> its imports, for the library and the three services."""
    found = {}
    for root in ROOTS:
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            found[module] = tuple(imports_of(path.read_text(encoding="utf-8"), module, is_package))
    return found


def part(imports: Imports, *packages: str) -> Imports:
    return {module: its for module, its in imports.items() if is_in(module, *packages)}


def without(imports: Imports, *packages: str) -> Imports:
    return {module: its for module, its in imports.items() if not is_in(module, *packages)}


def offences(importers: Imports, *forbidden: str) -> list[str]:
    """`module:line imports target` for each import of a forbidden package by one of these modules."""
    return sorted(
        {
            f"{module}:{found.line} imports {found.target}"
            for module, its in importers.items()
            for found in its
            if is_in(found.target, *forbidden)
        }
    )


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\nfrom . import near\nfrom ..up import thing\ndef f():\n    if x:\n        import late\n"
    assert list(imports_of(source, "pkg.sub.mod", is_package=False)) == [
        Import("a.b", 1, True),
        Import("pkg.sub", 2, True),
        Import("pkg.sub.near", 2, True),
        Import("pkg.up", 3, True),
        Import("pkg.up.thing", 3, True),
        Import("late", 6, False),
    ]
    assert [i.target for i in imports_of("from .a import b", "pkg", is_package=True)] == ["pkg.a", "pkg.a.b"]


def test_every_part_of_the_project_is_looked_at(imports: Imports) -> None:
    for package in ("fedmkt.protocol", "fedmkt.ml", *SERVICES):
        assert any(is_in(module, package) for module in imports), package


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_imports_another(imports: Imports, service: str) -> None:
    others = tuple(other for other in SERVICES if other != service)
    assert offences(part(imports, service), *others) == []


def test_the_library_imports_no_service(imports: Imports) -> None:
    assert offences(part(imports, "fedmkt"), *SERVICES) == []


def test_torch_stays_inside_its_boundary(imports: Imports) -> None:
    assert offences(without(imports, *TORCH_SIDE), *HEAVY) == []


def test_nothing_below_the_torch_boundary_reaches_over_it(imports: Imports) -> None:
    """A command may load what it runs inside its function; nobody else may know of the demo or of fedmkt.ml."""
    below = {
        module: tuple(each for each in found if each.at_module_level or not is_command(module))
        for module, found in without(imports, *TORCH_SIDE).items()
    }
    assert offences(below, "fedmkt.ml", "fedmkt.demo") == []


def is_command(module: str) -> bool:
    return module == "fedmkt.cli" or module.endswith(("_command", "_commands"))


def test_nothing_but_the_demo_itself_builds_on_the_demo(imports: Imports) -> None:
    assert offences(part(imports, "fedmkt.ml", *SERVICES), "fedmkt.demo") == []


def test_no_module_imports_itself_through_others(imports: Imports) -> None:
    graph = {
        module: {found.target for found in its if found.at_module_level and found.target in imports} - {module}
        for module, its in imports.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail("import circle: " + " <- ".join(circle.args[1]))


BLOCKED_IMPORT = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)

sys.meta_path.insert(0, Absent())
package = importlib.import_module({package!r})
for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not found.name.startswith({skipped!r}) and not found.name.endswith(".__main__"):
        importlib.import_module(found.name)
print(*sorted(name for name in sys.modules if name.startswith("fedmkt")))
"""


@pytest.mark.parametrize(
    ("package", "proof"), [("fedmkt_coordinator", "fedmkt_coordinator.app"), ("fedmkt", "fedmkt.cli")]
)
def test_every_module_outside_the_boundary_imports_with_torch_absent(package: str, proof: str) -> None:
    program = BLOCKED_IMPORT.format(heavy=HEAVY, package=package, skipped=NOT_IMPORTED)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert proof in done.stdout.split()
