"""What Prometheus sees of an agent or an LLM server, on its status port: work, steps, losses, bytes.

Imports prometheus_client, so only services that have it import this module.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fedmkt import __version__
from fedmkt.errors import Refusal
from fedmkt.protocol import TrainingReport

WORK_S = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 12 * 3600, 86400)
DIVERGED = "training.nan"
WITHHELD = "policy."  # codes of what a site's own policy holds back


class Moved(Protocol):
    @property
    def up(self) -> int: ...
    @property
    def down(self) -> int: ...


class _Nothing:
    up = down = 0


class WorkMetrics:
    """One registry for one service. `traffic` may be set once there is a client to ask."""

    def __init__(self, service: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.traffic: Callable[[], Moved] = _Nothing
        self._working = Gauge("fedmkt_working", "1 while a task or job is worked on", ["kind"], registry=registry)
        self._ended = Counter("fedmkt_work", "Tasks or jobs that ended", ["kind", "result"], registry=registry)
        self._seconds = Histogram(
            "fedmkt_work_duration_seconds", "How long they took", ["kind"], buckets=WORK_S, registry=registry
        )
        self._steps = Counter(
            "fedmkt_steps", "Training steps, or samples of what goes by samples", ["step"], registry=registry
        )
        self._loss = Gauge("fedmkt_training_loss_nats", "Loss of the last training's last step", registry=registry)
        self._diverged = Counter(
            "fedmkt_training_diverged", "Trainings stopped by a loss that is not finite", registry=registry
        )
        self._at: tuple[str, int] = ("", 0)
        info = Gauge("fedmkt_build_info", "The program that answers", ["service", "version"], registry=registry)
        info.labels(service, __version__).set(1)
        registry.register(_Bytes(self))
        ProcessCollector(registry=registry)

    @contextmanager
    def work(self, kind: str) -> Iterator[None]:
        """Around a task or job; whatever it raises is a failure, unless the site's policy holds it back."""
        began, result = time.monotonic(), "failed"
        self._working.labels(kind).set(1)
        try:
            yield
            result = "done"
        except Refusal as error:
            if error.code == DIVERGED:
                self.diverged()
            if error.code.startswith(WITHHELD):
                result = "withheld"
            raise
        finally:
            self._working.labels(kind).set(0)
            self._ended.labels(kind, result).inc()
            self._seconds.labels(kind).observe(time.monotonic() - began)

    def progress(self, step: str, done: int) -> None:
        """`done` steps of what is called `step`; begins anew with another name or a smaller number."""
        name, before = self._at
        if name != step or done < before:
            before = 0
        self._at = (step, done)
        self._steps.labels(step).inc(done - before)

    def trained(self, report: TrainingReport | None) -> None:
        if report is not None and report.last_loss_nats is not None:
            self._loss.set(report.last_loss_nats)

    def diverged(self) -> None:
        self._diverged.inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """The answer's body and media type."""
        encode, media_type = choose_encoder(accept)
        return encode(self.registry), media_type


class _Bytes(Collector):
    def __init__(self, metrics: WorkMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        moved = self._metrics.traffic()
        family = CounterMetricFamily("fedmkt_transferred_bytes", "Bodies sent and received", labels=["direction"])
        family.add_metric(["up"], moved.up)
        family.add_metric(["down"], moved.down)
        yield family
