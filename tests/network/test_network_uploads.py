"""Uploads over lines that break in every way: they complete, count once, and cost little more than their bytes."""

import time

import pytest

from fault_proxy import Fault, proxied, replay
from fedmkt.client import CoordinatorProblem, CoordinatorUnreachable, RetryPolicy
from fedmkt.protocol import CHUNK_BYTES, UploadState
from fedmkt.signing import sign_manifest
from network_world import UploadingSite, noise

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]


@pytest.mark.parametrize("how", ["cut", "reset"])
@pytest.mark.parametrize("size", [300_000, 2 * CHUNK_BYTES + 500_000])
def test_ten_broken_lines_cost_less_than_a_tenth_of_the_blob(site: UploadingSite, how: str, size: int) -> None:
    blob = noise(size, seed=size)
    broken = [Fault(how, up=size // 40 + 997 * number) for number in range(10)]  # type: ignore[arg-type]  # parametrised
    with proxied(site.coordinator.port, *broken) as line, site.client(line.url) as client:
        receipt = site.upload(client, blob)
        sent, traffic = line.up_bytes, client.traffic.up
        assert line.faults_done == 10
    print(f"{size} bytes, 10 x {how}: {sent / size:.3f} x the blob on the line, {traffic / size:.3f} x in the report")
    assert receipt.size_bytes == size
    assert site.accepted() == 1
    assert sent <= 1.1 * size
    assert size < traffic <= sent


def test_a_stall_is_given_up_and_the_upload_goes_on_over_another_line(site: UploadingSite) -> None:
    stalled = [Fault("stall", up=40_000), Fault("stall", down=10)]
    with proxied(site.coordinator.port, *stalled) as line, site.client(line.url, timeout_s=1.0) as client:
        assert site.upload(client, noise(200_000)).size_bytes == 200_000
        assert line.faults_done == 2
        assert line.up_bytes <= 1.1 * 200_000


def test_a_line_that_is_dead_without_saying_so_is_left_for_another(site: UploadingSite) -> None:
    dead = [Fault("half_open", up=50_000), Fault("half_open", up=30_000)]
    with proxied(site.coordinator.port, *dead) as line, site.client(line.url, timeout_s=1.0) as client:
        assert site.upload(client, noise(200_000)).size_bytes == 200_000
        assert line.faults_done == 2
        assert line.up_bytes <= 1.1 * 200_000


def test_a_short_stall_is_sat_out(site: UploadingSite) -> None:
    with (
        proxied(site.coordinator.port, Fault("stall", up=40_000, seconds=1.5)) as line,
        site.client(line.url) as client,
    ):
        site.upload(client, noise(100_000))
        assert line.connections == 1


@pytest.mark.chaos
def test_a_stall_of_half_a_minute_is_sat_out_with_the_usual_timeouts(site: UploadingSite) -> None:
    with (
        proxied(site.coordinator.port, Fault("stall", up=400_000, seconds=30)) as line,
        site.client(line.url, timeout_s=60.0, retry=RetryPolicy()) as client,
    ):
        began = time.monotonic()
        site.upload(client, noise(600_000))
        assert time.monotonic() - began >= 30
        assert line.up_bytes <= 1.1 * 600_000


def test_answers_that_get_lost_change_nothing(site: UploadingSite) -> None:
    lost = [Fault("cut", down=1 + 50 * number) for number in range(8)]
    with proxied(site.coordinator.port, *lost) as line, site.client(line.url) as client:
        receipt = site.upload(client, noise(50_000))
        assert site.upload(client, noise(50_000)) == receipt
        assert line.faults_done == 8
    assert site.accepted() == 1


def test_everything_delivered_twice_counts_once(site: UploadingSite) -> None:
    blob = noise(CHUNK_BYTES + 100_000)
    with proxied(site.coordinator.port) as line, site.client(line.url) as client:
        receipt = site.upload(client, blob)
        for connection in line.recorded:
            assert b"HTTP/1.1 " in replay(site.coordinator.port, bytes(connection))
        assert site.upload(client, blob) == receipt
    assert site.accepted() == 1


def test_pages_of_a_gateway_are_no_answers(site: UploadingSite) -> None:
    pages = [Fault("page", page=page(502)), Fault("page", page=page(504)), Fault("page", page=page(503))]
    with proxied(site.coordinator.port, *pages) as line, site.client(line.url) as client:
        assert site.upload(client, noise(20_000)).size_bytes == 20_000
        assert line.faults_done == 3


def page(status: int) -> bytes:
    html = b"<html><body><h1>Bad gateway</h1></body></html>"
    head = f"HTTP/1.1 {status} Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: {len(html)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + html


def test_a_modem_line_is_slow_and_enough(site: UploadingSite) -> None:
    blob = noise(30_000)
    with proxied(site.coordinator.port, rate_bytes_s=7000) as line, site.client(line.url, timeout_s=10.0) as client:
        began = time.monotonic()
        site.upload(client, blob)
        assert time.monotonic() - began > 4
        assert line.up_bytes <= 1.1 * len(blob)


def test_a_line_that_carries_nothing_is_given_up_when_patience_ends(site: UploadingSite) -> None:
    nothing = [Fault("cut", up=1)] * 10_000
    with (
        proxied(site.coordinator.port, *nothing) as line,
        site.client(line.url, retry=RetryPolicy(0.01, 0.05, 1.0)) as client,
        pytest.raises(CoordinatorUnreachable, match=r"failed \d+ times"),
    ):
        site.upload(client, noise(10_000))


# ------------------------------------------------------------------------------------------------ parts by hand


def test_parts_may_come_late_twice_and_in_any_order(site: UploadingSite) -> None:
    chunk = noise(10_000)
    with site.client(site.coordinator.url) as client:
        manifest = sign_manifest(site.key, "adapter", site.round_id, chunk)
        state = client.session.read(UploadState, client.session.request("POST", "/v1/uploads", body=manifest))

        def put(span: str) -> dict[str, int]:
            first, _, last = span.partition("-")
            body = b"" if span == "*" else chunk[int(first) : int(last) + 1]
            headers = {"Content-Range": f"bytes {span}/10000"}
            path = f"/v1/uploads/{state.upload_id}/chunks/0"
            answer = client.session.request("PUT", path, body=body, headers=headers)
            return client.session.read(UploadState, answer).arrived

        assert put("*") == {}
        assert put("4000-7999") == {}, "a part beyond a gap is not kept"
        assert put("0-3999") == {"0": 4000}
        assert put("0-3999") == {"0": 4000}
        assert put("2000-5999") == {"0": 6000}
        assert put("*") == {"0": 6000}
        with pytest.raises(CoordinatorProblem, match="at least 1024"):
            put("6000-6001")
        with pytest.raises(CoordinatorProblem, match="beyond the body"):
            put("9000-10001")
        assert put("5000-9999") == {}
        assert put("0-3999") == {}
        assert site.upload(client, chunk).size_bytes == 10_000


def test_parts_that_do_not_make_the_announced_chunk_are_forgotten(site: UploadingSite) -> None:
    chunk = noise(10_000)
    with site.client(site.coordinator.url) as client:
        manifest = sign_manifest(site.key, "adapter", site.round_id, chunk)
        state = client.session.read(UploadState, client.session.request("POST", "/v1/uploads", body=manifest))
        path = f"/v1/uploads/{state.upload_id}/chunks/0"
        client.session.request("PUT", path, body=bytes(5000), headers={"Content-Range": "bytes 0-4999/10000"})
        with pytest.raises(CoordinatorProblem) as refused:
            client.session.request("PUT", path, body=chunk[5000:], headers={"Content-Range": "bytes 5000-9999/10000"})
        assert refused.value.code == "upload.chunk_digest"
        asked = client.session.request("PUT", path, body=b"", headers={"Content-Range": "bytes */10000"})
        assert client.session.read(UploadState, asked).arrived == {}
        assert site.upload(client, chunk).size_bytes == 10_000


def test_an_open_upload_can_be_taken_back_for_other_bytes(site: UploadingSite) -> None:
    with site.client(site.coordinator.url) as client:
        first = sign_manifest(site.key, "adapter", site.round_id, noise(5000, seed=1))
        state = client.session.read(UploadState, client.session.request("POST", "/v1/uploads", body=first))
        with pytest.raises(CoordinatorProblem) as refused:
            site.upload(client, noise(5000, seed=2))
        assert (refused.value.status, refused.value.code) == (409, "upload.differs")
        client.abandon_upload(state.upload_id)
        client.abandon_upload(state.upload_id)
        assert site.upload(client, noise(5000, seed=2)).size_bytes == 5000
        with pytest.raises(CoordinatorProblem, match="it was accepted for round 1 and stays"):
            site.upload(client, noise(5000, seed=1))
