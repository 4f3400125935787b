"""Ways to the coordinator: through proxies, with a certificate authority of one's own, while it cannot be found."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fault_proxy import Fault, proxied
from fedmkt.client import CoordinatorClient, CoordinatorUnreachable, RetryPolicy
from live_coordinator import LiveCoordinator
from network_world import PATIENT, noise, worker_at
from tls_proxy import Authority, ForwardProxy, head_of, listening

pytestmark = [pytest.mark.services, pytest.mark.timeout(60)]

QUICKLY = RetryPolicy(first_wait_s=0.01, max_wait_s=0.05, patience_s=0.3)
VERSION = json.dumps({"version": "9.9.9", "protocol_version": 1}).encode()


# ------------------------------------------------------------------------------------------------ servers


def say_version(connection: socket.socket) -> None:
    head_of(connection)
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(VERSION)}\r\n"
    connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + VERSION)


@contextmanager
def tls_coordinator(authority: Authority) -> Iterator[int]:
    context = authority.server_context()

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            say_version(secure)

    with listening(answer) as port:
        yield port


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# ------------------------------------------------------------------------------------------------ the tests


def test_a_certificate_of_an_own_authority_is_trusted_when_it_is_named(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_coordinator(authority) as port:
        with (
            CoordinatorClient(f"https://localhost:{port}", retry=QUICKLY) as client,
            pytest.raises(CoordinatorUnreachable, match=r"CERTIFICATE_VERIFY_FAILED.*check .* the certificate"),
        ):
            client.version()
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        with CoordinatorClient(f"https://localhost:{port}", retry=QUICKLY) as client:
            assert client.version().version == "9.9.9"


def test_https_goes_through_the_proxy_that_is_named_and_stays_end_to_end(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ForwardProxy()
    with tls_coordinator(authority) as port, listening(proxy.answer) as proxy_port:
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy_port}")
        with CoordinatorClient(f"https://localhost:{port}", retry=QUICKLY) as client:
            assert client.version().version == "9.9.9"
        assert proxy.asked == [f"CONNECT localhost:{port}"]
        monkeypatch.setenv("NO_PROXY", "localhost")
        with CoordinatorClient(f"https://localhost:{port}", retry=QUICKLY) as client:
            assert client.version().version == "9.9.9"
        assert len(proxy.asked) == 1


def test_http_goes_through_the_proxy_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ForwardProxy()
    with listening(say_version) as port, listening(proxy.answer) as proxy_port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy_port}")
        with CoordinatorClient(f"http://localhost:{port}", retry=QUICKLY) as client:
            assert client.version().version == "9.9.9"
    assert proxy.asked == [f"GET http://localhost:{port}/version"]


def test_a_coordinator_that_refuses_connections_for_a_while_is_found(coordinator: LiveCoordinator) -> None:
    with proxied(coordinator.port) as line, worker_at(line.url) as worker:
        there, line.upstream = line.upstream, _nobody()
        threading.Timer(0.5, lambda: setattr(line, "upstream", there)).start()
        assert worker.put_artifact(noise(5000))
        assert line.connections > 1


def test_a_name_that_resolves_late_and_slowly_is_waited_for(
    coordinator: LiveCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = socket.getaddrinfo, threading.Event()
    answers = iter(["gone", "gone", "slow"])

    def resolve(host: Any, *arguments: Any, **more: Any) -> Any:
        if host == "coordinator.example.org":
            how = next(answers, "here")
            if how == "gone":
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            if how == "slow":
                asked.wait(0.5)
            host = "127.0.0.1"
        return real(host, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)  # no name server of the test's own can be named to the system
    with CoordinatorClient(f"http://coordinator.example.org:{coordinator.port}", retry=PATIENT) as client:
        assert client.version().protocol_version == 1
    assert next(answers, "none left") == "none left"


def test_an_answer_that_trickles_in_for_ever_is_given_up() -> None:
    def trickle(connection: socket.socket) -> None:
        head_of(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        never = threading.Event()
        while not never.wait(0.05):
            connection.sendall(b" ")

    with (
        listening(trickle) as port,
        CoordinatorClient(f"http://127.0.0.1:{port}", retry=QUICKLY, timeout_s=0.2) as client,
        pytest.raises(CoordinatorUnreachable, match="the answer did not end within 1 s"),
    ):
        client.version()


def test_a_connection_that_opens_and_stays_silent_is_given_up() -> None:
    with (
        listening(
            lambda connection: (connection.recv(1) and connection.settimeout(None)) or connection.recv(10**6)
        ) as port,
        proxied(port, *[Fault("half_open", up=1)] * 100) as line,
        CoordinatorClient(line.url, retry=QUICKLY, timeout_s=0.2) as client,
        pytest.raises(CoordinatorUnreachable, match="timed out"),
    ):
        client.version()


def _nobody() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
