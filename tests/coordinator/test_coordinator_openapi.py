"""The API's description: complete, valid, and true of every problem that the tests get."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from coordinator_servers import undocumented
from coordinator_world import World
from fedmkt.errors import Refusal
from fedmkt.protocol import ProblemList
from fedmkt_coordinator import rounds
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.description import TAGS
from fedmkt_coordinator.refusals import Raised, raised_by
from fedmkt_coordinator.settings import Settings

Document = dict[str, Any]
Operation = tuple[str, str, Document]
STATUS = {"get": {"200"}, "post": {"200", "201", "202", "204"}, "put": {"200", "204"}, "delete": {"204"}}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Document:
    document = create_app(Settings(state_dir=tmp_path_factory.mktemp("state"))).openapi()
    return dict(json.loads(json.dumps(document)))


def operations(api: Document) -> Iterator[Operation]:
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def contents(operation: Document) -> Iterator[tuple[str, str, Document]]:
    """(where, media type, content) of the request's body and of every answer."""
    for where, part in (("request", operation.get("requestBody", {})), *operation["responses"].items()):
        for media_type, content in part.get("content", {}).items():
            yield where, media_type, content


def test_every_operation_says_what_it_does_and_for_whom(api: Document) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(api)]
    assert len(ids) == len(set(ids)) >= 51
    for method, path, operation in operations(api):
        where = f"{method} {path}"
        assert re.fullmatch(r"[a-z_]+", operation["operationId"]), where
        assert len(operation["summary"]) <= 90, where
        text, _, who = operation["description"].partition("\n\nFor: ")
        assert text, f"{where} has no docstring"
        assert who.endswith("."), where
        assert (operation["security"] == []) == (who == "anyone."), where
        assert set(operation["tags"]) <= TAGS.keys(), where
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] != "path" or "example" in parameter, f"{where}: {parameter['name']}"
    assert {tag["name"] for tag in api["tags"]} == {tag for _, _, each in operations(api) for tag in each["tags"]}


def test_every_example_is_there_and_valid(api: Document) -> None:
    checked = 0
    for method, path, operation in operations(api):
        for where, media_type, content in contents(operation):
            examples = [each["value"] for each in content.get("examples", {}).values()] or [content.get("example")]
            assert examples != [None], f"{method} {path} {where} {media_type} has no example"
            schema = {**content["schema"], "components": api["components"]}
            validator = jsonschema_rs.validator_for(schema, validate_formats=True)
            for example in examples:
                validator.validate(example)
                checked += 1
        for parameter in operation.get("parameters", ()):
            if "example" in parameter:
                jsonschema_rs.validator_for(parameter["schema"]).validate(parameter["example"])
    assert checked > 500


def test_every_operation_names_its_answers_and_problems(api: Document) -> None:
    for method, path, operation in operations(api):
        where = f"{method} {path}"
        answers = operation["responses"]
        assert "default" not in answers, where
        assert answers.keys() & STATUS[method], where
        assert "500" in answers, where
        if operation["security"]:
            assert {"401", "403", "429"} <= answers.keys(), where
            assert "WWW-Authenticate" in answers["401"]["headers"], where
        for status, answer in answers.items():
            assert "FedMKT-Protocol" in answer["headers"], where
            if int(status) >= 400 and path != "/readyz":
                assert list(answer["content"]) == ["application/problem+json"], where


def test_conditions_ranges_and_keys_are_declared(api: Document) -> None:
    polled = {
        "/v1/federations",
        "/v1/federations/{federation_id}",
        "/v1/federations/{federation_id}/rounds",
        "/v1/federations/{federation_id}/events",
        "/v1/federations/{federation_id}/adapters",
        "/v1/rounds/{round_id}",
        "/v1/me",
    }
    for path in polled | {"/v1/artifacts/{digest}"}:
        operation = api["paths"][path]["get"]
        assert "If-None-Match" in headers_asked(operation), path
        assert {"ETag", "Cache-Control"} <= operation["responses"]["200"]["headers"].keys(), path
        assert "ETag" in operation["responses"]["304"]["headers"], path
    artifact = api["paths"]["/v1/artifacts/{digest}"]["get"]
    assert {"Range", "If-Range"} <= headers_asked(artifact)
    assert "Content-Range" in artifact["responses"]["206"]["headers"]
    assert "Content-Range" in artifact["responses"]["416"]["headers"]
    for path in ("/v1/federations/{federation_id}/rounds", "/v1/jobs/{job_id}/claim"):
        assert "idempotency-key" in headers_asked(api["paths"][path]["post"])
    stream = api["paths"]["/v1/federations/{federation_id}/events/stream"]["get"]
    assert "last-event-id" in headers_asked(stream)
    assert list(stream["responses"]["200"]["content"]) == ["text/event-stream"]
    for _, path, operation in operations(api):
        assert ("FedMKT-Protocol" in headers_asked(operation)) == path.startswith("/v1/"), path
    message = api["webhooks"]["event"]["post"]
    assert {"webhook-id", "webhook-timestamp", "webhook-signature"} <= headers_asked(message)


def headers_asked(operation: Document) -> set[str]:
    return {each["name"] for each in operation.get("parameters", ()) if each["in"] == "header"}


# ------------------------------------------------------------------------------------------------ refusals


class Plain(Refusal):
    code = "test.plain"


class Caught(Refusal):
    code = "test.caught"


TABLE = {"a": (Plain, "remedy"), "b": (Caught, "remedy")}


def plain(count: int) -> None:
    raise Plain(f"{count} are there, at most {count + 1} may be")


class Holder:
    def __init__(self, other: "Other") -> None:
        self._other = other

    def go(self) -> None:
        self._other.fails()


class Other:
    def fails(self) -> None:
        raise Caught("never")

    @property
    def holder(self) -> Holder:
        return Holder(self)


def through_fields(other: Other) -> None:
    other.holder.go()


def through_a_local() -> None:
    made = Other()
    made.fails()


def changed_on_the_way() -> None:
    try:
        Other().fails()
    except Caught as error:
        raise Plain("instead") from error


def passed_on() -> None:
    try:
        Other().fails()
    except Caught:
        raise


def from_a_table(name: str) -> None:
    refusal, remedy = TABLE[name]
    raise refusal(remedy)


def handed_over() -> None:
    def inner() -> None:
        for each in map(plain, [1]):
            assert each is None

    inner()


@pytest.fixture
def here_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmkt_coordinator.refusals.OURS", __name__)


@pytest.mark.usefixtures("here_counts")
@pytest.mark.parametrize(
    ("function", "codes"),
    [
        (plain, {"test.plain"}),
        (through_fields, {"test.caught"}),
        (through_a_local, {"test.caught"}),
        (changed_on_the_way, {"test.plain"}),
        (passed_on, {"test.caught"}),
        (from_a_table, {"test.plain", "test.caught"}),
        (handed_over, {"test.plain"}),
    ],
)
def test_refusals_are_read_from_the_source(function: Any, codes: set[str]) -> None:
    assert {each.refusal.code for each in raised_by(function)} == codes


@pytest.mark.usefixtures("here_counts")
def test_source_that_is_not_installed_is_no_description_without_problems(tmp_path: Path) -> None:
    made: dict[str, Any] = {"__name__": __name__, "Plain": Plain}
    exec(compile("def of_bytecode_alone():\n    raise Plain('unseen')\n", tmp_path / "gone.py", "exec"), made)
    with pytest.raises(OSError, match="could not get source code"):
        raised_by(made["of_bytecode_alone"])


def test_the_message_keeps_its_words() -> None:
    assert raised_by(plain) == {Raised(Plain, "... are there, at most ... may be")}
    said = [each.message for each in raised_by(rounds.report) if each.refusal is rounds.ReportDiffers]
    assert said == ["site ... reported on round ... before, and differently"]


@pytest.mark.anyio
@pytest.mark.services
async def test_every_code_is_listed_with_what_to_do(world: World, api: Document) -> None:
    listed = await world.ask(ProblemList, "GET", "/v1/problems", None)
    codes = {
        code
        for _, _, operation in operations(api)
        for _, media_type, content in contents(operation)
        if media_type == "application/problem+json"
        for code in content["examples"]
    }
    assert {each.code for each in listed.items} == codes
    assert len(codes) > 70
    assert [each.code for each in listed.items if not any(each.details)] == []
    closed = next(each for each in listed.items if each.code == "round.closed")
    assert (closed.status, closed.title) == (409, "The round takes no more uploads")
    assert "uploads are taken while it is collecting" in closed.details[0]


@pytest.mark.anyio
@pytest.mark.services
async def test_a_problem_that_is_not_described_would_be_found(world: World) -> None:
    """Every world of the tests checks each problem that it gets in this way."""
    answer = await world.send("GET", "/v1/federations/fed_0", "viewer")
    assert undocumented(world.app, answer.request, answer.json()) is None
    found = undocumented(world.app, answer.request, {**answer.json(), "code": "round.closed"})
    assert found == "GET /v1/federations/{federation_id} answers 404 round.closed, which its description does not name"


def test_the_page_of_the_guide_on_problems_names_no_code_that_is_none(api: Document) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "api.md"
    named = set(re.findall(r"`([a-z_]+\.[a-z_]+)`: ", page.read_text()))
    assert all(f'"{code}"' in json.dumps(api) for code in named)
