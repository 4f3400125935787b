"""`fedmkt demo` with real processes: it finishes whatever is killed, ends all it started, and tells what happened."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fedmkt.demo.run import DemoInUse, _folder
from live_coordinator import stories
from tiny_models import save_tiny

SITES = {"north": "gpt_neox", "south": "bloom"}
PATIENCE_S = 240


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name tiny models and texts for everything."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "public.jsonl").write_bytes(stories(0, 20, domain="first") + stories(20, 20, domain="second"))
    options = ["--llm", str(save_tiny(folder / "llm", "llama")), "--public", str(folder / "public.jsonl")]
    for at, (site, architecture) in enumerate(SITES.items()):
        (folder / f"{site}.jsonl").write_bytes(stories(100 * (at + 1), 40))
        options += ["--slm", f"{site}={save_tiny(folder / site, architecture, seed=at)}"]
        options += ["--private", f"{site}={folder / f'{site}.jsonl'}"]
    return options


class Running:
    """A demo in a process of its own."""

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.out = folder / "out"
        command = [sys.executable, "-m", "fedmkt.cli", "demo", "--out", str(self.out), "--cache", str(folder / "cache")]
        self._log = folder / "demo.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *options], stdout=log, stderr=subprocess.STDOUT, env=environment()
            )
        self.seen: dict[int, psutil.Process] = {}

    def family(self) -> list[psutil.Process]:
        """All processes below the demo, remembered for the end."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.seen |= {each.pid: each for each in found}
        return found

    def child(self, module: str) -> psutil.Process:
        return next(each for each in self.family() if module in " ".join(each.cmdline()))

    def log(self) -> str:
        return self._log.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def left_over(self) -> list[psutil.Process]:
        _, alive = psutil.wait_procs(list(self.seen.values()), timeout=10)
        return alive


def environment() -> dict[str, str]:
    """Settings of another installation, which the demo must not obey."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "FEDMKT_DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}


@contextmanager
def demo(folder: Path, options: list[str]) -> Iterator[Running]:
    running = Running(folder, options)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


@pytest.mark.e2e
@pytest.mark.timeout(PATIENCE_S + 60)
def test_the_demo_finishes_although_the_coordinator_is_killed(files: list[str], tmp_path: Path) -> None:
    with demo(tmp_path, ["--rounds", "2", *files]) as running:
        running.until(lambda: "waiting for " in running.log())
        running.child("fedmkt_coordinator").kill()
        running.until(lambda: "coordinator ended with signal SIGKILL and was started again" in running.log())
        running.family()
        assert running.process.wait(timeout=PATIENCE_S) == 0, running.log()
        assert not running.left_over()
    report = json.loads((running.out / "report.json").read_text())
    assert [each["state"] for each in report["rounds"]] == ["completed", "completed"]
    assert [party["name"] for party in report["parties"]] == ["llm", "north", "south"]
    assert set(report["parties"][1]["after"]) == {"all", "first", "second"}
    assert {arm: len(parties) for arm, parties in report["controls"].items()} == {
        "public_only": 3,
        "self_distillation": 3,
    }
    assert report["restarts"] == {"coordinator": 1}
    assert all(each["up"] > 0 and each["down"] > 0 for each in report["traffic"].values())
    assert "who taught whom" in running.log()


@pytest.mark.e2e
@pytest.mark.timeout(PATIENCE_S)
def test_ctrl_c_ends_every_process(files: list[str], tmp_path: Path) -> None:
    with demo(tmp_path, files) as running:
        running.until(lambda: len([each for each in running.family() if "fedmkt_" in " ".join(each.cmdline())]) == 4)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(timeout=60) == 130
        assert not running.left_over()
    assert "every process of the demo has ended" in running.log()
    assert not (running.out / "report.json").exists()


@pytest.mark.e2e
@pytest.mark.timeout(PATIENCE_S)
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a parent-death signal")
def test_a_killed_demo_leaves_nothing_behind(files: list[str], tmp_path: Path) -> None:
    with demo(tmp_path, files) as running:
        running.until(lambda: len([each for each in running.family() if "fedmkt_" in " ".join(each.cmdline())]) == 4)
        running.process.kill()
        assert not running.left_over()


def test_what_an_earlier_run_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_text("old")
    (tmp_path / "report.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with _folder(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "notes.txt"]


def test_two_demos_in_one_folder_are_refused(tmp_path: Path) -> None:
    with _folder(tmp_path), pytest.raises(DemoInUse, match="choose another folder with --out"), _folder(tmp_path):
        pass
