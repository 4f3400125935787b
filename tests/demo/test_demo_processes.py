"""Services of the demo: started again when they die, given up when that does not help, ended with the demo."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedmkt.demo import processes
from fedmkt.demo.processes import Household, Service, ServiceFailed

SLEEP = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(100)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(100)",
]


def service(folder: Path, command: list[str], name: str = "worker") -> Service:
    return Service(name, command, os.environ, folder / f"{name}.log")


def wait_until_up(one: Service) -> None:
    deadline = time.monotonic() + 20
    while "up" not in one.last_lines():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def check_for_ever(household: Household) -> None:
    while True:
        household.check()
        time.sleep(0.01)


def test_a_killed_service_is_started_again_and_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    with Household(said.append) as household:
        one = household.start(service(tmp_path, SLEEP))
        wait_until_up(one)
        first = one.pid
        assert first is not None
        household.check()
        assert said == []
        os.kill(first, signal.SIGKILL)
        while one.exit_status is None:
            time.sleep(0.01)
        household.check()
        assert said == ["worker ended with signal SIGKILL and was started again"]
        assert one.restarts == 1
        assert one.pid != first
        assert one.exit_status is None
    assert one.exit_status is not None


def test_a_service_that_ends_at_once_is_given_up_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "RESTART_PAUSE_S", 0.0)
    one = service(tmp_path, [sys.executable, "-c", "raise SystemExit('no such model')"])
    with Household(lambda line: None) as household:
        household.start(one)
        with pytest.raises(ServiceFailed) as refused:
            check_for_ever(household)
    assert "worker ended 4 times within 30 s of its start, last with exit status 1" in refused.value.detail
    assert "no such model" in refused.value.detail


def test_a_service_that_ignores_the_request_is_killed_after_the_grace(tmp_path: Path) -> None:
    with Household(lambda line: None, grace_s=0.3) as household:
        deaf, willing = (
            household.start(service(tmp_path, each, name)) for each, name in ((STUBBORN, "a"), (SLEEP, "b"))
        )
        wait_until_up(deaf)
        wait_until_up(willing)
    assert (deaf.exit_status, willing.exit_status) == (-signal.SIGKILL, -signal.SIGTERM)


def test_the_first_service_ends_last(tmp_path: Path) -> None:
    """The others talk to it while they end."""
    goodbye = "import os,signal,sys,time\nsignal.signal(signal.SIGTERM, lambda *_: (print(time.time()), sys.exit()))\n"
    # One write: `print` makes two, and the request to end may come between a word and its newline.
    command = [sys.executable, "-c", goodbye + "os.write(1, b'up\\n')\ntime.sleep(100)"]
    with Household(lambda line: None) as household:
        first, second = (household.start(service(tmp_path, command, name)) for name in ("first", "second"))
        wait_until_up(first)
        wait_until_up(second)
    ended = [float(each.log.read_text().splitlines()[-1]) for each in (first, second)]
    assert ended[0] > ended[1]


def test_what_a_service_started_ends_with_it(tmp_path: Path) -> None:
    nested = f"import subprocess,sys,time\nsubprocess.Popen({SLEEP!r})\nprint('up', flush=True)\ntime.sleep(100)"
    with Household(lambda line: None) as household:
        one = household.start(service(tmp_path, [sys.executable, "-c", nested]))
        wait_until_up(one)
        assert one.pid is not None
        family = psutil.Process(one.pid).children(recursive=True)
        assert family
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_a_service_ends_when_the_demo_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from fedmkt.demo.processes import Service\n"
        f"one = Service('a', {SLEEP!r}, os.environ, Path({str(tmp_path / 'log')!r})); one.start()\n"
        "print(one.pid, flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as demo:
        assert demo.stdout is not None
        child = psutil.Process(int(demo.stdout.readline()))
        demo.kill()
    child.wait(timeout=10)
    assert not child.is_running()
