"""What deploys the project: generated secrets, and the dependency lists that images are built from."""

import importlib.util
import json
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, REPOSITORY / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    for volume in ("database", "redis", "coordinator", "operator", "worker"):
        (tmp_path / volume).mkdir()
    return tmp_path


def contents(volumes: Path) -> dict[str, str]:
    return {str(path.relative_to(volumes)): path.read_text() for path in volumes.rglob("*") if path.is_file()}


def pins(constraints: str) -> dict[str, str]:
    lines = [line for line in constraints.splitlines() if "==" in line]
    return {name: version for name, _, version in (line.partition("==") for line in lines)}


def test_a_second_start_keeps_every_secret(volumes: Path) -> None:
    first_start = load("deploy/docker/first_start.py")
    first_start.make_secrets(volumes)
    first = contents(volumes)
    first_start.make_secrets(volumes)
    assert contents(volumes) == first
    assert len(first) == 10
    assert len(set(first.values())) == 8  # operator's and worker's token: given and taken


def test_two_stacks_share_no_secret(tmp_path: Path) -> None:
    first_start = load("deploy/docker/first_start.py")
    found: list[set[str]] = []
    for stack in ("one", "two"):
        for volume in ("database", "redis", "coordinator", "operator", "worker"):
            (tmp_path / stack / volume).mkdir(parents=True)
        first_start.make_secrets(tmp_path / stack)
        found.append(set(contents(tmp_path / stack).values()))
    assert found[0].isdisjoint(found[1])


def test_only_what_other_images_read_is_readable_by_others(volumes: Path) -> None:
    load("deploy/docker/first_start.py").make_secrets(volumes)
    open_to_all = {
        str(path.relative_to(volumes))
        for path in volumes.rglob("*")
        if path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077
    }
    assert open_to_all == {"database/password", "redis/password"}


def test_the_coordinators_secrets_are_what_the_others_hold(volumes: Path) -> None:
    load("deploy/docker/first_start.py").make_secrets(volumes)
    made = contents(volumes)
    assert made["coordinator/fedmkt_operator_token"] == made["operator/token"]
    assert made["coordinator/fedmkt_worker_token"] == made["worker/token"]
    assert json.loads(made["operator/credentials.json"]) == {"operator": made["operator/token"]}
    assert f":{made['database/password']}@postgres" in made["coordinator/fedmkt_database_url"]
    assert f":{made['redis/password']}@redis" in made["coordinator/fedmkt_redis_url"]


def test_an_image_installs_its_extra_and_the_library_and_never_the_project() -> None:
    listed = load("deploy/requirements.py").requirements(PROJECT, "llm-server")
    assert set(PROJECT["dependencies"]) < set(listed)
    assert set(PROJECT["optional-dependencies"]["ml"]) < set(listed)
    assert "redis>=6" in listed
    assert not any(line.startswith("fedmkt") for line in listed)


def test_the_coordinators_image_has_no_torch() -> None:
    listed = load("deploy/requirements.py").requirements(PROJECT, "coordinator")
    assert not [line for line in listed if re.match(r"torch|transformers|peft|accelerate", line)]


def test_an_extra_that_does_not_exist_is_named() -> None:
    with pytest.raises(SystemExit, match="no extra 'llm'"):
        load("deploy/requirements.py").requirements(PROJECT, "llm")


def test_every_requirement_of_the_project_has_an_exact_pin() -> None:
    pinned = pins((REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
    for line in load("deploy/requirements.py").requirements(PROJECT, "dev"):
        name = re.match(r"[\w.-]+", line)
        assert name is not None
        assert re.sub(r"[-_.]+", "-", name[0]).lower() in pinned, f"run `make lock`: {line} has no pin"
    assert pinned["torch"] == "2.13.0"


def test_what_is_installed_is_what_the_constraints_pin() -> None:
    """Names without a pin pass: the CUDA build of torch brings libraries that the CPU build does not."""
    printed = subprocess.run(
        [sys.executable, "deploy/lock.py"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    installed, pinned = pins(printed), pins((REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
    differing = {name: version for name, version in installed.items() if pinned.get(name, version) != version}
    assert not differing, "the environment is not what constraints.txt says: run `make setup`"
    assert {"torch", "numpy", "pytest", "fastapi"} <= set(installed)
