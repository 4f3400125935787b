"""What is given away: the wheel and the sdist build without an index, and each extra brings what its part imports.

A fresh environment gets the wheel by pip, and of the libraries here those alone that the extra asks for, linked
instead of downloaded: that needs no network, and what the extra forgets is missed all the same.
"""

import hashlib
import importlib.util
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedmkt import __version__

REPOSITORY = Path(__file__).resolve().parent.parent
PATIENCE_S = 240
pytestmark = pytest.mark.timeout(2 * PATIENCE_S)

EVERY_MODULE = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for each in pkgutil.walk_packages(getattr(package, "__path__", []), name + "."):
        if not each.name.endswith("__main__") and ".migrations." not in each.name:
            importlib.import_module(each.name)
"""
# Extras -> packages all of whose modules it has to import, and modules that it does not bring.
EXTRAS = {
    "": (["fedmkt.protocol"], ["fastapi", "torch", "redis"]),
    "coordinator": (["fedmkt_coordinator", "fedmkt.protocol"], ["torch", "transformers"]),
    "llm-server": (["fedmkt_llm_server"], ["sqlalchemy", "obstore", "alembic"]),
    "client-agent": (["fedmkt_client_agent"], ["sqlalchemy", "obstore", "redis"]),
    "ml": (["fedmkt.ml.training", "fedmkt.ml.lora", "fedmkt.ml.evaluation"], ["fastapi", "uvicorn", "redis"]),
    "parquet": (["pyarrow.parquet"], ["torch", "fastapi"]),
    "datasets": (["datasets"], ["fastapi", "redis"]),
    "ml,privacy": (["fedmkt.ml"], ["fastapi", "redis"]),
    "otel": (["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http"], ["torch", "fastapi"]),
}
TOOLS = {"dev", "chart", "experiments", "quantization"}  # for whoever works on the project; a library for CUDA


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(each) for each in command], cwd=cwd, env={"PATH": "/usr/bin:/bin", "HOME": str(cwd)},
        capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target, cwd=source)
    (built,) = [each for each in target.iterdir() if each.suffix == {"wheel": ".whl", "sdist": ".gz"}[kind]]
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", REPOSITORY, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def brought(wheel: Path, extras: str) -> set[str]:
    """Every distribution that the wheel with these extras asks for, and what those ask for in turn."""
    spec = importlib.util.spec_from_file_location("lock", REPOSITORY / "deploy" / "lock.py")
    assert spec is not None
    assert spec.loader is not None
    lock: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"fedmkt-{__version__}.dist-info/METADATA").decode()
    requirements = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)]
    own, todo, seen = extras.split(","), list[tuple[str, frozenset[str]]](), set[tuple[str, frozenset[str]]]()
    for extra in own:  # grows as extras of ours name others
        for each in requirements:
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                own += [new for new in sorted(each.extras) if each.name == "fedmkt" and new not in own]
                todo += [(canonicalize_name(each.name), frozenset(each.extras))] if each.name != "fedmkt" else []
    while todo:
        if (found := todo.pop()) not in seen:
            seen.add(found)
            todo += lock.needed(*found)
    return {name for name, _ in seen}


@pytest.fixture
def fresh(tmp_path: Path, wheel: Path, extra: str) -> Path:
    """The Python of a new environment that holds the wheel and what the extra asks for."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    here = Path(sysconfig.get_path("purelib"))
    there = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    for name in brought(wheel, extra):
        # Whole folders at the top: of what several distributions share (a namespace), all of it.
        for top in {each.parts[0] for each in distribution(name).files or () if each.parts[0] != ".."}:
            if not (there / top).exists() and top != "__pycache__":
                (there / top).symlink_to(here / top)
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install"]
    run(*pip, "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    return python


def test_the_wheel_has_the_version_the_packages_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"fedmkt-{__version__}-py3-none-any.whl"
    names = set(contents(wheel))
    packages = {"fedmkt", "fedmkt_coordinator", "fedmkt_llm_server", "fedmkt_client_agent"}
    assert {name.partition("/")[0] for name in names} == packages | {f"fedmkt-{__version__}.dist-info"}
    assert "fedmkt/py.typed" in names
    assert "fedmkt_coordinator/migrations/versions/0001_first_schema.py" in names
    assert f"fedmkt-{__version__}.dist-info/licenses/LICENSE" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", REPOSITORY, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"fedmkt-{__version__}"
    for needed in ("tests/conftest.py", "docs/api.md", "deploy/lock.py", "Makefile", "CHANGELOG.md", "constraints.txt"):
        assert (source / needed).exists(), needed
    assert contents(build("wheel", source, tmp_path / "again")) == contents(wheel)


def test_every_extra_is_tried_or_a_tool() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tried = {extra for extras in EXTRAS for extra in extras.split(",") if extra}
    assert set(project["optional-dependencies"]) == tried | TOOLS


# Those with torch take half a minute each; two of them are enough to see that `ml` and `privacy` hang together.
WITH_LONG = [pytest.param(each, marks=pytest.mark.long) if each in ("ml", "ml,privacy") else each for each in EXTRAS]


@pytest.mark.parametrize("extra", WITH_LONG)
def test_a_fresh_environment_with_one_extra_has_what_its_part_imports(fresh: Path, extra: str, tmp_path: Path) -> None:
    packages, absent = EXTRAS[extra]
    run(fresh, "-c", EVERY_MODULE, *[each for each in packages if "fedmkt" in each], cwd=tmp_path)
    run(fresh, "-c", "import " + ", ".join(["fedmkt.client", "fedmkt.codec", *packages]), cwd=tmp_path)
    assert "Usage: fedmkt" in run(fresh.parent / "fedmkt", "--help", cwd=tmp_path)
    found = "import importlib.util, sys; print([each for each in sys.argv[1:] if importlib.util.find_spec(each)])"
    assert run(fresh, "-c", found, *absent, cwd=tmp_path).strip() == "[]"


@pytest.mark.parametrize("extra", [""])
def test_a_part_that_is_not_installed_names_its_extra(fresh: Path, tmp_path: Path) -> None:
    command = [str(fresh.parent / "fedmkt"), "coordinator", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode != 0
    assert "pip install 'fedmkt[coordinator]'" in done.stderr


def test_the_changelog_speaks_of_this_version_first() -> None:
    headings = re.findall(r"^## (.+)$", (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0].startswith(f"{__version__} ") or headings[0] == "Unreleased"
    versions = [heading.split(" ")[0] for heading in headings if heading != "Unreleased"]
    assert versions[0] == __version__
    assert versions == sorted(versions, key=lambda each: tuple(map(int, each.split("."))), reverse=True)
