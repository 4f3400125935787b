"""Heavy functions in processes of their own: results, progress, failures, and an end when nobody waits any more."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest

from fedmkt.demo.workers import Call, Progress, run_calls


def count(progress: Progress, upto: int) -> tuple[int, int]:
    for number in range(upto):
        progress(number + 1, upto)
    return upto, os.getpid()


def fail(progress: Progress, message: str) -> None:
    raise ValueError(message)


def go_on(progress: Progress) -> None:
    while True:
        progress(1, 2)
        time.sleep(0.01)


def die(progress: Progress) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_results_come_by_name_and_progress_on_the_way() -> None:
    seen: list[tuple[str, int, int]] = []
    calls = {"a": Call(count, {"upto": 3}), "b": Call(count, {"upto": 2})}
    found = run_calls(calls, workers=2, on_progress=lambda *step: seen.append(step))
    assert {name: upto for name, (upto, _) in found.items()} == {"a": 3, "b": 2}
    assert os.getpid() not in {pid for _, pid in found.values()}
    assert [step for step in seen if step[0] == "a"] == [("a", 1, 3), ("a", 2, 3), ("a", 3, 3)]


def test_a_failure_is_raised_and_ends_the_others() -> None:
    calls = {"endless": Call(go_on), "broken": Call(fail, {"message": "7 is not 8"})}
    with pytest.raises(ValueError, match="7 is not 8"):
        run_calls(calls, workers=2, on_progress=lambda *step: None)


def test_a_worker_that_is_killed_is_an_error_not_a_wait() -> None:
    with pytest.raises(BrokenProcessPool):
        run_calls({"dead": Call(die)}, workers=1, on_progress=lambda *step: None)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "from test_demo_workers import go_on; from fedmkt.demo.workers import Call, run_calls\n"
        "if __name__ == '__main__':\n"
        "    run_calls({'a': Call(go_on)}, workers=1, on_progress=lambda *step: print('on', flush=True))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"on\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    workers = [child for child in children if child.is_running()]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
