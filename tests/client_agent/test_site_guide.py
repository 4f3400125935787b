"""docs/site-guide.md, played: its commands by bash against a live coordinator, its policy and its table of states."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from agent_world import PUBLIC, World
from fedmkt.outbox import Outbox
from fedmkt.protocol import Schedule
from fedmkt_client_agent.ledger import FILE_NAME, read_ledger
from fedmkt_client_agent.policy import Policy
from fedmkt_client_agent.states import State
from live_coordinator import stories, tiny_config, until
from tiny_models import save_tiny

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "site-guide.md").read_text(encoding="utf-8")
SCHEDULE = Schedule(quorum=1, collect_timeout_s=900, distill_timeout_s=60, apply_timeout_s=900)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_guides_policy_names_every_line_that_a_policy_can_have() -> None:
    (text,) = blocks("toml")
    assert set(Policy.model_validate(tomllib.loads(text)).model_fields_set) == set(Policy.model_fields)


def test_the_guides_table_names_every_state_that_an_agent_shows() -> None:
    table = PAGE.split("## What it shows")[1]
    named = {
        name for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    assert named == set(get_args(State)) - {"starting", "stopped"}


@pytest.mark.services
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_the_guides_commands_do_what_it_says(world: World, tmp_path: Path) -> None:
    federation_id = world.begin(tiny_config(("north",), name="guide", schedule=SCHEDULE))
    save_tiny(tmp_path / "model", "qwen2")
    (tmp_path / "notes.jsonl").write_bytes(stories(100, 30))
    (tmp_path / "public.jsonl").write_bytes(PUBLIC)
    (tmp_path / "token").write_text(world.coordinator.enrolment_token(federation_id, "north"))
    (tmp_path / "policy.toml").write_text(blocks("toml")[0])
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "COORDINATOR": world.coordinator.url, "COLUMNS": "200"}
    check, start, consent, ledger = blocks("sh")

    def played(block: str) -> str:
        command = ["bash", "-euo", "pipefail", "-c", block]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "30 samples" in played(check)
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(["bash", "-c", f"exec {start.strip()}"], cwd=tmp_path, env=environment, stderr=log)
    try:
        world.until_ready(federation_id, "north", timeout_s=240)
        world.request(federation_id)

        def waits() -> bool:
            about = Outbox(tmp_path / "agent").about()
            return about is not None and "knowledge" in about.items

        until(waits, 240)
        said = played(consent)
        assert "not approved" in said
        assert "round 1 approved" in said
        world.coordinator.wait_for_rounds(federation_id, 1, timeout_s=240)
        kinds = {entry.kind for entry in read_ledger(tmp_path / "agent" / FILE_NAME)}
        assert kinds == {"enrolment", "vocabulary", "model", "knowledge", "report", "artifact"}
        shown = played(ledger)
        assert all(kind in shown for kind in kinds)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(60) == 0, (tmp_path / "log").read_text()
    finally:
        agent.kill()
        agent.wait()
