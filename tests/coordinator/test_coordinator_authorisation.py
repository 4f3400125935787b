"""The authorisation matrix: every route that the application has, every caller, own and foreign federation.

Routes are read from the application itself. One without a rule in RULES fails, and so does a rule without a route.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.dependencies.models import Dependant
from pydantic import BaseModel
from starlette.routing import Route

from coordinator_world import TOKENS, SiteUnderTest, World, a_report, config
from fedmkt.protocol import EnrolmentTokenRequest
from fedmkt.signing import sign_manifest
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.security import Allow
from fedmkt_coordinator.settings import Settings

pytestmark = pytest.mark.anyio
services = pytest.mark.services

# The description of the API itself, which the framework serves.
DESCRIPTIONS = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}

Body = Callable[["Stage", SiteUnderTest], BaseModel | bytes]


@dataclass(frozen=True)
class Rule:
    """Who may call a route. `foreign`: what a site of another federation hears, where the request names a thing of this
    one; None where it names nothing, so that a site can only ask about itself. `last`: it ends what others act on.
    """

    roles: frozenset[str]
    foreign: str | None = None
    body: Body | None = None
    last: bool = False


def may(*roles: str, foreign: str | None = None, body: Body | None = None, last: bool = False) -> Rule:
    return Rule(frozenset(roles), foreign, body, last)


@dataclass
class Stage:
    """A round that collects, an upload that is open, and everybody who may knock."""

    world: World
    places: dict[str, str]  # what stands for {federation_id} and the like
    callers: dict[str, str | None]  # name -> token
    own: SiteUnderTest
    stranger: SiteUnderTest


def manifest(stage: Stage, site: SiteUnderTest) -> BaseModel:
    return sign_manifest(site.key, "knowledge", stage.places["round_id"], b"bytes of " + site.site_id.encode())


def report(stage: Stage, site: SiteUnderTest) -> BaseModel:
    return a_report()


PUBLIC = may("anyone")
OPERATOR = may("operator")
READERS = may("operator", "viewer", "worker")
WORKER = may("worker")
SITE = may("site")
UPLOAD = may("site", foreign="upload.unknown")
FEDERATION = "/v1/federations/{federation_id}"
RULES: dict[tuple[str, str], Rule] = {
    ("GET", "/healthz"): PUBLIC,
    ("GET", "/readyz"): PUBLIC,
    ("GET", "/version"): PUBLIC,
    ("GET", "/metrics"): may("operator", "viewer"),
    ("GET", "/v1/keys"): PUBLIC,
    ("GET", "/v1/problems"): PUBLIC,
    ("POST", "/v1/enrol"): PUBLIC,
    ("POST", "/v1/token"): PUBLIC,
    ("GET", "/v1/audit"): OPERATOR,
    ("GET", "/v1/audit/head"): OPERATOR,
    ("POST", "/v1/federations"): OPERATOR,
    ("GET", "/v1/federations"): READERS,
    ("GET", FEDERATION): READERS,
    ("PUT", f"{FEDERATION}/public-set"): OPERATOR,
    ("PUT", f"{FEDERATION}/llm"): WORKER,
    ("GET", f"{FEDERATION}/adapters"): READERS,
    ("GET", f"{FEDERATION}/adapters/{{version}}"): READERS,
    ("GET", f"{FEDERATION}/adapters/{{version}}/folder"): may("operator", "worker"),
    ("POST", f"{FEDERATION}/adapters/{{version}}/promote"): OPERATOR,
    ("POST", f"{FEDERATION}/adapters/{{version}}/rollback"): OPERATOR,
    ("POST", f"{FEDERATION}/enrolment-tokens"): OPERATOR,
    ("POST", f"{FEDERATION}/sites/{{name}}/revoke"): may("operator", last=True),
    ("POST", f"{FEDERATION}/rounds"): OPERATOR,
    ("GET", f"{FEDERATION}/rounds"): READERS,
    ("POST", f"{FEDERATION}/rounds/pause"): OPERATOR,
    ("POST", f"{FEDERATION}/rounds/resume"): OPERATOR,
    ("POST", f"{FEDERATION}/rounds/cancel"): may("operator", last=True),
    ("GET", f"{FEDERATION}/events"): READERS,
    ("GET", f"{FEDERATION}/events/stream"): READERS,
    ("GET", f"{FEDERATION}/webhooks"): OPERATOR,
    ("POST", f"{FEDERATION}/webhooks"): OPERATOR,
    ("DELETE", f"{FEDERATION}/webhooks/{{webhook_id}}"): OPERATOR,
    ("POST", f"{FEDERATION}/webhooks/{{webhook_id}}/test"): OPERATOR,
    ("GET", "/v1/rounds/{round_id}"): READERS,
    ("POST", "/v1/rounds/{round_id}/cancel"): may("operator", last=True),
    ("POST", "/v1/rounds/{round_id}/report"): may("site", foreign="round.unknown", body=report),
    ("GET", "/v1/me"): SITE,
    ("PUT", "/v1/me/vocabulary"): SITE,
    ("PUT", "/v1/me/model"): SITE,
    ("GET", "/v1/me/task"): SITE,
    ("POST", "/v1/uploads"): may("site", foreign="round.unknown", body=manifest),
    ("GET", "/v1/uploads/{upload_id}"): UPLOAD,
    ("DELETE", "/v1/uploads/{upload_id}"): UPLOAD,
    ("PUT", "/v1/uploads/{upload_id}/chunks/{index}"): UPLOAD,
    ("POST", "/v1/uploads/{upload_id}/complete"): UPLOAD,
    ("GET", "/v1/artifacts/{digest}"): may("operator", "worker", "site", foreign="artifact.unknown"),
    ("PUT", "/v1/artifacts/{digest}"): may("operator", "worker"),
    ("GET", "/v1/jobs/queue"): WORKER,
    ("POST", "/v1/jobs/{job_id}/claim"): WORKER,
    ("POST", "/v1/jobs/{job_id}/heartbeat"): WORKER,
    ("POST", "/v1/jobs/{job_id}/complete"): WORKER,
    ("POST", "/v1/jobs/{job_id}/fail"): WORKER,
}

# What who knocks without the right hears, whatever the route; the rest are roles, which hear role.forbidden.
TURNED_AWAY = {
    "nobody": "token.missing",
    "an unknown token": "token.invalid",
    "a foreign coordinator's token": "token.invalid",
    "an expired token": "token.expired",
    "a revoked site": "site.revoked",
    "a site's enrolment token": "token.invalid",
}


# ------------------------------------------------------------------------------------------------ the routes


def routes_of(app: FastAPI) -> Iterator[tuple[str, str, frozenset[str]]]:
    """(method, path, roles) of everything that answers; no roles where a route names none."""
    for route in app.routes:
        if isinstance(route, Route) and route.path in DESCRIPTIONS:
            continue
        for each in route.effective_candidates():  # type: ignore[attr-defined] # an included router, private to FastAPI
            for method in each.methods:
                yield method, each.path, roles_of(each.dependant)


def roles_of(dependant: Dependant) -> frozenset[str]:
    own: frozenset[str] = frozenset(dependant.call.roles) if isinstance(dependant.call, Allow) else frozenset()
    return own.union(*(roles_of(each) for each in dependant.dependencies))


def test_every_route_has_a_rule_and_names_exactly_its_roles(tmp_path: Path) -> None:
    found = {(method, path): roles for method, path, roles in routes_of(create_app(Settings(state_dir=tmp_path)))}
    unruled = sorted(found.keys() - RULES.keys())
    assert not unruled, f"add a rule for each: {unruled}"
    assert {key: sorted(roles) for key, roles in found.items()} == {key: sorted(RULES[key].roles) for key in found}
    assert not RULES.keys() - found.keys() - {("GET", "/metrics")}


def test_a_route_without_roles_would_be_found(tmp_path: Path) -> None:
    app, router = create_app(Settings(state_dir=tmp_path)), APIRouter(tags=["test"])
    router.add_api_route("/open", lambda: "open")
    app.include_router(router)
    assert ("GET", "/open", frozenset()) in list(routes_of(app))


def test_what_a_site_may_call_names_nothing_or_says_what_strangers_hear() -> None:
    """Every address with an id in it that sites may call has an answer for sites of other federations."""
    named = {key for key, rule in RULES.items() if "site" in rule.roles and "{" in key[1]}
    assert {key for key in named if RULES[key].foreign is None} == set()


# ------------------------------------------------------------------------------------------------ the callers


async def staged(world: World) -> Stage:
    """`world` is collecting. North has announced an upload; another federation has two sites, one of them revoked."""
    view, own, other = await world.round(), world.sites["north"], world.federation_id
    announced = await world.send("POST", "/v1/uploads", own, sign_manifest(own.key, "knowledge", view.round_id, b"x"))
    invited = world.config.model_copy(update={"name": "unused"})
    await world.create(invited)
    issued = await world.send(
        "POST",
        f"/v1/federations/{world.federation_id}/enrolment-tokens",
        "operator",
        EnrolmentTokenRequest(site="north"),
    )
    await world.create(config("banks"))
    stranger, revoked = await world.enrol("north"), await world.enrol("south")
    gone = await world.send("POST", f"/v1/federations/{world.federation_id}/sites/south/revoke")
    assert (announced.status_code, issued.status_code, gone.status_code) == (200, 201, 204)
    world.federation_id, world.config = other, config()
    now, key = world.clock(), world.context.key
    foreign_key = type(key)(stranger.key)
    return Stage(
        world=world,
        places={
            "federation_id": other,
            "round_id": view.round_id,
            "upload_id": announced.json()["upload_id"],
            "digest": world.public_set.digest,
            "job_id": await any_job(world),
            "name": "south",
            "version": "0",
            "index": "0",
            "webhook_id": "webhook_00000000000000000000",
        },
        callers={
            "nobody": None,
            "an unknown token": "0123456789abcdef" * 4,
            "a foreign coordinator's token": foreign_key.access_token(own.site_id, now, 600),
            "an expired token": key.access_token(own.site_id, now - timedelta(hours=1), 600),
            "a revoked site": revoked.token,
            "a site's enrolment token": issued.json()["token"],
            "site": own.token,
            **TOKENS,
        },
        own=own,
        stranger=stranger,
    )


async def any_job(world: World) -> str:
    """One of the map jobs that were done before the round."""
    answer = await world.send("GET", f"/v1/federations/{world.federation_id}/events?limit=200", "viewer")
    return next(str(each["data"]["job_id"]) for each in answer.json()["items"] if each["kind"] == "job.state")


def address(path: str, places: dict[str, str]) -> str:
    return re.sub(r"\{([a-z_]+)\}", lambda found: places[found[1]], path)


async def ask(stage: Stage, method: str, path: str, rule: Rule, token: str | None, site: SiteUnderTest) -> str:
    """The problem's code, or 'in' for an answer that is none."""
    body = rule.body(stage, site) if rule.body else None
    answer = await stage.world.send(method, address(path, stage.places), token, body)
    assert answer.status_code < 500, answer.text
    return str(answer.json()["code"]) if answer.status_code >= 400 else "in"


@services
async def test_whoever_may_not_is_turned_away_from_every_route(collecting: World) -> None:
    stage = await staged(collecting)
    wrong = []
    for (method, path), rule in RULES.items():
        if rule.roles == {"anyone"}:
            continue
        for caller, token in stage.callers.items():
            if caller in rule.roles:
                continue
            code = await ask(stage, method, path, rule, token, stage.own)
            if code != TURNED_AWAY.get(caller, "role.forbidden"):
                wrong.append(f"{method} {path}: {caller} heard {code}")
    assert not wrong


@services
async def test_a_site_of_another_federation_finds_nothing_of_this_one(collecting: World) -> None:
    stage = await staged(collecting)
    wrong = []
    for (method, path), rule in RULES.items():
        if rule.foreign is None:
            continue
        code = await ask(stage, method, path, rule, stage.stranger.token, stage.stranger)
        if code != rule.foreign:
            wrong.append(f"{method} {path}: a stranger heard {code}, {rule.foreign} was due")
    assert not wrong
    me = (await stage.world.send("GET", "/v1/me", stage.stranger)).json()
    assert me["federation_id"] != stage.places["federation_id"]


@services
async def test_whoever_may_is_let_in_everywhere(collecting: World) -> None:
    """The request may still be wrong, or come too late; nobody asks for another token."""
    stage = await staged(collecting)
    stage.world.context.wakeups.stop()  # event streams end at once
    wrong = []
    for (method, path), rule in sorted(RULES.items(), key=lambda item: item[1].last):
        for role in sorted(rule.roles):
            token = None if role == "anyone" else stage.callers[role]
            code = await ask(stage, method, path, rule, token, stage.own)
            refused = {*TURNED_AWAY.values(), "role.forbidden", rule.foreign} - {None}
            if code in refused and not (path == "/metrics" and code == "http.not_found"):
                wrong.append(f"{method} {path}: {role} heard {code}")
    assert not wrong
