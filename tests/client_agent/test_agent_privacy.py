"""An agent with differential privacy: what it spends, what it shows, what it no longer does, and what it refuses."""

import json
import logging
from contextlib import ExitStack

import httpx
import pytest

from agent_world import World
from fedmkt.ml.private_budget import epsilon_of
from fedmkt.privacy import PrivacyGoal, PrivacyLedger, PrivacyRefused
from fedmkt.protocol import ApplyReport, RoundView
from fedmkt.service import locked
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.agent import Agent
from fedmkt_client_agent.main import prepare, serve
from fedmkt_client_agent.privacy import check_unbroken
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.status import Status
from fedmkt_client_agent.store import AgentStore
from live_coordinator import tiny_config

pytestmark = [pytest.mark.services, pytest.mark.timeout(180)]

GOAL = {"privacy_epsilon": 2.0, "privacy_rounds": 1, "checkpoint_s": 1e-6}
LESSON = 16  # public samples of a round


class StopsAt(Status):
    """Sets the stop flag the first time private training has come so far."""

    def __init__(self, stop: StopFlag, done: int) -> None:
        super().__init__()
        self._stop, self._at = stop, done

    def progress(self, step: str, done: int = 0, total: int = 0) -> None:
        super().progress(step, done, total)
        if (step, done) == ("training on private text", self._at):
            self._stop.set()


def run_until_step(settings: Settings, done: int) -> None:
    stop = StopFlag()
    store, status = AgentStore(settings.state_dir), StopsAt(stop, done)
    with ExitStack() as stack:
        stack.enter_context(locked(store.folder))
        Agent(prepare(stack, settings, store, status, stop), settings.poll_s).run()


def charged(settings: Settings) -> PrivacyLedger:
    ledger = AgentStore(settings.state_dir).load().privacy
    assert ledger is not None
    return ledger


def steps_of(ledger: PrivacyLedger) -> int:
    return sum(steps for _, _, steps in ledger.steps)


def reported(finished: RoundView) -> ApplyReport:
    report = finished.sites[0].report
    assert report is not None
    return report


def test_a_site_spends_its_budget_over_restarts_and_goes_on_without_private_text(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    federation_id = world.begin(tiny_config(("north",), name="noisy"))
    settings = world.settings(federation_id, "north", **GOAL)
    world.request(federation_id, 2)
    run_until_step(settings, 2)
    assert steps_of(charged(settings)) == 2
    assert charged(settings).rounds == 0

    again = world.again(federation_id, "north", **GOAL, status_port=0)
    agent = world.start(again, federation_id, "north")
    rounds = world.coordinator.wait_for_rounds(federation_id, 2)
    address = json.loads(AgentStore(again.state_dir).status_file.read_text())
    shown = httpx.get(f"http://{address['host']}:{address['port']}/status").json()["privacy"]
    assert agent.end() is None
    assert [(one.state, one.reason) for one in rounds] == [("completed", None)] * 2

    first, second = map(reported, rounds)
    assert [one.last_loss_nats is None for one in first.training] == [True, False], "no loss of private text is noised"
    assert [one.samples for one in (first.training[1], *second.training)] == [LESSON] * 2, "public samples, no replay"
    for report in (first, second):
        if report.gate.decision == "kept":  # by the public part: the figures are those of the evaluation
            assert report.gate.after_bits_per_byte == report.after["all"].bits_per_byte

    ledger = charged(settings)
    assert (ledger.rounds, steps_of(ledger)) == (1, 3), "22 samples in batches of 8: two steps, a restart, one step"
    told = [record.__dict__ for record in caplog.records if record.message == "privacy.spent"]
    assert [one["state"] for one in told] == ["used_up", "used_up"]
    assert [record.message for record in caplog.records].count("privacy.budget_spent") == 1
    assert shown["state"] == "used_up"
    assert 0 < shown["epsilon"] <= 2.0
    assert shown["epsilon"] == told[0]["epsilon"] == pytest.approx(epsilon_of(ledger, shown["delta"]), abs=1e-4)


def test_privacy_is_never_switched_on_late_or_off_early(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="wavering"))
    settings = world.settings(federation_id, "north", **GOAL)
    world.request(federation_id, 1)
    run_until_step(settings, 1)
    with pytest.raises(PrivacyRefused, match="one training without noise would end the guarantee"):
        serve(world.again(federation_id, "north"), StopFlag())


def test_a_federation_that_trains_every_weight_is_refused_at_the_start(world: World) -> None:
    federation_id = world.begin(tiny_config(("north",), name="whole-models", lora=None))
    with pytest.raises(PrivacyRefused, match="this federation trains every weight"):
        serve(world.settings(federation_id, "north", **GOAL), StopFlag())


@pytest.mark.parametrize(
    ("goal", "ledger", "has_adapter", "refused"),
    [
        (None, None, True, None),
        (PrivacyGoal(epsilon=1, rounds=1), None, False, None),
        (PrivacyGoal(epsilon=1, rounds=1), PrivacyLedger(), True, None),
        (PrivacyGoal(epsilon=1, rounds=1), None, True, "holds an adapter that was trained without noise"),
        (None, PrivacyLedger(rounds=4), True, "with differential privacy in 4 rounds"),
    ],
)
def test_the_guarantee_covers_everything_or_nothing(
    goal: PrivacyGoal | None, ledger: PrivacyLedger | None, has_adapter: bool, refused: str | None
) -> None:
    if refused is None:
        check_unbroken(goal, ledger, has_adapter=has_adapter)
    else:
        with pytest.raises(PrivacyRefused, match=refused):
            check_unbroken(goal, ledger, has_adapter=has_adapter)


def test_half_a_goal_is_no_goal(world: World) -> None:
    with pytest.raises(ValueError, match="privacy_epsilon and privacy_rounds belong together"):
        world.again("fed_0123456789abcdef", "north", privacy_epsilon=1.0)
