"""Downloads, and the LLM server's traffic, over lines that break."""

import hashlib
from pathlib import Path

import pytest

from fault_proxy import Fault, proxied
from fedmkt.client import CoordinatorUnreachable, RetryPolicy
from fedmkt.protocol import Heartbeat, JobCompletion, LlmRegistration, MapResult
from fedmkt_llm_server.queue import JobQueue
from live_coordinator import LiveCoordinator, stories, tiny_config, until
from network_world import CARD, noise, worker_at
from small_tokenizers import vocabulary

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]


@pytest.mark.parametrize("how", ["cut", "reset"])
@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_ten_broken_lines_cost_a_download_less_than_a_tenth(
    coordinator: LiveCoordinator, tmp_path: Path, how: str, size: int
) -> None:
    blob = noise(size, seed=size)
    with worker_at(coordinator.url) as worker:
        digest = worker.put_artifact(blob)
    broken = [Fault(how, down=size // 20 + 997 * number) for number in range(10)]  # type: ignore[arg-type]  # parametrised
    with proxied(coordinator.port, *broken) as line, worker_at(line.url) as worker:
        assert worker.fetch_artifact(digest, tmp_path).read_bytes() == blob
        received = line.down_bytes
        assert line.faults_done == 10
    print(f"{size} bytes down, 10 x {how}: {received / size:.3f} x the artifact on the line")
    assert received <= 1.1 * size


def test_a_download_leaves_stalled_and_dead_lines_and_pages(coordinator: LiveCoordinator, tmp_path: Path) -> None:
    blob = noise(200_000)
    with worker_at(coordinator.url) as worker:
        digest = worker.put_artifact(blob)
    gateway = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 6\r\nConnection: close\r\n\r\n<html>"
    faults = [Fault("stall", down=50_000), Fault("page", page=gateway), Fault("half_open", down=60_000)]
    with proxied(coordinator.port, *faults) as line, worker_at(line.url, timeout_s=1.0) as worker:
        assert worker.fetch_artifact(digest, tmp_path).read_bytes() == blob
        assert line.faults_done == 3
        assert line.down_bytes <= 1.1 * len(blob)


def test_a_download_that_gets_nowhere_ends_and_leaves_what_came(coordinator: LiveCoordinator, tmp_path: Path) -> None:
    blob = noise(100_000)
    with worker_at(coordinator.url) as worker:
        digest = worker.put_artifact(blob)
    nothing = [Fault("cut", down=30_000)] + [Fault("cut", down=1)] * 10_000
    with (
        proxied(coordinator.port, *nothing) as line,
        worker_at(line.url, retry=RetryPolicy(0.01, 0.05, 1.0)) as worker,
        pytest.raises(CoordinatorUnreachable, match=f"GET artifact {digest} .* failed"),
    ):
        worker.fetch_artifact(digest, tmp_path)
    assert 25_000 < (tmp_path / f"{digest}.part").stat().st_size < 30_000
    with proxied(coordinator.port) as line, worker_at(line.url) as worker:
        assert worker.fetch_artifact(digest, tmp_path).read_bytes() == blob
        assert line.down_bytes < 80_000


# ------------------------------------------------------------------------------------------------ the LLM server's side


@pytest.mark.parametrize("size", [300_000, 3_000_000])
def test_ten_broken_lines_cost_an_artifact_of_the_llm_server_less_than_a_tenth(
    coordinator: LiveCoordinator, tmp_path: Path, size: int
) -> None:
    blob = noise(size, seed=size + 1)
    broken = [Fault("cut", up=size // 20 + 997 * number) for number in range(10)]
    with proxied(coordinator.port, *broken) as line, worker_at(line.url) as worker:
        digest = worker.put_artifact(blob)
        sent = line.up_bytes
        assert digest == hashlib.sha256(blob).hexdigest()
        assert line.faults_done == 10
        assert worker.put_artifact(blob) == digest
        assert worker.fetch_artifact(digest, tmp_path).read_bytes() == blob
    print(f"{size} bytes of an artifact up, 10 x cut: {sent / size:.3f} x the artifact on the line")
    assert sent <= 1.1 * size


def test_a_job_is_done_over_a_line_that_loses_every_other_answer(coordinator: LiveCoordinator) -> None:
    federation_id = coordinator.create(tiny_config(("north",), name="lost-answers"), stories(0, 10))
    lossy = [fault for _ in range(6) for fault in (Fault("cut", down=1), Fault("cut", up=100_000))]
    with proxied(coordinator.port, *lossy) as line, worker_at(line.url) as worker:
        words = worker.put_artifact(vocabulary("byte_level").to_bytes())
        worker.register_llm(federation_id, LlmRegistration(vocabulary=words, model=CARD))
        _enrol(coordinator, federation_id)
        queue = JobQueue(worker.queue(), "lossy")
        found = []
        until(lambda: bool(found.append(queue.take(0.2)) or found[-1]))
        delivery = found[-1]
        assert delivery is not None
        job = worker.claim(delivery.job_id)
        assert job.attempt == 1
        queue.acknowledge(delivery)
        queue.close()
        assert not worker.heartbeat(job.job_id, Heartbeat(attempt=1)).cancelled
        result = MapResult(artifact=worker.put_artifact(noise(250_000)))
        worker.complete_job(job.job_id, JobCompletion(attempt=1, result=result))
        worker.complete_job(job.job_id, JobCompletion(attempt=1, result=result))
        assert line.faults_done >= 4
    with coordinator.client() as operator:
        events = operator.events(federation_id).items
    assert [each.data["state"] for each in events if each.kind == "job.state"].count("done") == 1


def _enrol(coordinator: LiveCoordinator, federation_id: str) -> None:
    """A site whose vocabulary needs a map."""
    from fedmkt.client import CoordinatorClient, SiteKey
    from fedmkt.protocol import SiteModel
    from fedmkt.signing import new_key

    key = new_key()
    with CoordinatorClient(coordinator.url) as stranger:
        enrolled = stranger.enrol(coordinator.enrolment_token(federation_id, "north"), key)
    with CoordinatorClient(coordinator.url, SiteKey(enrolled.site_id, key)) as site:
        site.put_vocabulary(vocabulary("sentencepiece").to_bytes())
        site.put_model(SiteModel(model=CARD, private_samples=5))
