"""Fault points: a process dies where it was told to, loudly announced, and nobody else can arm one."""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from fedmkt import fault_points
from fedmkt.fault_points import VARIABLE, FaultPointRefused

PROGRAM = """
import os
from fedmkt import fault_points
fault_points.arm(os.environ)
for number in range(5):
    print(number, flush=True)
    fault_points.reach("elsewhere")
    fault_points.reach("half way there")
print("through")
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    fault_points.arm({})


def run(fault: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={VARIABLE: fault}, capture_output=True, text=True, check=False
    )


def test_a_process_kills_itself_the_nth_time_it_gets_there() -> None:
    done = run("kill half way there 3")
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["0", "1", "2"])


@pytest.mark.parametrize("fault", ["", "kill half way there 6", "kill half way 1"])
def test_a_point_that_is_not_reached_changes_nothing(fault: str) -> None:
    done = run(fault)
    assert (done.returncode, done.stdout.split()[-1]) == (0, "through")


def test_arming_is_said_loudly(caplog: pytest.LogCaptureFixture) -> None:
    fault_points.arm({VARIABLE: "kill some point 2"}, listens_at="127.0.0.1")
    assert fault_points.is_armed()
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.CRITICAL, "fault_point.armed")
    assert (vars(record)["point"], vars(record)["time"]) == ("some point", 2)
    fault_points.arm({})
    assert not fault_points.is_armed()


@pytest.mark.parametrize("fault", ["kill", "kill point", "kill point 0", "kill point first", "hurt point 1", "kill  1"])
def test_what_does_not_read_ends_the_start(fault: str) -> None:
    with pytest.raises(FaultPointRefused, match="unset it"):
        fault_points.arm({VARIABLE: fault})
    assert not fault_points.is_armed()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "coordinator.example.org"])
def test_a_service_that_others_reach_runs_with_no_fault_point(host: str) -> None:
    with pytest.raises(FaultPointRefused, match="it is for tests"):
        fault_points.arm({VARIABLE: "kill some point 1"}, listens_at=host)
    fault_points.arm({}, listens_at=host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_service_on_loopback_may_have_one(host: str) -> None:
    fault_points.arm({VARIABLE: "stop some point 1"}, listens_at=host)
    assert fault_points.is_armed()
