"""The agent's folder: a killed process leaves a whole step behind or none. And its settings and status pages."""

import io
import json
import logging
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from fedmkt.local_server import serve_in_thread
from fedmkt.logs import configure_logs, hide_paths
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.status import Status, build_app
from fedmkt_client_agent.store import AgentState, AgentStore, RoundWork, StateUnreadable, write_atomically


def save(content: str) -> object:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "adapter").write_text(content)

    return write


@pytest.fixture
def store(tmp_path: Path) -> AgentStore:
    (tmp_path / "agent").mkdir()
    return AgentStore(tmp_path / "agent")


def parties(store: AgentStore) -> dict[str, str]:
    return {folder.name: (folder / "adapter").read_text() for folder in store.folder.glob("party-*")}


def test_a_new_folder_has_a_fresh_state(store: AgentStore) -> None:
    assert store.load() == AgentState()


def test_what_is_committed_is_found_again(store: AgentStore) -> None:
    state = AgentState(site_id="site_1", work=RoundWork(round_id="round_1", trained=True, uploaded=("knowledge",)))
    store.commit(state)
    assert AgentStore(store.folder).load() == state


def test_a_party_counts_from_the_commit_on(store: AgentStore) -> None:
    first = store.commit(store.save_party(AgentState(), save("one")))  # type: ignore[arg-type]  # a callable
    assert parties(store) == {"party-000001": "one"}
    second = store.save_party(first, save("two"))  # type: ignore[arg-type]
    assert parties(store) == {"party-000001": "one", "party-000002": "two"}
    assert store.party_folder(store.load()) == store.folder / "party-000001", "killed before the commit"
    assert parties(store) == {"party-000001": "one"}, "the leftover is gone"
    store.commit(store.save_party(first, save("two again")))  # type: ignore[arg-type]
    assert parties(store) == {"party-000002": "two again"}
    assert second.party_number == 2


def test_a_site_without_a_party_has_the_bare_base(store: AgentStore) -> None:
    assert store.party_folder(AgentState()) is None


def test_a_state_of_another_version_is_refused_and_kept(store: AgentStore) -> None:
    (store.folder / "state.json").write_text('{"version": 9, "novelty": 1}')
    with pytest.raises(StateUnreadable, match="1 fields that version 1 does not know"):
        store.load()
    assert (store.folder / "state.json").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")  # type: ignore[arg-type]  # the point of the test
    assert path.read_bytes() == b"old"


# ---------------------------------------------------------------------------------------------------------- settings


def settings(tmp_path: Path, **more: object) -> Settings:
    values = {"coordinator_url": "http://c", "model": "m", "private_file": tmp_path / "p.jsonl", **more}
    return Settings(**values)  # type: ignore[arg-type]


def test_settings_come_from_the_environment_and_are_overruled_by_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMKT_COORDINATOR_URL", "https://from.environment")
    monkeypatch.setenv("FEDMKT_TORCH_THREADS", "3")
    options: dict[str, object] = {"model": "m", "private_file": tmp_path / "p.jsonl", "torch_threads": 2}
    read = Settings(**options)  # type: ignore[arg-type]  # as the command line gives them
    assert (read.coordinator_url, read.torch_threads) == ("https://from.environment", 2)
    assert settings(tmp_path).torch_threads == 3


def test_one_torch_thread_is_the_default(tmp_path: Path) -> None:
    assert settings(tmp_path).torch_threads == 1


def test_the_enrolment_token_may_lie_in_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    waiting = settings(tmp_path, enrolment_token_file=tmp_path / "token")
    assert waiting.token() is None
    (tmp_path / "token").write_text("one-time\n")
    assert waiting.token() == "one-time"
    assert settings(tmp_path, enrolment_token="direct").token() == "direct"
    with pytest.raises(ValidationError, match="give the enrolment token once"):
        settings(tmp_path, enrolment_token="direct", enrolment_token_file=tmp_path / "token")


def test_paths_of_this_host_are_replaced_in_every_line_of_the_log(tmp_path: Path) -> None:
    stream = io.StringIO()
    before = list(logging.getLogger().handlers)
    hide_paths(settings(tmp_path, state_dir=tmp_path / "state", policy_file=tmp_path / "policy.toml").paths())
    try:
        handler = configure_logs("agent", stream=stream)
        try:
            (tmp_path / "p.jsonl").read_text()
        except OSError:
            logging.getLogger("fedmkt.test").exception("private.gone", extra={"at": str(tmp_path / "state" / "x")})
        assert handler in logging.getLogger().handlers
    finally:
        hide_paths({})
        logging.getLogger().handlers[:] = before
    line = stream.getvalue()
    assert "'(private text)'" in line
    assert '"(state folder)/x"' in line
    assert str(tmp_path / "p.jsonl") not in line


def test_the_enrolment_token_is_not_shown(tmp_path: Path) -> None:
    assert "direct" not in repr(settings(tmp_path, enrolment_token="direct"))


# ------------------------------------------------------------------------------------------------------------ status


def test_the_status_pages_show_where_the_work_stands() -> None:
    status = Status()
    status.update(state="working", site="north", round_number=3)
    status.progress("training on private text", 5, 40)
    with serve_in_thread(build_app(status)) as port:
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").json() == {"status": "ok"}
        shown = httpx.get(f"http://127.0.0.1:{port}/status").json()
    assert {key: shown[key] for key in ("state", "site", "round_number", "step", "done", "total")} == {
        "state": "working",
        "site": "north",
        "round_number": 3,
        "step": "training on private text",
        "done": 5,
        "total": 40,
    }


def test_a_state_has_its_reason_until_the_next_one() -> None:
    status = Status()
    status.update(state="failed", reason="disk full")
    since = status.view.since
    status.update(state="failed", reason="disk still full")
    assert status.view.since == since
    status.update(state="waiting")
    assert status.view.reason == ""
    assert status.view.since > since


def test_progress_is_logged_when_a_step_begins_and_not_at_every_call(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    status = Status()
    for done in range(100):
        status.progress("one", done, 100)
    status.progress("two", 0, 1)
    assert [record.__dict__["step"] for record in caplog.records] == ["one", "two"]
    assert json.dumps([record.__dict__["done"] for record in caplog.records]) == "[0, 0]"
