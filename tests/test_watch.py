"""A federation on the terminal: each fact once as a line, everything at once on a screen."""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console

from fedmkt.client import CoordinatorUnreachable
from fedmkt.protocol import (
    DistillResult,
    Evaluation,
    FederationConfig,
    FederationView,
    LlmProgress,
    RoundPage,
    RoundView,
    SelectionReport,
    SiteProgress,
    SiteView,
)
from fedmkt.watch import Activity, Lines, Sight, Watcher, change, finished, follow, kilobytes, screen, taught

NOW = datetime.now(UTC)
QUALITY = {"all": Evaluation(bits_per_byte=2.0, accuracy=0.5, samples=3)}
BETTER = {"all": Evaluation(bits_per_byte=1.875, accuracy=0.5, samples=3)}


def round_view(number: int = 1, **changes: Any) -> RoundView:
    values: dict[str, Any] = {
        "round_id": f"rnd_{number:016x}",
        "federation_id": "fed_0123456789abcdef",
        "number": number,
        "slice_index": 0,
        "state": "collecting",
        "reason": None,
        "started_at": NOW,
        "finished_at": None,
        "deadline": NOW + timedelta(seconds=60),
        "missing": ("south",),
        "sites": (
            SiteProgress(site="north", state="uploaded", upload_bytes=12_345, uploaded_at=NOW),
            SiteProgress(site="south", state="expected"),
        ),
        "llm_progress": None,
        "llm_result": None,
        "state_seconds": {},
    }
    return RoundView(**{**values, **changes})


DONE = round_view(
    state="completed",
    finished_at=NOW,
    missing=(),
    llm_result=DistillResult(
        knowledge="a" * 64,
        selection=SelectionReport(taught={"north": 3, "self": 9, "none": 0}),
        gate=None,
        before=QUALITY,
        after=BETTER,
        training=None,
    ),
    state_seconds={"collecting": 10.2, "distilling": 5.0},
)


def federation(current: RoundView | None = None, **changes: Any) -> FederationView:
    values: dict[str, Any] = {
        "federation_id": "fed_0123456789abcdef",
        "config": FederationConfig(name="tiny", sites=("north", "south")),
        "created_at": NOW,
        "public_set": None,
        "public_samples": 0,
        "llm": None,
        "llm_vocabulary": None,
        "sites": (
            SiteView(site_id=None, name="north", state="ready"),
            SiteView(site_id=None, name="south", state="awaited"),
        ),
        "rounds_requested": 2,
        "rounds_finished": 0,
        "current_round": current,
        "waits_for": (),
    }
    return FederationView(**{**values, **changes})


def drawn(sight: Sight) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(screen(sight))
    return out.getvalue()


def test_every_fact_is_said_once() -> None:
    lines = Lines()
    waiting = Sight(federation(waits_for=("an LLM server",)))
    assert list(lines.news(waiting)) == ["waiting for an LLM server"]
    assert list(lines.news(waiting)) == []
    assert list(lines.news(Sight(federation(round_view())))) == [
        "round 1: north uploaded 12.3 kB",
        "round 1: collecting",
    ]
    assert list(lines.news(Sight(federation(), rounds=(DONE,)))) == [
        "round 1: LLM taught by self 9, north 3; 2.000 -> 1.875 bits per byte",
        "round 1: completed after 15 s",
    ]


def test_a_round_that_failed_says_why() -> None:
    failed = round_view(state="failed", reason="1 of 2 uploads: south is missing", finished_at=NOW)
    assert "round 1: failed after 0 s: 1 of 2 uploads: south is missing" in list(
        Lines().news(Sight(federation(), rounds=(failed,)))
    )


def test_the_screen_shows_state_deadline_and_who_is_missing() -> None:
    shown = drawn(Sight(federation(round_view())))
    assert "federation tiny round 1 of 2 collecting, waits for south" in shown
    assert "s until the deadline" in shown
    assert "uploaded" in shown
    assert "12.3 kB" in shown


def test_the_screen_shows_what_the_llm_and_the_sites_do() -> None:
    busy = round_view(llm_progress=LlmProgress(step="learning", done=3, total=8))
    shown = drawn(Sight(federation(busy), activities=(Activity("north", "training", 5, 9),), notes=("it rains",)))
    assert "3/8" in shown
    assert "learning" in shown
    assert "5/9" in shown
    assert "it rains" in shown


def test_the_screen_shows_finished_rounds_and_who_taught() -> None:
    shown = drawn(Sight(federation(rounds_finished=1), rounds=(DONE,)))
    assert "self 9, north 3" in shown
    assert "2.000 -> 1.875 bits per byte" in shown


def test_counts_are_most_first_and_nobody_is_said() -> None:
    assert taught(SelectionReport(taught={"b": 2, "a": 2, "self": 7, "none": 0})) == "self 7, a 2, b 2"
    assert taught(SelectionReport()) == "nobody"
    assert change({}, QUALITY) == "not evaluated"
    assert (kilobytes(999), kilobytes(1_250_000)) == ("1.0 kB", "1.25 MB")


class Coordinator:
    """Answers with what the test put there; no answer when that is None."""

    def __init__(self, *answers: FederationView | None) -> None:
        self.answers = list(answers)
        self.asked_for_rounds = 0

    def federation(self, federation_id: str) -> FederationView:
        answer = self.answers.pop(0)
        if answer is None:
            raise CoordinatorUnreachable("gone")
        return answer

    def rounds(self, federation_id: str, cursor: str | None = None) -> RoundPage:
        self.asked_for_rounds += 1
        pages = {None: RoundPage(items=(round_view(3), round_view(2, finished_at=NOW)), next_cursor="2")}
        return pages.get(cursor) or RoundPage(items=(DONE,), next_cursor=None)


def test_a_coordinator_that_is_away_leaves_the_last_sight_with_a_note() -> None:
    watcher = Watcher(Coordinator(federation(round_view()), None), "fed")  # type: ignore[arg-type]  # answers the same two calls
    first, second = watcher.look(), watcher.look()
    assert first.notes == ()
    assert second.federation == first.federation
    assert second.notes == ("the coordinator does not answer",)


def test_a_coordinator_that_never_answered_is_an_error() -> None:
    with pytest.raises(CoordinatorUnreachable):
        Watcher(Coordinator(None), "fed").look()  # type: ignore[arg-type]  # answers the same two calls


def test_finished_rounds_are_fetched_once_and_oldest_first() -> None:
    coordinator = Coordinator(federation(rounds_finished=2), federation(rounds_finished=2))
    watcher = Watcher(coordinator, "fed")  # type: ignore[arg-type]  # answers the same two calls
    assert [each.number for each in watcher.look().rounds] == [1, 2]
    assert [each.number for each in watcher.look().rounds] == [1, 2]
    assert coordinator.asked_for_rounds == 2  # two pages, once


@pytest.mark.parametrize("terminal", [True, False])
def test_following_ends_when_the_rounds_have_ended(terminal: bool) -> None:
    sights = [Sight(federation(round_view())), Sight(federation(), rounds=(DONE,))]
    waits: list[float] = []
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    last = follow(lambda: sights.pop(0), until=finished(1), console=console, poll_s=0.5, wait=waits.append)
    assert last.rounds == (DONE,)
    assert waits == [0.5]
    assert "completed" in out.getvalue()
