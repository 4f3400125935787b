"""What an agent or an LLM server tells Prometheus about its work."""

from dataclasses import dataclass

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedmkt.errors import Refusal
from fedmkt.protocol import TrainingReport
from fedmkt.work_metrics import DIVERGED, WorkMetrics


def page(metrics: WorkMetrics) -> dict[tuple[str, tuple[str, ...]], float]:
    body, media_type = metrics.page("")
    assert media_type.startswith("text/plain")
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_steps_are_counted_as_they_are_made() -> None:
    metrics = WorkMetrics("agent")
    for step, done in (("training", 1), ("training", 4), ("evaluating", 10), ("training", 2), ("training", 1)):
        metrics.progress(step, done)
    found = page(metrics)
    assert found["fedmkt_steps_total", ("training",)] == 4 + 2 + 1
    assert found["fedmkt_steps_total", ("evaluating",)] == 10


def test_work_is_seen_while_it_lasts_and_counted_when_it_ends() -> None:
    metrics = WorkMetrics("agent")
    with metrics.work("apply"):
        assert page(metrics)["fedmkt_working", ("apply",)] == 1
    with pytest.raises(ZeroDivisionError), metrics.work("apply"):
        raise ZeroDivisionError
    found = page(metrics)
    assert found["fedmkt_working", ("apply",)] == 0
    assert (found["fedmkt_work_total", ("apply", "done")], found["fedmkt_work_total", ("apply", "failed")]) == (1, 1)
    assert found["fedmkt_work_duration_seconds_count", ("apply",)] == 2


def test_a_training_that_diverges_is_counted_and_another_refusal_is_not() -> None:
    class Diverged(Refusal):
        code = DIVERGED

    metrics = WorkMetrics("llm-server")
    for refusal in (Diverged, Refusal):
        with pytest.raises(Refusal), metrics.work("distill"):
            raise refusal("no")
    assert page(metrics)["fedmkt_training_diverged_total", ()] == 1


def test_the_code_of_a_diverged_training_is_the_one_that_is_counted() -> None:
    from fedmkt.ml.training import TrainingDiverged

    assert TrainingDiverged.code == DIVERGED


def test_the_last_loss_and_the_bytes_moved_are_told() -> None:
    @dataclass
    class Moved:
        up: int = 1000
        down: int = 2500

    metrics = WorkMetrics("agent")
    assert page(metrics)["fedmkt_transferred_bytes_total", ("up",)] == 0
    metrics.traffic = Moved
    metrics.trained(TrainingReport(steps=3, samples=12, seconds=1.0, first_loss_nats=2.5, last_loss_nats=1.25))
    metrics.trained(None)
    found = page(metrics)
    assert found["fedmkt_training_loss_nats", ()] == 1.25
    assert found["fedmkt_transferred_bytes_total", ("up",)] == 1000
    assert found["fedmkt_transferred_bytes_total", ("down",)] == 2500
