"""The two programs as processes: what they say about wrong settings, and how they end on a signal."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from live_coordinator import stories
from tiny_models import save_tiny

pytestmark = pytest.mark.timeout(120)


def command(module: str, *options: str) -> list[str]:
    return [sys.executable, "-m", module, *options]


@pytest.mark.parametrize(
    ("module", "missing"),
    [("fedmkt_client_agent", "coordinator_url"), ("fedmkt_llm_server", "coordinator_url")],
)
def test_missing_settings_are_named_with_their_variables(module: str, missing: str) -> None:
    done = subprocess.run(
        command(module), capture_output=True, text=True, timeout=100, check=False, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 2
    assert f"{missing}: Field required (option, or FEDMKT_{missing.upper()})" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_agent_whose_coordinator_is_away_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "private.jsonl").write_bytes(stories(0, 20))
    (tmp_path / "token").write_text("one-time")
    options = {
        "coordinator": "http://127.0.0.1:1",
        "enrolment-token-file": str(tmp_path / "token"),
        "model": str(tmp_path / "model"),
        "private": str(tmp_path / "private.jsonl"),
        "state-dir": str(tmp_path / "agent"),
        "status-port": "0",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(command("fedmkt_client_agent", *arguments), stderr=file)
    try:
        deadline = time.monotonic() + 90
        while "coordinator.not_answering" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert json.loads((tmp_path / "agent" / "status.json").read_text())["host"] == "127.0.0.1"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=25) == 0
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["service"] for line in lines} == {"agent"}, "every line is JSON, transformers' too"
    assert "status.listening" in [line["event"] for line in lines]
    assert not (tmp_path / "agent" / "status.json").exists()
