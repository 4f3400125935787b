"""A disk that is full, or read-only: a state of its own, no crash, nothing lost, and on it goes when there is room."""

import errno
import json
import os
import resource
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from agent_process import AgentProcess, agent_process
from agent_world import Pages, World
from fedmkt.client import CoordinatorProblem
from fedmkt.errors import Refusal
from fedmkt.protocol import Problem, Schedule
from fedmkt_client_agent.main import serve as serve_agent
from fedmkt_client_agent.states import CODES, TO_DO, frames_of, reason_of, state_of
from fedmkt_client_agent.store import AgentStore
from live_coordinator import Background, tiny_config, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(900)]
SCHEDULE = Schedule(quorum=1, collect_timeout_s=900, distill_timeout_s=60, apply_timeout_s=900)


# ------------------------------------------------------------------------------------------------ what an error means


class Wrapped(Refusal):
    code = "party.unreadable"


def caused(outer: Exception, inner: Exception) -> Exception:
    try:
        raise outer from inner
    except type(outer) as error:
        return error


def problem(status: int, code: str) -> CoordinatorProblem:
    return CoordinatorProblem(Problem(type="about:blank", title=code, status=status, code=code, detail=code))


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (OSError(errno.ENOSPC, "No space left"), "disk_full"),
        (OSError(errno.EDQUOT, "Quota exceeded"), "disk_full"),
        (OSError(errno.EROFS, "Read-only file system"), "read_only"),
        (PermissionError(errno.EACCES, "Permission denied"), "read_only"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk_full"),
        (caused(Wrapped("torn"), OSError(errno.ENOSPC, "No space left")), "disk_full"),
        (OSError(errno.EIO, "Input/output error"), "failed"),
        (ValueError("No space left (os error 28)"), "failed"),
        (problem(503, "database.unavailable"), "unreachable"),
        (problem(409, "upload.differs"), "failed"),
    ],
)
def test_what_the_system_says_decides_the_state(error: Exception, state: str) -> None:
    assert state_of(error) == state


def test_every_state_that_is_trouble_says_what_to_do() -> None:
    assert set(CODES.values()) <= TO_DO.keys()
    assert all(TO_DO.values())


def test_of_an_unexpected_error_only_its_kind_and_its_places_in_the_code_are_told() -> None:
    try:
        try:
            dict[str, str]()["the patient's name"]
        except KeyError as error:
            raise FileNotFoundError(errno.ENOENT, "gone", "/secret/place") from error
    except OSError as error:
        told = " ".join([reason_of(error), *frames_of(error)])
    assert told.startswith("FileNotFoundError ENOENT client_agent/test_agent_disk.py:")
    assert "KeyError" in told
    assert "patient" not in told
    assert "secret" not in told


# ------------------------------------------------------------------------------------------------ a real small disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounting = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounting.returncode != 0:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place: Path) -> Path:
    """To the last byte."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            with suppress(OSError):
                while file.write(b"\0" * size) == size:
                    pass
    assert os.statvfs(place).f_bavail == 0
    return filler


def test_a_full_disk_is_named_and_the_round_goes_on_when_there_is_room(world: World, small_disk: Path) -> None:
    federation_id = world.begin(tiny_config(("north",), name="full", schedule=SCHEDULE))
    settings = world.settings(federation_id, "north", state_dir=small_disk / "agent", status_port=0)
    agent = world.start(settings, federation_id, "north")
    with Pages(settings) as pages:
        filler = fill(small_disk)
        world.request(federation_id)
        until(lambda: pages.status()["state"] == "disk_full", 120)
        assert "make room" in pages.status()["to_do"]
        assert agent.alive
        filler.unlink()
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1, timeout_s=240)
    assert finished.sites[0].state == "applied"
    assert agent.end() is None
    state = AgentStore(settings.state_dir).load()
    assert state.work is not None
    assert state.work.reported
    assert state.rounds_trained == 1


def _read_only(folder: Path) -> Callable[[], object]:
    """Make it so, by whatever this user may do; returns what undoes it."""
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        return lambda: folder.chmod(0o700)
    mounting = ["mount", "-t", "tmpfs", "-o", "ro,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(mounting, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may write anywhere and mount nothing")
    return lambda: subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)


def test_a_read_only_state_folder_is_named_and_used_once_it_can_be_written(world: World, tmp_path: Path) -> None:
    federation_id = world.begin(tiny_config(("north",), name="read-only"))
    folder = tmp_path / "agent"
    repair = _read_only(folder)
    try:
        port = _free_port()
        settings = world.settings(federation_id, "north", state_dir=folder, status_port=port)
        agent = Background(serve_agent, settings)
        with Pages.at(port) as pages:
            until(lambda: pages.answers() and pages.status()["state"] == "read_only", 120)
            assert "let the agent's user write" in pages.status()["to_do"]
            repair()
            until(lambda: pages.status()["state"] == "waiting", 120)
        assert agent.end() is None
        assert (folder / "state.json").exists()
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


# ------------------------------------------------------------------------------------------------ a limit of the system


@pytest.fixture
def limited(world: World) -> Iterator[tuple[AgentProcess, str]]:
    """An agent process whose files may not grow beyond what `prlimit` says."""
    federation_id = world.begin(tiny_config(("north",), name="limited", schedule=SCHEDULE))
    settings = world.settings(federation_id, "north")
    token = world.folder / "limited-token"
    assert settings.enrolment_token is not None
    token.write_text(settings.enrolment_token.get_secret_value())
    options: dict[str, Any] = {
        "coordinator": settings.coordinator_url,
        "enrolment-token-file": token,
        "model": settings.model,
        "private": settings.private_file,
        "state-dir": settings.state_dir,
        "status-port": 0,
    }
    with agent_process({name: str(value) for name, value in options.items()}, dict(os.environ)) as agent:
        yield agent, federation_id


@pytest.mark.e2e
def test_files_that_may_not_grow_are_a_full_disk_and_training_that_was_done_is_not_done_again(
    world: World, limited: tuple[AgentProcess, str]
) -> None:
    agent, federation_id = limited
    world.until_ready(federation_id, "north", timeout_s=240)
    agent.until_said("agent.waiting")
    unlimited = resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, (8000, unlimited[1]))  # state.json fits, adapters do not
    world.request(federation_id)
    agent.until_said("agent.trouble", state="disk_full")
    assert agent.process.poll() is None
    resource.prlimit(agent.process.pid, resource.RLIMIT_FSIZE, unlimited)
    (finished,) = world.coordinator.wait_for_rounds(federation_id, 1, timeout_s=240)
    assert finished.sites[0].state == "applied"
    assert agent.end() == 0
    events = [json.loads(line)["event"] for line in agent.lines]
    for once in ("private.trained", "knowledge.made", "knowledge.uploaded", "round.applied", "round.reported"):
        assert events.count(once) == 1, once
