"""Agents and what goes wrong: deadlines missed, a coordinator that restarts, a site that is revoked, tokens."""

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent_world import Pages, World
from fedmkt.protocol import PROTOCOL_VERSION, Schedule
from fedmkt.stopping import StopFlag, Stopped
from fedmkt_client_agent.enrolment import NotEnrolled, OtherCoordinator
from fedmkt_client_agent.main import serve as serve_agent
from fedmkt_client_agent.store import AgentStore
from fedmkt_coordinator import handshake
from live_coordinator import Background, tiny_config, until

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]


def test_a_site_that_missed_the_upload_still_learns(world: World) -> None:
    schedule = Schedule(quorum=1, collect_timeout_s=4, distill_timeout_s=60, apply_timeout_s=60)
    federation_id = world.begin(tiny_config(("north", "south"), name="missed", schedule=schedule))
    south = world.start(world.settings(federation_id, "south"), federation_id, "south")
    assert south.end() is None
    north = world.start(world.settings(federation_id, "north"), federation_id, "north")
    world.request(federation_id)
    with world.coordinator.client() as operator:
        until(
            lambda: (now := operator.federation(federation_id).current_round) is not None and now.state != "collecting"
        )
    south = world.start(world.again(federation_id, "south"), federation_id, "south")
    (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
    assert [north.end(), south.end()] == [None, None]
    by_name = {site.site: site for site in finished.sites}
    assert finished.state == "completed"
    assert by_name["south"].uploaded_at is None
    report = by_name["south"].report
    assert report is not None
    assert sum(report.selection.taught.values()) == 16
    assert "own_knowledge" in report.phase_seconds
    assert "private_training" not in report.phase_seconds


def test_a_round_survives_a_restart_of_the_coordinator(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="restart"))
    agent = world.start(world.settings(federation_id, "north"), federation_id, "north")
    world.request(federation_id)
    with world.coordinator.client() as operator:
        until(lambda: operator.federation(federation_id).current_round is not None)
    world.coordinator.stop()
    time.sleep(0.5)
    world.coordinator.start()
    (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
    assert finished.state == "completed"
    assert agent.alive
    assert agent.end() is None


def test_a_revoked_site_says_so_stays_and_joins_again_with_a_new_token(world: World, tmp_path: Path) -> None:
    federation_id = world.begin(tiny_config(("north",), name="revoked"))
    token = tmp_path / "token"
    token.write_text(world.coordinator.enrolment_token(federation_id, "north"))
    settings = world.again(federation_id, "north", enrolment_token_file=token, status_port=0)
    agent = world.start(settings, federation_id, "north")
    with world.coordinator.client() as operator, Pages(settings) as pages:
        operator.revoke_site(federation_id, "north")
        until(lambda: pages.status()["state"] == "revoked", 120)
        shown = pages.status()
        assert shown["reason"].startswith("site.revoked: site north was revoked at")
        assert "new enrolment token" in shown["to_do"]
        token.write_text(world.coordinator.enrolment_token(federation_id, "north"))
        until(lambda: pages.status()["state"] == "waiting", 120)
        world.request(federation_id)
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
    assert finished.sites[0].state == "applied"
    assert agent.end() is None
    state = AgentStore(settings.state_dir).load()
    assert state.key.startswith("key-")
    assert [path.name for path in settings.state_dir.glob("*.pem")] == [state.key], "the old key is gone"


@pytest.mark.parametrize("ahead_s", [50.0, -50.0])
def test_a_round_goes_well_between_clocks_that_differ_within_the_bound(world: World, ahead_s: float) -> None:
    world.coordinator.clock_ahead_s = ahead_s
    try:
        federation_id = world.begin(tiny_config(("north",), name=f"ahead{ahead_s:+.0f}".replace("+", "-by-")))
        agent = world.start(world.settings(federation_id, "north"), federation_id, "north")
        world.request(federation_id)
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
        assert finished.state == "completed"
        assert finished.sites[0].state == "applied"
        assert agent.end() is None
    finally:
        world.coordinator.clock_ahead_s = 0.0


def test_an_agent_whose_clock_is_too_wrong_says_by_how_much_and_goes_on_when_it_is_set(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="skewed"))
    settings = world.settings(federation_id, "north", status_port=0)
    agent = world.start(settings, federation_id, "north")
    world.coordinator.clock_ahead_s = 5000.0
    with Pages(settings) as pages:
        try:
            until(lambda: pages.status()["state"] == "clock_wrong", 120)
            reason = pages.status()["reason"]
            assert re.match(r"assertion\.clock: .* made (499\d|500\d) s behind the coordinator's clock", reason)
            assert "at most 60 s are tolerated: set the site's clock (NTP)" in reason
        finally:
            world.coordinator.clock_ahead_s = 0.0
        world.request(federation_id)
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
    assert finished.state == "completed"
    assert agent.end() is None


# --------------------------------------------------------------------------------------------------------- enrolment


def test_a_new_site_without_a_token_cannot_begin(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="tokenless"))
    with pytest.raises(NotEnrolled, match="ask the operator for a token"):
        serve_agent(world.again(federation_id, "north"), StopFlag())


def test_a_token_that_does_not_work_is_shown_and_the_next_one_is_taken_without_a_restart(
    world: World, tmp_path: Path
) -> None:
    federation_id = world.begin(tiny_config(("north",), name="wrong"))
    token = tmp_path / "token"
    token.write_text("guessed")
    settings = world.again(federation_id, "north", enrolment_token_file=token, status_port=0)
    agent = Background(serve_agent, settings)
    with Pages(settings) as pages:
        until(lambda: pages.status()["state"] == "enrolment_refused", 120)
        assert "enrolment token is unknown" in pages.status()["reason"]
        assert "ask the operator for a new enrolment token" in pages.status()["to_do"]
        token.write_text(world.coordinator.enrolment_token(federation_id, "north"))
        until(lambda: pages.status()["state"] == "waiting", 120)
    assert agent.end() is None


def test_an_expired_token_is_named_with_when_it_expired(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="expired"))
    settings = world.settings(federation_id, "north", status_port=0)
    world.coordinator.clock_ahead_s = 400 * 86400.0
    try:
        agent = Background(serve_agent, settings)
        with Pages(settings) as pages:
            until(lambda: pages.status()["state"] == "enrolment_refused", 120)
            assert "the enrolment token of site north expired at" in pages.status()["reason"]
        assert isinstance(agent.end(), Stopped), "it was still trying"
    finally:
        world.coordinator.clock_ahead_s = 0.0


def test_a_coordinator_of_another_protocol_is_named_and_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation_id = world.begin(tiny_config(("north",), name="upgraded"))
    settings = world.settings(federation_id, "north", status_port=0)
    agent = world.start(settings, federation_id, "north")
    with Pages(settings) as pages:
        for spoken, older in ((PROTOCOL_VERSION + 1, "client"), (PROTOCOL_VERSION - 1, "coordinator")):
            monkeypatch.setattr(handshake, "PROTOCOL_VERSION", spoken)
            until(lambda: pages.status()["state"] == "protocol_mismatch", 120)
            said = f"speaks protocol {spoken}, the client {PROTOCOL_VERSION}; update the {older}"
            until(lambda said=said: said in pages.status()["reason"], 120)  # type: ignore[misc]  # a default binds it
        assert "upgrade the older of the two" in pages.status()["to_do"]
        monkeypatch.setattr(handshake, "PROTOCOL_VERSION", PROTOCOL_VERSION)
        world.request(federation_id)
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1)
    assert finished.sites[0].state == "applied"
    assert agent.end() is None


def test_a_state_folder_belongs_to_one_coordinator(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="moved"))
    agent = world.start(world.settings(federation_id, "north"), federation_id, "north")
    assert agent.end() is None
    key = (world.folder / federation_id / "north" / "key.pem").stat()
    assert key.st_mode & 0o777 == 0o600
    elsewhere = world.coordinator.url.replace("127.0.0.1", "localhost")
    with pytest.raises(OtherCoordinator, match=f"not at {elsewhere}"):
        serve_agent(world.again(federation_id, "north", coordinator_url=elsewhere), StopFlag())


def test_an_agent_waits_for_a_token_file_that_is_not_there_yet(world: World, tmp_path: Path) -> None:
    federation_id = world.begin(tiny_config(("north",), name="patient"))
    token = world.coordinator.enrolment_token(federation_id, "north")
    waiting = world.again(federation_id, "north", enrolment_token_file=tmp_path / "token")
    write: Callable[[], object] = lambda: (tmp_path / "token").write_text(token)  # noqa: E731 - for the timer
    threading.Timer(1.0, write).start()
    agent = world.start(waiting, federation_id, "north")
    assert agent.end() is None
