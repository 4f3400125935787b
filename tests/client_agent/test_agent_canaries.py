"""Strings planted in private text, in names and in paths turn up in nothing that an agent sends, says or shows.

A real agent process at log level DEBUG, through a CONNECT proxy and TLS with an authority of its own; what passes is
recorded inside the encryption. It meets a malformed private file, an unexpected error, kill -9 and a training that
diverges, and joins a whole round.
"""

import base64
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard
from safetensors.numpy import load_file, save_file

from agent_process import agent_process
from agent_world import World
from fedmkt.codec import DEFAULT_LIMITS, split_frames
from fedmkt.protocol import PublicSetConfig, Schedule
from fedmkt_client_agent.ledger import FILE_NAME, read_ledger
from live_coordinator import tiny_config
from tiny_models import save_tiny, story
from tls_proxy import Authority, ForwardProxy, TlsFront, listening

pytestmark = [pytest.mark.services, pytest.mark.e2e, pytest.mark.timeout(900)]

CANARIES = {
    "text": "Zwirbelkauz",
    "prompt": "Quastenmolch",
    "completion": "Flitterpirol",
    "id": "MRN-7700-1234",
    "domain": "Oncologia-Ward-Nine",
    "column": "Patient-Of-Doctor-Grimm",
    "file": "discharge-letters-mueller",
    "folder": "radiology-confidential",
}
SCHEDULE = Schedule(quorum=1, collect_timeout_s=900, distill_timeout_s=120, apply_timeout_s=900)


def records() -> list[dict[str, Any]]:
    """Forty private samples, each with canaries in its text, its id, its domain and a column that nobody asked for."""
    extra = {"domain": CANARIES["domain"], "doctor": CANARIES["column"]}
    texts = [
        {"id": f"{CANARIES['id']}-{number}", "text": f"{CANARIES['text']} {story(number)} {CANARIES['text']}", **extra}
        for number in range(20)
    ]
    pairs = [
        {"id": f"{CANARIES['id']}-{number}", "prompt": f"{CANARIES['prompt']} {number}? ", **extra}
        | {"completion": f"{CANARIES['completion']} {story(number)}"}
        for number in range(20, 40)
    ]
    return [*texts, *pairs]


def forms(canary: str) -> Iterator[bytes]:
    """How a string may look on a wire: as it is, two bytes a letter, hexadecimal, base64 at any offset."""
    yield canary.encode()
    yield canary.lower().encode()
    yield canary.encode("utf-16-le")
    yield canary.encode().hex().encode()
    for offset in range(3):
        encoded = base64.b64encode(b"\0" * offset + canary.encode())
        yield encoded[4 if offset else 0 : -4]  # the ends depend on the neighbours


def found_in(data: bytes) -> dict[str, bytes]:
    return {name: form for name, canary in CANARIES.items() for form in forms(canary) if form in data}


def approve(state_dir: Path) -> None:
    command = [sys.executable, "-m", "fedmkt_client_agent", "approve", "--state-dir", str(state_dir)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)


def unpacked(blob: bytes) -> bytes:
    """Everything in a knowledge blob, decompressed."""
    return b"".join(zstandard.ZstdDecompressor().decompress(frame) for frame in split_frames(blob, DEFAULT_LIMITS))


def poison(folder: Path) -> None:
    """From its first step on, this model's training diverges."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "ln_f" in name)
    weights[name][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / CANARIES["folder"]
    made.mkdir()
    save_tiny(made / "model", "gpt2")
    (made / "policy.toml").write_text("require_approval = true\n")
    return made


def options_of(folder: Path, url: str, state: str) -> dict[str, str]:
    return {
        "coordinator": url,
        "enrolment-token-file": str(folder / f"token-{state}"),
        "model": str(folder / "model"),
        "private": str(folder / f"{CANARIES['file']}.jsonl"),
        "policy": str(folder / "policy.toml"),
        "state-dir": str(folder / state),
        "status-port": "0",
        "log-level": "DEBUG",
    }


def test_no_planted_string_leaves_or_is_logged_whatever_goes_wrong(world: World, folder: Path, tmp_path: Path) -> None:
    authority, proxy = Authority(tmp_path), ForwardProxy()
    front = TlsFront(authority.server_context(), world.coordinator.port)
    said: list[bytes] = []
    with ExitStack() as stack:
        port = stack.enter_context(listening(front.answer))
        proxy_port = stack.enter_context(listening(proxy.answer))
        environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HTTPS_PROXY": f"http://127.0.0.1:{proxy_port}",
            "SSL_CERT_FILE": str(authority.file),
            "HF_HUB_OFFLINE": "1",
        }
        url = f"https://localhost:{port}"
        said += whole_round(world, folder, url, environment)
        said += diverging(world, folder, url, environment)
    sent = b"\n".join(map(bytes, front.sent))
    blob = (folder / "state" / "outbox" / "knowledge").read_bytes()
    assert blob in sent, "knowledge went this way"
    assert set(proxy.asked) == {f"CONNECT localhost:{port}"}, "and no other"
    private = (folder / f"{CANARIES['file']}.jsonl").read_bytes()
    assert set(found_in(private)) >= {"text", "prompt", "completion", "id", "domain", "column"}, "the search finds"
    assert found_in(sent) == {}
    assert found_in(unpacked(blob)) == {}
    assert found_in(b"\n".join(map(bytes, front.answered))) == {}, "nor does the coordinator know them"
    assert found_in(b"".join(said)) == {}
    assert str(folder).encode() not in b"".join(said)


def whole_round(world: World, folder: Path, url: str, environment: dict[str, str]) -> Iterable[bytes]:
    """A malformed file, an unexpected error and kill -9 on the way; what the agent said and showed."""
    federation_id = world.begin(tiny_config(("north",), name="canaries", schedule=SCHEDULE))
    (folder / "token-state").write_text(world.coordinator.enrolment_token(federation_id, "north"))
    file, state_dir = folder / f"{CANARIES['file']}.jsonl", folder / "state"
    lines = [json.dumps(record) for record in records()]
    file.write_text("\n".join([*lines, '{"text": "' + CANARIES["text"]]) + "\n")
    options = options_of(folder, url, "state")
    fault = {"FEDMKT_FAULT_POINT": "kill agent.knowledge.begun 1"}
    with agent_process(options, environment | fault) as agent:
        agent.until_said("agent.trouble", state="private_text_refused")
        shown = httpx.get(f"{address(state_dir)}/status", trust_env=False).content
        assert b"line 41 is not JSON" in shown
        file.write_text("\n".join(lines) + "\n")
        world.until_ready(federation_id, "north", timeout_s=240)
        world.request(federation_id)
        agent.until_said("round.withheld", state="awaiting_approval")
        pending = state_dir / "outbox" / "knowledge"
        kept = pending.read_bytes()
        pending.unlink()
        pending.mkdir()
        agent.until_said("agent.trouble", reason="IsADirectoryError EISDIR")
        shown += httpx.get(f"{address(state_dir)}/status", trust_env=False).content
        pending.rmdir()
        pending.write_bytes(kept)
        approve(state_dir)
        assert agent.ended(240) == -signal.SIGKILL
    entries = [entry for entry in read_ledger(state_dir / FILE_NAME) if entry.kind == "knowledge"]
    assert [entry.event for entry in entries] == ["begun"], "in the ledger before anything left"
    assert world.coordinator.rounds(federation_id)[0].sites[0].state == "expected", "and nothing had left"
    with agent_process(options, environment) as again:
        (finished,) = world.coordinator.wait_for_rounds(federation_id, 1, timeout_s=240)
        assert finished.sites[0].state == "applied"
        assert again.end() == 0
    receipts = [each.receipt_id for each in read_ledger(state_dir / FILE_NAME) if each.kind == "knowledge"]
    assert receipts[:2] == [None, None]
    assert receipts[2] is not None
    return [shown, *agent.lines, *again.lines]


def diverging(world: World, folder: Path, url: str, environment: dict[str, str]) -> Iterable[bytes]:
    """A model whose every loss is NaN."""
    poison(folder / "model")
    nothing_held_out = PublicSetConfig(slices=2, holdout_share=0)
    config = tiny_config(("north",), name="diverging", schedule=SCHEDULE, public_set=nothing_held_out)
    federation_id = world.begin(config)
    (folder / "token-nan").write_text(world.coordinator.enrolment_token(federation_id, "north"))
    with agent_process(options_of(folder, url, "nan"), environment) as agent:
        world.until_ready(federation_id, "north", timeout_s=240)
        world.request(federation_id)
        agent.until_said("private.diverged")
        agent.until_said("agent.trouble", state="failed")
        assert agent.end() == 0
    with world.coordinator.client() as operator:
        operator.cancel_rounds(federation_id)
    return agent.lines


def address(state_dir: Path) -> str:
    at = json.loads((state_dir / "status.json").read_bytes())
    return f"http://{at['host']}:{at['port']}"


@pytest.mark.parametrize("form", range(7))
def test_the_search_knows_a_string_in_every_form(form: int) -> None:
    canary = CANARIES["text"]
    around = [
        canary.encode(),
        canary.lower().encode(),
        canary.encode("utf-16-le"),
        canary.encode().hex().encode(),
        *(base64.b64encode(b"x" * offset + canary.encode() + b"more of it") for offset in range(3)),
    ]
    assert set(found_in(b"before" + around[form] + b"after")) == {"text"}
    assert not re.search(canary.encode(), b"nothing")
