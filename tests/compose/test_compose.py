"""The compose file, tried on a real Docker engine: the demo federation finishes a round, and the walls hold.

It builds images and runs for minutes, so `make compose-test` alone runs it; without an engine it skips and says why.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedmkt.client import CoordinatorClient, StaticToken
from fedmkt.protocol import RoundView

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FEDERATION = ("--project-directory", str(REPOSITORY), "--file", str(REPOSITORY / "docker-compose.yml"))
BUILD_TIMEOUT_S = 1800
ROUND_TIMEOUT_S = 1500.0
SITES = ("algebra", "graphs", "numerics", "reference")

INSTALLED = """
import importlib.metadata as m, re
for d in m.distributions():
    print(re.sub(r"[-_.]+", "-", d.name).lower() + "==" + d.version.partition("+")[0])
"""


@dataclass(frozen=True)
class Stack:
    """One compose project under a name and port of its own."""

    project: str
    port: int

    def compose(
        self, *arguments: str, timeout_s: float = 120, check: bool = True, show: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker compose` on this stack. `check`: a failure fails the test. `show`: nothing is captured."""
        done = subprocess.run(
            ["docker", "compose", *FEDERATION, "--project-name", self.project, *arguments],
            env={**os.environ, "FEDMKT_PUBLISHED_PORT": str(self.port), "FEDMKT_DEMO_ROUNDS": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=not show,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"docker compose {' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
            )
        return done

    def client(self) -> CoordinatorClient:
        """The API as the viewer sees it, through the one published port."""
        token = self.compose("exec", "-T", "coordinator", "cat", "/secrets/fedmkt_viewer_token").stdout
        return CoordinatorClient(f"http://127.0.0.1:{self.port}", StaticToken(token))


def why_not() -> str | None:
    """Why no stack can run here, or None."""
    if os.environ.get("FEDMKT_COMPOSE_TEST") != "1":
        return "builds images and runs a stack: `make compose-test` runs it"
    if shutil.which("docker") is None:
        return "docker is not installed"
    for command, missing in (
        (["docker", "info"], "no Docker engine answers"),
        (["docker", "compose", "version"], "docker has no compose plugin (v2)"),
    ):
        if subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0:
            return missing
    return None


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Built and started, removed with its volumes afterwards; its logs are printed before that."""
    if reason := why_not():
        pytest.skip(reason)
    with socket.create_server(("127.0.0.1", 0)) as free:
        stack = Stack(f"fedmkt-test-{os.getpid()}", free.getsockname()[1])
    try:
        print("compose-test: images", flush=True)
        stack.compose("build", "--quiet", timeout_s=BUILD_TIMEOUT_S, show=True)
        print("compose-test: up", flush=True)
        stack.compose("up", "--detach", timeout_s=BUILD_TIMEOUT_S, show=True)
        yield stack
    finally:
        print(stack.compose("ps", "--all", check=False).stdout)
        print(stack.compose("logs", "--no-color", "--tail", "25", check=False).stdout)
        stack.compose("down", "--volumes", "--timeout", "10", timeout_s=300)


@pytest.fixture(scope="module")
def finished(stack: Stack) -> RoundView:
    """The first round, in its last state."""
    started = time.monotonic()
    with stack.client() as client:
        shown = ""
        while time.monotonic() - started < ROUND_TIMEOUT_S:
            for federation in client.federations():
                rounds = client.rounds(federation.federation_id).items
                now = rounds[0].state if rounds else "; ".join(federation.waits_for)
                if now != shown:
                    print(f"compose-test: {time.monotonic() - started:4.0f} s {now}", flush=True)
                    shown = now
                if rounds and rounds[0].state in ("completed", "failed", "cancelled"):
                    return rounds[0]
            time.sleep(2)
    pytest.fail(f"no round ended within {ROUND_TIMEOUT_S:g} s; last seen: {shown}")


def test_the_demo_federation_completes_its_first_round(finished: RoundView) -> None:
    assert (finished.state, finished.reason) == ("completed", None)
    assert sorted(site.site for site in finished.sites) == list(SITES)
    assert {site.state for site in finished.sites} == {"applied"}
    assert finished.llm_result is not None
    assert finished.llm_result.refused_sites == {}


def test_an_operator_can_follow_the_rounds_on_the_terminal(stack: Stack, finished: RoundView) -> None:
    assert "round 1: completed" in stack.compose("run", "--rm", "-T", "watch").stdout


def test_every_long_running_service_is_healthy(stack: Stack, finished: RoundView) -> None:
    lines = stack.compose("ps", "--all", "--format", "json").stdout.splitlines()
    state = {row["Service"]: (row["State"], row["Health"] or row["ExitCode"]) for row in map(json.loads, lines)}
    once = {"secrets", "demo-models", "demo-federation"}
    assert {name for name in state if name in once} == once
    assert {state[name] for name in once} == {("exited", 0)}
    assert {name: seen for name, seen in state.items() if name not in once and seen != ("running", "healthy")} == {}


def test_only_the_coordinator_is_published_and_only_on_this_machine(stack: Stack) -> None:
    services = json.loads(stack.compose("config", "--format", "json").stdout)["services"]
    published = {
        (name, port["host_ip"], port["target"])
        for name, service in services.items()
        for port in service.get("ports", [])
    }
    assert published == {("coordinator", "127.0.0.1", 8700)}


@pytest.mark.parametrize("service", ["coordinator", "llm-server", "algebra"])
def test_an_image_holds_the_pinned_versions_and_no_others(stack: Stack, service: str) -> None:
    listing = stack.compose("exec", "-T", service, "python", "-c", INSTALLED).stdout
    pinned = set((REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines())
    unpinned = {line for line in listing.splitlines() if line not in pinned}
    names = {line.partition("==")[0] for line in unpinned}
    of_cuda = {name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"}  # torch pins these
    of_the_base_image = {"pip", "setuptools", "wheel"}
    assert names - of_cuda - of_the_base_image == {"fedmkt"}


def test_the_coordinators_image_holds_no_torch_and_runs_without_privileges(stack: Stack) -> None:
    program = "import importlib.util, os; print(importlib.util.find_spec('torch'), os.getuid())"
    assert stack.compose("exec", "-T", "coordinator", "python", "-c", program).stdout.split() == ["None", "10001"]
    for service in ("llm-server", *SITES):
        assert stack.compose("exec", "-T", service, "id", "-u").stdout.strip() == "10001"


@pytest.mark.parametrize(("host", "port"), [("postgres", 5432), ("redis", 6379)])
def test_a_site_reaches_the_coordinator_and_nothing_behind_it(stack: Stack, host: str, port: int) -> None:
    reach = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 3)"
    assert stack.compose("exec", "-T", "algebra", "python", "-c", reach, "coordinator", "8700").returncode == 0
    refused = stack.compose("exec", "-T", "algebra", "python", "-c", reach, host, str(port), check=False)
    assert "gaierror" in refused.stderr


def test_a_site_sees_no_other_sites_text_and_no_credential_but_its_own(stack: Stack) -> None:
    search = "find / -name private.jsonl 2> /dev/null; find /secrets -type f"
    found = stack.compose("exec", "-T", "algebra", "sh", "-c", search, check=False)
    assert found.stdout.split() == ["/site/private.jsonl"]
