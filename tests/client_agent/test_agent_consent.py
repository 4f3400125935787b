"""Whole rounds with a site whose own policy holds something back: it wins, it is shown, and the round goes on."""

import hashlib
import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send
from typer.testing import CliRunner

from agent_world import Pages, World
from fedmkt.cli import app
from fedmkt.knowledge import decode
from fedmkt.protocol import RoundView, Schedule
from fedmkt.service import locked
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.agent import Agent
from fedmkt_client_agent.ledger import FILE_NAME, read_ledger
from fedmkt_client_agent.main import prepare
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import AgentStore
from live_coordinator import Background, tiny_config, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(600)]
PATIENT = Schedule(quorum=1, collect_timeout_s=600, distill_timeout_s=60, apply_timeout_s=600)
IN_A_HURRY = Schedule(quorum=1, collect_timeout_s=20, distill_timeout_s=60, apply_timeout_s=20)


def cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def site_settings(world: World, federation_id: str, policy: str, site: str = "north", **changes: Any) -> Settings:
    file = world.folder / f"{federation_id}-{site}.toml"
    file.write_text(policy)
    return world.settings(federation_id, site, policy_file=file, status_port=0, **changes)


def set_policy(settings: Settings, policy: str) -> None:
    assert settings.policy_file is not None
    settings.policy_file.write_text(policy)


def one_round(world: World, federation_id: str) -> RoundView:
    (finished,) = world.coordinator.wait_for_rounds(federation_id, 1, timeout_s=300)
    return finished


def window(begins: timedelta, ends: timedelta) -> str:
    """Hours around now."""
    now = datetime.now(UTC)
    return f'hours = "{now + begins:%H:%M}-{now + ends:%H:%M}"\ntime_zone = "UTC"'


def test_a_round_waits_until_a_person_has_seen_and_approved_it(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="approval", schedule=PATIENT))
    settings = site_settings(world, federation_id, "require_approval = true")
    state_dir = str(settings.state_dir)
    agent = world.start(settings, federation_id, "north")
    with Pages(settings) as pages:
        world.request(federation_id)
        until(lambda: pages.status()["state"] == "awaiting_approval", 120)
        assert "fedmkt agent approve" in pages.status()["to_do"]
        entries = list(read_ledger(settings.state_dir / FILE_NAME))
        assert {entry.kind for entry in entries if entry.direction == "up"} == {"enrolment", "vocabulary", "model"}

        shown = json.loads(cli("knowledge", "inspect", "--pending", "--state-dir", state_dir, "--json"))
        blob = (settings.state_dir / "outbox" / "knowledge").read_bytes()
        assert shown["approved"] is False
        assert shown["files"]["knowledge"]["digest"] == hashlib.sha256(blob).hexdigest()
        assert shown["knowledge"]["samples"] == 16
        first = shown["knowledge"]["shown"][0]
        assert first["sample_id"].startswith("s")
        assert len(first["shown"][0]["guesses"]) == 5
        said = cli("knowledge", "inspect", "--pending", "--state-dir", state_dir)
        assert "not approved" in said
        assert "not in it:\n  - private text" in said

        assert "round 1 approved" in cli("agent", "approve", "--round", "1", "--state-dir", state_dir)
        finished = one_round(world, federation_id)
    assert agent.end() is None
    assert finished.sites[0].state == "applied"
    entries = list(read_ledger(settings.state_dir / FILE_NAME))
    sent = next(entry for entry in entries if entry.kind == "knowledge" and entry.event == "done")
    assert sent.digest == shown["files"]["knowledge"]["digest"], "what was looked at is what was sent"
    assert sent.approved_at is not None
    assert sent.receipt_id is not None
    assert [entry.event for entry in entries if entry.kind == "report"] == ["begun", "done"]


def test_outside_the_hours_a_site_waits_and_goes_on_when_the_policy_opens(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="hours", schedule=PATIENT))
    closed = window(timedelta(hours=2), timedelta(hours=3))
    settings = site_settings(world, federation_id, closed)
    agent = world.start(settings, federation_id, "north")
    with Pages(settings) as pages:
        until(lambda: pages.status()["state"] == "outside_hours", 120)
        assert "works and sends" in pages.status()["reason"]
        world.request(federation_id)
        set_policy(settings, "max_rounds = nonsense")
        until(lambda: pages.status()["state"] == "policy_unreadable", 120)
        set_policy(settings, window(timedelta(hours=-1), timedelta(hours=1)))
        finished = one_round(world, federation_id)
    assert finished.sites[0].state == "applied"
    assert agent.end() is None


class EveningClock:
    """Noon, until a training is in the middle of its second step; then evening, until it is set to the morning."""

    def __init__(self, status: Status) -> None:
        self._status, self._asked = status, 0
        self.evening_is_over = False

    def __call__(self) -> datetime:
        view = self._status.view
        if self._asked or (view.step, view.done) == ("training on private text", 1):
            self._asked += 1  # the first time still belongs to the first step
        evening = self._asked > 1 and not self.evening_is_over
        return datetime(2026, 1, 15, 18 if evening else 12, tzinfo=UTC)


def test_a_training_that_the_hours_interrupt_goes_on_from_its_checkpoint(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation_id = world.begin(tiny_config(("north",), name="evening", schedule=PATIENT))
    settings = site_settings(world, federation_id, 'hours = "08:00-17:00"\ntime_zone = "UTC"')
    status = Status()
    clock = EveningClock(status)

    def run(settings: Settings, stop: StopFlag) -> None:
        store = AgentStore(settings.state_dir)
        with ExitStack() as stack:
            stack.enter_context(locked(store.folder))
            site = prepare(stack, settings, store, status, stop)
            site.consent = replace(site.consent, clock=clock)
            Agent(site, settings.poll_s).run()

    agent = Background(run, settings)
    world.until_ready(federation_id, "north")
    world.request(federation_id)
    until(lambda: status.view.state == "outside_hours", 120)
    assert (settings.state_dir / "checkpoint.safetensors").exists()
    clock.evening_is_over = True
    finished = one_round(world, federation_id)
    assert agent.end() is None
    assert finished.sites[0].state == "applied"
    events = [record.message for record in caplog.records]
    assert events.count("checkpoint.resumed") == 1
    assert events.count("private.trained") == 1


def test_a_site_whose_rounds_are_used_up_takes_no_part_and_the_others_go_on(world: World) -> None:
    federation_id = world.begin(tiny_config(("north", "south"), name="budget", schedule=IN_A_HURRY))
    settings = site_settings(world, federation_id, "max_rounds = 0")
    agents = [
        world.start(settings, federation_id, "north"),
        world.start(world.settings(federation_id, "south"), federation_id, "south"),
    ]
    with Pages(settings) as pages:
        until(lambda: pages.status()["state"] == "over_budget", 120)
        world.request(federation_id)
        assert "taken part in 0 rounds, max_rounds is 0" in pages.status()["reason"]
        finished = one_round(world, federation_id)
        assert pages.status()["state"] == "over_budget"
    assert [agent.end() for agent in agents] == [None, None]
    assert finished.state == "completed"
    assert {site.site: site.state for site in finished.sites} == {"north": "missed", "south": "applied"}
    sent = {entry.kind for entry in read_ledger(settings.state_dir / FILE_NAME) if entry.direction == "up"}
    assert sent == {"enrolment", "vocabulary", "model"}


def test_the_sites_smaller_k_coarser_scale_and_silence_about_itself_win_over_the_configuration(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="modest"))
    settings = site_settings(
        world, federation_id, "max_top_k = 3\nround_logprobs_nats = 0.25\nsend_local_metrics = false"
    )
    agent = world.start(settings, federation_id, "north")
    world.request(federation_id)
    finished = one_round(world, federation_id)
    assert agent.end() is None
    assert finished.llm_result is not None
    assert finished.llm_result.refused_sites == {}
    assert finished.llm_result.selection.refused.get("north", 0) == 0, "every sample stands a receiver's checks"
    assert finished.llm_result.selection.offered == {"north": 16}
    sent = decode((settings.state_dir / "outbox" / "knowledge").read_bytes())
    assert sent.header.top_k == 3
    report = finished.sites[0].report
    assert report is not None
    assert report.gate.before_bits_per_byte is None
    assert all(training.last_loss_nats is None for training in report.training)
    with world.coordinator.client() as operator:
        assert operator.federation(federation_id).sites[0].private_samples is None


class LedgerFirst:
    """ASGI middleware: at the moment a body is announced or arrives, does the site's ledger name it?"""

    def __init__(self, app: ASGIApp, ledger: Path, seen: list[tuple[str, bool]]) -> None:
        self._app, self._ledger, self._seen = app, ledger, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = str(scope.get("path")), str(scope.get("method"))
        if method == "GET" or path in ("/v1/token",) or not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def hear() -> Any:
            message = await receive()
            body.extend(message.get("body", b""))
            if message["type"] == "http.request" and not message.get("more_body", False):
                self._seen.append((f"{method} {path}", self._named(path, bytes(body))))
            return message

        await self._app(scope, hear, send)

    def _named(self, path: str, body: bytes) -> bool:
        digests = {entry.digest for entry in read_ledger(self._ledger)}
        if path == "/v1/uploads":
            return json.loads(body)["digest"] in digests
        if path.startswith("/v1/uploads/"):  # chunks of what was announced
            return any(entry.kind == "knowledge" for entry in read_ledger(self._ledger))
        return hashlib.sha256(body).hexdigest() in digests


def test_every_body_that_reaches_the_coordinator_stands_in_the_ledger_before_it_arrives(world: World) -> None:
    seen: list[tuple[str, bool]] = []
    ledger = world.folder / "watched" / FILE_NAME
    usual = world.coordinator.middleware
    federation_id = world.begin(tiny_config(("north",), name="ledger"))
    settings = world.settings(federation_id, "north", state_dir=ledger.parent)
    world.coordinator.stop()
    world.coordinator.middleware = lambda app: app.add_middleware(LedgerFirst, ledger=ledger, seen=seen)
    world.coordinator.start()
    try:
        agent = world.start(settings, federation_id, "north")
        world.request(federation_id)
        one_round(world, federation_id)
        assert agent.end() is None
    finally:
        world.coordinator.stop()
        world.coordinator.middleware = usual
        world.coordinator.start()
    from_site = [each for each in seen if not each[0].split("/v1/")[1].startswith(("federations", "jobs", "artifacts"))]
    kinds = {path.rsplit("/", 1)[-1] for path, _ in from_site}
    assert {"enrol", "vocabulary", "model", "uploads", "0", "report"} <= kinds, "0: the upload's only chunk"
    assert [path for path, named in from_site if not named] == []
