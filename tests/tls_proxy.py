"""What stands between a site and its coordinator: a certificate authority of one's own, TLS, a forward proxy."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


class Authority:
    """A certificate authority that nobody else trusts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "A hospital's own authority")])
        certificate = self._signed(self._name, self._key, authority=True)
        self.file = folder / "authority.pem"
        self.file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def server_context(self) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "coordinator")])
        pem = self._signed(name, key, authority=False).public_bytes(Encoding.PEM)
        pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (self._folder / "server.pem").write_bytes(pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._folder / "server.pem")
        return context

    def _signed(self, name: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        now = datetime.now(UTC)
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(names, critical=False)
            .add_extension(own, critical=False)
            .add_extension(issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )


@contextmanager
def listening(answer: Any) -> Iterator[int]:
    """`answer(connection)` in a thread for each connection; yields the port."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:  # closed: the test has ended
                    return
                threading.Thread(target=quietly, args=(connection,), daemon=True).start()

        def quietly(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.settimeout(10)
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def head_of(connection: socket.socket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(4096)
    return head


class ForwardProxy:
    """A real forward proxy: tunnels by CONNECT, passes on what is asked of it by whole address; notes both."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, connection: socket.socket) -> None:
        head = head_of(connection)
        method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
        self.asked.append(f"{method} {target}")
        address = target if method == "CONNECT" else target.removeprefix("http://").partition("/")[0]
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), 10) as server:
            if method == "CONNECT":
                connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            else:
                server.sendall(head.replace(f"http://{address}".encode(), b"", 1))
            back = threading.Thread(target=pump, args=(server, connection), daemon=True)
            back.start()
            pump(connection, server)
            back.join(10)


def pump(source: socket.socket, target: socket.socket, kept: bytearray | None = None) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            if kept is not None:
                kept += data
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@dataclass
class TlsFront:
    """TLS before a plain coordinator; keeps everything that passes, as it is inside the encryption."""

    context: ssl.SSLContext
    upstream: int
    sent: list[bytearray] = field(default_factory=list)  # by each connection's client
    answered: list[bytearray] = field(default_factory=list)

    def answer(self, connection: socket.socket) -> None:
        connection.settimeout(300)
        up, down = bytearray(), bytearray()
        self.sent.append(up)
        self.answered.append(down)
        with (
            self.context.wrap_socket(connection, server_side=True) as secure,
            socket.create_connection(("127.0.0.1", self.upstream), 10) as server,
        ):
            server.settimeout(300)
            back = threading.Thread(target=pump, args=(server, secure, down), daemon=True)
            back.start()
            pump(secure, server, up)
            back.join(10)
