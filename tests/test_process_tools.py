"""What every service uses: JSON logs, the stop flag, the small local server."""

import io
import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from fedmkt.errors import Refusal
from fedmkt.local_server import LocalServerFailed, serve_in_thread
from fedmkt.logs import configure_logs
from fedmkt.service import StateInUse, locked, run_service, status_pages
from fedmkt.stopping import StopFlag, Stopped

# -------------------------------------------------------------------------------------------------------------- logs


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
def test_a_line_is_one_json_object_with_its_fields() -> None:
    stream = io.StringIO()
    configure_logs("agent", stream=stream)
    logging.getLogger("some.module").info("upload.accepted", extra={"round_id": "round_1", "size_bytes": 7})
    line = json.loads(stream.getvalue())
    assert line.pop("at").endswith("+00:00")
    assert line == {
        "level": "info",
        "service": "agent",
        "logger": "some.module",
        "event": "upload.accepted",
        "round_id": "round_1",
        "size_bytes": 7,
    }


@pytest.mark.usefixtures("root_logger")
def test_a_traceback_stays_on_the_line() -> None:
    stream = io.StringIO()
    configure_logs("agent", stream=stream)
    try:
        raise ValueError("7 is not 8")
    except ValueError:
        logging.getLogger("x").exception("task.failed", extra={"path": object})
    (written,) = stream.getvalue().splitlines()
    line = json.loads(written)
    assert line["traceback"].endswith("ValueError: 7 is not 8")
    assert line["path"] == "<class 'object'>"


@pytest.mark.usefixtures("root_logger")
def test_text_style_is_for_eyes() -> None:
    stream = io.StringIO()
    configure_logs("agent", style="text", level="warning", stream=stream)
    logging.getLogger("x").info("not.shown")
    logging.getLogger("x").warning("disk.full", extra={"free_bytes": 3})
    assert stream.getvalue()[8:] == " warning disk.full free_bytes=3\n"


@pytest.mark.usefixtures("root_logger")
def test_configuring_twice_does_not_write_twice() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logs("agent", stream=first)
    configure_logs("agent", stream=second)
    logging.getLogger("x").info("once")
    assert (first.getvalue(), second.getvalue().count("once")) == ("", 1)


# --------------------------------------------------------------------------------------------------------- stop flag


@pytest.fixture
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_set_flag_ends_waits_and_checks() -> None:
    stop = StopFlag()
    stop.check()
    stop.wait(0)
    assert not stop.pause(0)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        stop.wait(30)
    assert time.monotonic() - began < 10
    assert stop.pause(30)
    with pytest.raises(Stopped):
        stop.check()


@pytest.mark.usefixtures("signals")
def test_a_signal_sets_the_flag_and_lets_a_step_finish() -> None:
    stop = StopFlag()
    stop.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
    assert stop.is_set


@pytest.mark.usefixtures("signals")
def test_a_signal_breaks_off_what_may_be_broken_off() -> None:
    stop = StopFlag()
    stop.listen()
    silent = socket.create_server(("127.0.0.1", 0))
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with silent, pytest.raises(Stopped), stop.interruptible():
        httpx.get(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=30)
    assert time.monotonic() - began < 10
    with pytest.raises(Stopped), stop.interruptible():
        raise AssertionError("a flag that is set lets nothing begin")


# ------------------------------------------------------------------------------------------------------ local server


def test_a_local_server_chooses_a_port_and_is_gone_after_the_block() -> None:
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "here"

    with serve_in_thread(app) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/").json() == "here"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/")


def test_a_taken_port_is_an_error() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match="in use"),
        serve_in_thread(FastAPI(), port=taken.getsockname()[1]),
    ):
        raise AssertionError("never reached")


def test_an_application_that_does_not_start_is_an_error() -> None:
    async def broken(scope: object, receive: object, send: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(LocalServerFailed), serve_in_thread(broken):
        raise AssertionError("never reached")


# ----------------------------------------------------------------------------------------------------------- service


class Hopeless(Refusal):
    code = "test.hopeless"


@pytest.mark.usefixtures("root_logger", "signals")
def test_a_service_that_is_stopped_has_done_well_and_one_that_cannot_go_on_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(stop: StopFlag) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.wait(30)

    def hopeless(stop: StopFlag) -> None:
        raise Hopeless("3 is not 4, give 4")

    assert run_service("tester", stopped, log_level="INFO", log_style="json") == 0
    assert run_service("tester", hopeless, log_level="INFO", log_style="json") == 1
    line = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (line["event"], line["code"], line["reason"]) == (
        "service.cannot_go_on",
        "test.hopeless",
        "3 is not 4, give 4",
    )


def test_status_pages_leave_their_address_for_as_long_as_they_listen(tmp_path: Path) -> None:
    file = tmp_path / "new" / "status.json"
    with status_pages(FastAPI(), "127.0.0.1", 0, file):
        address = json.loads(file.read_text())
        assert httpx.get(f"http://{address['host']}:{address['port']}/").status_code == 404
    assert not file.exists()
    with status_pages(FastAPI(), "127.0.0.1", None, file):
        assert not file.exists()


def _hold(folder: Path, done: "Event", held: "Event") -> None:
    with locked(folder):
        held.set()
        done.wait(30)


def test_two_processes_cannot_share_a_state_folder(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    done, held = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(tmp_path / "agent", done, held))
    other.start()
    assert held.wait(30)
    with pytest.raises(StateInUse, match="another process works in agent"), locked(tmp_path / "agent"):
        raise AssertionError("never reached")
    done.set()
    other.join()
    with locked(tmp_path / "agent"):
        assert (tmp_path / "agent").stat().st_mode & 0o077 == 0
