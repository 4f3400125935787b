"""A federation on the terminal: a live screen where there is one, a line per change where there is not."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmkt.calls import all_items
from fedmkt.client import CoordinatorClient, CoordinatorUnreachable
from fedmkt.protocol import Evaluations, FederationView, RoundView, SelectionReport

POLL_S = 1.0
BAR_WIDTH = 24
STATE_STYLES = {"completed": "green", "failed": "bold red", "cancelled": "yellow", "ready": "green", "missed": "red"}


@dataclass(frozen=True)
class Activity:
    """What a process is doing now, as far as it says; total 0 means that nobody knows how long it takes."""

    name: str
    step: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Sight:
    """What can be seen of a federation at one moment. `rounds` are those that have ended, oldest first."""

    federation: FederationView
    rounds: tuple[RoundView, ...] = ()
    activities: tuple[Activity, ...] = ()
    notes: tuple[str, ...] = ()


class Watcher:
    """Looks at one federation again and again, and bears a coordinator that is away for a while."""

    def __init__(self, client: CoordinatorClient, federation_id: str) -> None:
        self._client = client
        self._federation_id = federation_id
        self._last: Sight | None = None

    def look(self) -> Sight:
        """The present state; the last known one, with a note, while the coordinator does not answer."""
        try:
            federation = self._client.federation(self._federation_id)
            known = self._last.rounds if self._last else ()
            rounds = known if len(known) == federation.rounds_finished else self._finished_rounds()
        except CoordinatorUnreachable:
            if self._last is None:
                raise
            return Sight(self._last.federation, self._last.rounds, notes=("the coordinator does not answer",))
        self._last = Sight(federation, rounds)
        return self._last

    def _finished_rounds(self) -> tuple[RoundView, ...]:
        rounds = all_items(partial(self._client.rounds, self._federation_id))
        finished = [each for each in rounds if each.finished_at is not None]
        return tuple(sorted(finished, key=lambda each: each.number))


def follow(
    look: Callable[[], Sight],
    *,
    until: Callable[[Sight], bool],
    console: Console,
    poll_s: float = POLL_S,
    wait: Callable[[float], object] = time.sleep,
) -> Sight:
    """Show what `look` sees until `until` holds of it; returns that last sight. `wait` may raise to end earlier."""
    if not console.is_terminal:
        return _follow_in_lines(look, until, console, poll_s, wait)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            sight = look()
            live.update(screen(sight), refresh=True)
            if until(sight):
                return sight
            wait(poll_s)


def _follow_in_lines(
    look: Callable[[], Sight],
    until: Callable[[Sight], bool],
    console: Console,
    poll_s: float,
    wait: Callable[[float], object],
) -> Sight:
    lines = Lines()
    while True:
        sight = look()
        for line in lines.news(sight):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if until(sight):
            return sight
        wait(poll_s)


# ------------------------------------------------------------------------------------------------ lines


@dataclass
class Lines:
    """Turns sights into lines, each fact said once."""

    _said: set[str] = field(default_factory=set)

    def news(self, sight: Sight) -> Iterator[str]:
        for line in self._facts(sight):
            if line not in self._said:
                self._said.add(line)
                yield line

    def _facts(self, sight: Sight) -> Iterator[str]:
        yield from sight.notes
        for done in sight.rounds:
            yield from _uploads(done)
            yield from _ending(done)
        now = sight.federation.current_round
        if now is None:
            yield from (f"waiting for {reason}" for reason in sight.federation.waits_for)
            return
        yield from _uploads(now)
        yield f"round {now.number}: {now.state}"


def _uploads(view: RoundView) -> Iterator[str]:
    for site in view.sites:
        if site.uploaded_at is not None:
            yield f"round {view.number}: {site.site} uploaded {kilobytes(site.upload_bytes)}"
    for site in view.sites:
        if site.applied_at is not None:
            yield f"round {view.number}: {site.site} has applied the LLM's knowledge"


def _ending(view: RoundView) -> Iterator[str]:
    result = view.llm_result
    if result is not None:
        yield f"round {view.number}: LLM taught by {taught(result.selection)}; {change(result.before, result.after)}"
    reason = f": {view.reason}" if view.reason else ""
    yield f"round {view.number}: {view.state} after {sum(view.state_seconds.values()):.0f} s{reason}"


# ------------------------------------------------------------------------------------------------ screen


def screen(sight: Sight) -> RenderableType:
    """Everything at once, for a live display."""
    parts: list[RenderableType] = [_title(sight)]
    if sight.rounds:
        parts.append(_history(sight.rounds))
    parts.append(_sites(sight))
    bars = _bars(sight)
    if bars is not None:
        parts.append(bars)
    parts += [Text(note, style="yellow") for note in sight.notes]
    return Group(*parts)


def _title(sight: Sight) -> Text:
    view = sight.federation
    title = Text(f"federation {view.config.name} ", style="bold")
    now = view.current_round
    if now is not None:
        title.append(f"round {now.number} of {view.rounds_requested} ", style="bold")
        title.append(now.state, style="cyan")
        if now.missing:
            title.append(f", waits for {', '.join(now.missing)}", style="yellow")
        title.append(f", {_left(now)}", style="dim")
    elif view.waits_for:
        title.append(f"waits for {'; '.join(view.waits_for)}", style="yellow")
    else:
        title.append(f"{view.rounds_finished} of {view.rounds_requested} rounds finished", style="green")
    return title


def _left(view: RoundView) -> str:
    if view.deadline is None:
        return "no deadline"
    return f"{max(0.0, (view.deadline - datetime.now(UTC)).total_seconds()):.0f} s until the deadline"


def _history(rounds: Iterable[RoundView]) -> Table:
    table = Table("round", "state", "time", "LLM taught by", "LLM on held-out text", box=None, header_style="dim")
    for view in rounds:
        result = view.llm_result
        table.add_row(
            str(view.number),
            Text(view.state, style=STATE_STYLES.get(view.state, "")),
            f"{sum(view.state_seconds.values()):.0f} s",
            taught(result.selection) if result else "",
            change(result.before, result.after) if result else view.reason or "",
        )
    return table


def _sites(sight: Sight) -> Table:
    now = sight.federation.current_round
    progress = {site.site: site for site in now.sites} if now else {}
    table = Table("site", "state", "model", "upload", "learned from", box=None, header_style="dim")
    for site in sight.federation.sites:
        part = progress.get(site.name)
        state = part.state if part else site.state
        report = part.report if part else None
        table.add_row(
            site.name,
            Text(state, style=STATE_STYLES.get(state, "")),
            site.model.architecture if site.model else "",
            kilobytes(part.upload_bytes) if part and part.upload_bytes else "",
            taught(report.selection) if report else "",
        )
    return table


def _bars(sight: Sight) -> Table | None:
    now = sight.federation.current_round
    activities = list(sight.activities)
    if now is not None and now.llm_progress is not None and not any(a.name == "LLM" for a in activities):
        activities.insert(0, Activity("LLM", now.llm_progress.step, now.llm_progress.done, now.llm_progress.total))
    if not activities:
        return None
    table = Table.grid(padding=(0, 1))
    for each in activities:
        bar = ProgressBar(each.total, each.done, width=BAR_WIDTH) if each.total else Text("")
        table.add_row(each.name, bar, f"{each.done}/{each.total}" if each.total else "", Text(each.step, style="dim"))
    return table


# ------------------------------------------------------------------------------------------------ words


def taught(selection: SelectionReport) -> str:
    """Who taught how many samples, most first: `numerics 40, self 12`."""
    counts = sorted(selection.taught.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name} {count}" for name, count in counts if count) or "nobody"


def change(before: Evaluations, after: Evaluations) -> str:
    """Held-out quality before and after, over all domains."""
    if "all" not in before or "all" not in after:
        return "not evaluated"
    was, now = before["all"], after["all"]
    found = [f"{was.bits_per_byte:.3f} -> {now.bits_per_byte:.3f} bits per byte"]
    if was.choice_accuracy is not None and now.choice_accuracy is not None:
        found.append(f"{was.choice_accuracy:.1%} -> {now.choice_accuracy:.1%} of choices right")
    if was.rouge_l is not None and now.rouge_l is not None:
        found.append(f"{was.rouge_l:.3f} -> {now.rouge_l:.3f} Rouge-L")
    return ", ".join(found)


def kilobytes(size_bytes: int) -> str:
    return f"{size_bytes / 1000:.1f} kB" if size_bytes < 1_000_000 else f"{size_bytes / 1e6:.2f} MB"


def finished(wanted: int) -> Callable[[Sight], bool]:
    """True once `wanted` rounds have ended, well or not."""
    return lambda sight: len(sight.rounds) >= wanted
