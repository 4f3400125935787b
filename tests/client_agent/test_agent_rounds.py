"""Whole rounds of real agents, a real LLM server and a real coordinator, in process, with tiny models."""

import json
import logging
from contextlib import ExitStack

import pytest

from agent_world import SITES, World
from fedmkt.service import locked
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.agent import Agent
from fedmkt_client_agent.main import prepare
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import AgentStore
from live_coordinator import tiny_config

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]


def test_two_sites_and_the_llm_teach_each_other_and_nothing_private_gets_out(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation_id = world.begin(tiny_config(("north", "south"), name="whole"))
    agents = [world.start(world.settings(federation_id, site), federation_id, site) for site in SITES]
    world.request(federation_id, 2)
    rounds = world.coordinator.wait_for_rounds(federation_id, 2)
    assert [agent.end() for agent in agents] == [None, None]
    assert [(one.number, one.state, one.reason) for one in rounds] == [(1, "completed", None), (2, "completed", None)]
    for finished in rounds:
        result = finished.llm_result
        assert result is not None
        assert result.refused_sites == {}
        assert result.selection.offered == {"north": 16, "south": 16}
        assert set(result.before) == {"all", "first", "second"}
        assert {"fetch", "own_knowledge", "lesson", "train", "evaluate", "publish"} <= set(result.phase_seconds)
        for site in finished.sites:
            assert site.report is not None
            assert site.report.selection.offered == {"llm": 16}
            assert sum(site.report.selection.taught.values()) == 16
            assert site.report.bytes_up > site.upload_bytes > 0
            assert site.report.bytes_down > 0
            assert len(site.report.training) == 2, "private, then the lesson"
    first, second = (next(s.report for s in one.sites if s.site == "north") for one in rounds)
    assert first is not None
    assert second is not None
    assert first.after == second.before, "the next round goes on from where the last one ended"
    with world.coordinator.client() as operator:
        versions = operator.adapters(federation_id).items
    assert [version.version for version in versions] == [2, 1, 0]
    assert set(versions[0].knowledge) == {"north", "south"}

    lines = [line for site in SITES for line in (world.folder / f"{site}.jsonl").read_text().splitlines()]
    private = [json.loads(line)["text"] for line in lines]
    logged = "\n".join(json.dumps(record.__dict__, default=str) for record in caplog.records)
    sent = b"\n".join(world.bodies)
    for secret in (*private, str(world.folder / "north"), str(world.folder / "north.jsonl")):
        assert secret not in logged
        assert secret.encode() not in sent


def adapter_of(store: AgentStore) -> bytes:
    folder = store.party_folder(store.load())
    assert folder is not None
    return (folder / "adapter_model.safetensors").read_bytes()


class StopsAt(Status):
    """Sets the stop flag the first time a step begins, or has come so far."""

    def __init__(self, stop: StopFlag, step: str, done: int) -> None:
        super().__init__()
        self._stop, self._at = stop, (step, done)

    def progress(self, step: str, done: int = 0, total: int = 0) -> None:
        super().progress(step, done, total)
        if (step, done) == self._at:
            self._stop.set()


def run_until(settings: Settings, step: str, done: int) -> None:
    """An agent that is told to stop when it comes to this point."""
    stop = StopFlag()
    store, status = AgentStore(settings.state_dir), StopsAt(stop, step, done)
    with ExitStack() as stack:
        stack.enter_context(locked(store.folder))
        Agent(prepare(stack, settings, store, status, stop), settings.poll_s).run()
    assert status.view.step == step


def test_an_agent_that_is_stopped_again_and_again_ends_where_an_unbroken_one_does(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole = world.begin(tiny_config(("north",), name="unbroken"))
    agent = world.start(world.settings(whole, "north"), whole, "north")
    world.request(whole)
    world.coordinator.wait_for_rounds(whole, 1)
    assert agent.end() is None

    broken = world.begin(tiny_config(("north",), name="broken"))
    world.request(broken)
    caplog.clear()
    run_until(world.settings(broken, "north"), "training on private text", 2)
    for step, done in [
        ("making knowledge", 16),
        ("uploading knowledge", 0),
        ("fetching the LLM's knowledge", 0),
        ("preparing the lesson", 0),
        ("learning from the others", 1),
    ]:
        run_until(world.again(broken, "north"), step, done)
    agent = world.start(world.again(broken, "north"), broken, "north")
    (finished,) = world.coordinator.wait_for_rounds(broken, 1)
    assert agent.end() is None
    assert finished.state == "completed"
    events = [record.message for record in caplog.records]
    for once in ("private.trained", "knowledge.made", "knowledge.uploaded", "round.applied", "round.reported"):
        assert events.count(once) == 1, once
    folders = [AgentStore(world.folder / federation_id / "north") for federation_id in (whole, broken)]
    assert adapter_of(folders[0]) == adapter_of(folders[1])
