"""Federations to kill: a nursery of processes, and the folder and database that every case begins from."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos_federation import Federation
from chaos_templates import Templates
from nursery import Nursery
from real_servers import PostgresProcess, RedisProcess, folder_in_memory


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Knows the coordinator and the participants; no torch."""
    with Nursery("fedmkt_coordinator.command", "fedmkt_coordinator.app", "participants") as opened:
        yield opened


@pytest.fixture(scope="session")
def chaos_redis() -> Iterator[RedisProcess]:
    with folder_in_memory() as folder:
        server = RedisProcess(folder)
        server.start()
        yield server
        server.stop()


@pytest.fixture(scope="session")
def chaos_postgres() -> Iterator[PostgresProcess]:
    """A server to kill; whoever does starts it again."""
    with folder_in_memory() as folder:
        server = PostgresProcess(folder)
        server.start()
        yield server
        server.kill()


@pytest.fixture(scope="session")
def templates(nursery: Nursery, chaos_redis: RedisProcess, request: pytest.FixtureRequest) -> Iterator[Templates]:
    with folder_in_memory() as folder:
        yield Templates(folder, nursery, chaos_redis, request)


@pytest.fixture
def opened(templates: Templates, chaos_redis: RedisProcess) -> Iterator[Callable[[Federation], Federation]]:
    """Takes charge of a federation: its processes end with the test, and its files go."""
    chaos_redis.flush()
    with ExitStack() as stack:

        def take(federation: Federation) -> Federation:
            stack.enter_context(federation)
            return federation

        yield take


# ------------------------------------------------------------------------------------------------ the report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """With FEDMKT_CHAOS_REPORT (`make chaos`): a table of all cases, and the same as JSON in that file."""
    path = os.environ.get("FEDMKT_CHAOS_REPORT")
    if not path:
        return
    ended = [
        (outcome, report)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call" or outcome != "passed"
    ]
    cases = [
        {
            "case": report.nodeid.rpartition("::")[2].removeprefix("test_"),
            "outcome": outcome,
            "seconds": round(report.duration, 1),
            **dict(report.user_properties),
        }
        for outcome, report in ended
    ]
    count = {outcome: sum(each["outcome"] == outcome for each in cases) for outcome in ("passed", "failed", "error")}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"cases": len(cases), **count, "results": cases}, indent=1) + "\n")
    terminalreporter.section("chaos")
    for each in cases:
        more = "  ".join(f"{key} {value}" for key, value in each.items() if key not in ("case", "outcome", "seconds"))
        terminalreporter.write_line(f"{each['outcome']:8} {each['seconds']:6.1f} s  {each['case']}  {more}".rstrip())
    terminalreporter.write_line(f"{len(cases)} cases: {count['passed']} passed, {count['failed'] + count['error']} not")
