"""What Prometheus sees. Counters and durations are this replica's own; the state of things is read from the database.

Every replica tells the same about states, since they share one database: take `max`, not `sum`, over replicas for the
gauges that `figures` gives. Nothing is labelled with an id: 10,000 sites make no more series than 10.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from fedmkt import __version__
from fedmkt.protocol import PROTOCOL_VERSION
from fedmkt_coordinator.dependencies import Check
from fedmkt_coordinator.store import Outbox
from fedmkt_coordinator.store.figures import SEEN_WITHIN_S, ActiveRound, Figures
from fedmkt_coordinator.store.records import EventRow

ANSWERS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROUNDS_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400, 7 * 86400)
NO_ROUTE = "(none)"  # an address that nothing answers: its text is the client's, and without bound


class Metrics:
    """One registry for one application, so that several in one process do not share their figures."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Histogram(
            "fedmkt_http_request_duration_seconds",
            "From the first byte of a request to the last of its answer; long polls and event streams included",
            ["method", "route", "status"],
            buckets=ANSWERS_S,
            registry=registry,
        )
        self.in_progress = Gauge("fedmkt_http_requests_in_progress", "Requests being answered now", registry=registry)
        self.problems = Counter("fedmkt_problems", "Answers of 400 and above by code", ["code"], registry=registry)
        self.rate_limited = Counter(
            "fedmkt_rate_limited_requests", "Requests over the rate of a credential or address", registry=registry
        )
        self.refused_uploads = Counter(
            "fedmkt_upload_refusals", "Refused calls of /v1/uploads by code", ["code"], registry=registry
        )
        self.uploads = Counter("fedmkt_uploads", "Uploads by what became of them", ["result"], registry=registry)
        self.upload_bytes = Counter("fedmkt_upload_bytes", "Bytes of accepted uploads", ["kind"], registry=registry)
        self.upload_seconds = Histogram(
            "fedmkt_upload_duration_seconds",
            "From the announcement of an upload to its receipt",
            ["kind"],
            buckets=ROUNDS_S,
            registry=registry,
        )
        self.state_seconds = Histogram(
            "fedmkt_round_state_duration_seconds", "Time in a state", ["state"], buckets=ROUNDS_S, registry=registry
        )
        self.round_seconds = Histogram(
            "fedmkt_round_duration_seconds",
            "From the beginning of a round to its end",
            ["state"],
            buckets=ROUNDS_S,
            registry=registry,
        )
        self.jobs = Counter("fedmkt_job_transitions", "Jobs that came to a state", ["kind", "state"], registry=registry)
        self.listeners = Gauge("fedmkt_listeners", "Requests that wait for news", ["kind"], registry=registry)
        self.tick_seconds = Histogram(
            "fedmkt_keeper_tick_duration_seconds", "One look of the keeper at everything", registry=registry
        )
        self.step_failures = Counter(
            "fedmkt_keeper_step_failures", "Steps of the keeper that raised", ["step"], registry=registry
        )
        self._ticked_at = time.monotonic()
        ProcessCollector(registry=registry)
        info = Gauge(
            "fedmkt_build_info", "The program that answers", ["version", "protocol_version"], registry=registry
        )
        info.labels(__version__, str(PROTOCOL_VERSION)).set(1)
        for kind in ("sse", "long_poll"):
            self.listeners.labels(kind)

    # -------------------------------------------------------------------------------------------- what happens

    def answered(self, method: str, route: str | None, status: int, seconds: float, code: str | None) -> None:
        """A request was answered; `code` of the problem, if the answer was one."""
        self.requests.labels(method, route or NO_ROUTE, str(status)).observe(seconds)
        if code is not None:
            self.problems.labels(code).inc()
            if route is not None and route.startswith("/v1/uploads"):
                self.refused_uploads.labels(code).inc()
        if status == 429:
            self.rate_limited.inc()

    def committed(self, outbox: Outbox) -> None:
        """This replica has committed these events."""
        for event in outbox.events:
            self._count(event)

    def _count(self, event: EventRow) -> None:
        data = event.data
        match event.kind:
            case "round.state" if data.get("before"):
                self.state_seconds.labels(str(data["before"])).observe(_number(data.get("seconds")))
                if data.get("round_seconds") is not None:
                    self.round_seconds.labels(str(data["state"])).observe(_number(data["round_seconds"]))
            case "job.state":
                self.jobs.labels(str(data["job"]), str(data["state"])).inc()
            case "upload.announced" | "upload.refused" | "upload.abandoned":
                self.uploads.labels(event.kind.removeprefix("upload.")).inc()
            case "knowledge.accepted" | "adapter.accepted":
                kind = event.kind.removesuffix(".accepted")
                self.uploads.labels("accepted").inc()
                self.upload_bytes.labels(kind).inc(_number(data.get("bytes")))
                self.upload_seconds.labels(kind).observe(_number(data.get("seconds")))

    def ticked(self, seconds: float) -> None:
        """The keeper has looked at everything."""
        self.tick_seconds.observe(seconds)
        self._ticked_at = time.monotonic()

    # -------------------------------------------------------------------------------------------- the scrape

    def page(
        self, accept: str, checks: dict[str, Check], figures: Figures | None, interval_s: float
    ) -> tuple[bytes, str]:
        """The answer's body and media type. Without figures (the database is down) the rest is told all the same."""
        encode, media_type = choose_encoder(accept)
        lag_s = max(0.0, time.monotonic() - self._ticked_at - interval_s)
        families = [*self.registry.collect(), *_health(checks, lag_s)]
        if figures is not None:
            families += _state(figures)
        return encode(_Families(families)), media_type


class _Families:
    """As much of a registry as an encoder needs."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def _health(checks: dict[str, Check], lag_s: float) -> Iterable[Metric]:
    up = GaugeMetricFamily("fedmkt_dependency_up", "1 if it answers", labels=["dependency"])
    took = GaugeMetricFamily("fedmkt_dependency_check_seconds", "How long the check took", labels=["dependency"])
    for name, check in checks.items():
        up.add_metric([name], float(check.ok))
        took.add_metric([name], check.seconds)
    yield from (up, took)
    yield _gauge("fedmkt_keeper_lag_seconds", "By how much the keeper's next look is late", lag_s)
    yield _gauge("fedmkt_event_loop_tasks", "Tasks of the event loop", len(asyncio.all_tasks()))


def _state(found: Figures) -> Iterable[Metric]:
    yield _gauge("fedmkt_federations", "Federations", found.federations)
    yield _by("fedmkt_rounds", "Rounds by state", ["state"], {(state,): n for state, n in found.rounds.items()})
    yield _by("fedmkt_jobs", "Jobs by kind and state", ["kind", "state"], found.jobs)
    yield _gauge("fedmkt_job_queue_depth", "Jobs that wait for an LLM server", found.due_jobs)
    yield _gauge(
        "fedmkt_job_queue_oldest_seconds", "How long the first of them has waited", _age_s(found.oldest_due, found.now)
    )
    yield _by("fedmkt_sites", "Sites by state", ["state"], {(state,): n for state, n in found.sites.items()})
    seen = {(f"{within_s:g}",): count for within_s, count in zip(SEEN_WITHIN_S, found.seen, strict=True)}
    yield _by("fedmkt_sites_seen", "Active sites that asked for their task within so many seconds", ["within"], seen)
    last = {(each.federation, each.site): each.at.timestamp() for each in found.sightings}
    yield _by(
        "fedmkt_site_last_seen_timestamp_seconds",
        "When a site last asked for its task; only while there are few sites",
        ["federation", "site"],
        last,
    )
    yield from (_of_rounds(name, text, value, found) for name, text, value in OF_ROUNDS)


def _until(each: ActiveRound, now: datetime) -> float:
    return each.deadline.timestamp() if each.deadline else 0.0


OF_ROUNDS: tuple[tuple[str, str, Callable[[ActiveRound, datetime], float]], ...] = (
    ("fedmkt_round_expected_sites", "Sites that the present round counts on", lambda each, now: each.expected),
    ("fedmkt_round_missing_sites", "Of these, who has still to upload, then to report", lambda each, now: each.missing),
    ("fedmkt_round_state_age_seconds", "Time in the present state", lambda each, now: _age_s(each.since, now)),
    ("fedmkt_round_deadline_timestamp_seconds", "When the present state ends at the latest", _until),
)


def _of_rounds(name: str, text: str, value: Callable[[ActiveRound, datetime], float], found: Figures) -> Metric:
    values = {(each.federation, each.state): value(each, found.now) for each in found.active_rounds}
    return _by(name, text, ["federation", "state"], values)


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family


def _by(name: str, text: str, labels: list[str], values: Mapping[Any, float]) -> Metric:
    """`values` by the tuple of its labels' values."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in values.items():
        family.add_metric(list(key), value)
    return family


def _age_s(at: datetime | None, now: datetime) -> float:
    return 0.0 if at is None else max(0.0, (now - at).total_seconds())


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
