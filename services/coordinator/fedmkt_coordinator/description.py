"""The API's description: what FastAPI knows, and what a reader needs besides.

Problems come from the source (`refusals`), roles from the routes, examples from `examples`. A test finds an operation
that lacks any of it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from inspect import signature
from typing import Any

from fastapi import APIRouter, FastAPI, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse

from fedmkt.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, ProblemKind, ProblemList, WebhookMessage
from fedmkt_coordinator import problems
from fedmkt_coordinator.examples import EXAMPLES, PARAMETERS, RAW_BODIES
from fedmkt_coordinator.problems import Known
from fedmkt_coordinator.rate_limits import Buckets
from fedmkt_coordinator.refusals import raised_by
from fedmkt_coordinator.security import Allow

Document = dict[str, Any]
PROBLEM, EVENT_STREAM = "application/problem+json", "text/event-stream"
TAGS = {
    "operations": "Is it alive, what is it, what may go wrong.",
    "federations": "One LLM, one public set, one configuration, many sites.",
    "sites": "Enrolment, and what a site says and asks about itself.",
    "rounds": "Ask for them, watch them, cancel them, report on them.",
    "adapters": "Versions of the LLM's adapter.",
    "events": "What happened, in the order of commits.",
    "webhooks": "Events sent to an address, signed.",
    "knowledge": "Uploads: announce, send chunks, complete.",
    "artifacts": "Immutable bytes named by their SHA-256.",
    "jobs": "The LLM server's side.",
    "audit": "Who did what, hash-chained.",
}
SCHEMES = {
    "staff": {
        "type": "http",
        "scheme": "bearer",
        "description": "An operator's, viewer's or worker's token, from credentials.json or the settings.",
    },
    "site": {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "JWT",
        "description": "A site's short-lived token: POST /v1/token gives it for an assertion signed with its key.",
    },
}
TEXT = {"type": "string"}
BINARY = {"type": "string", "format": "binary"}
IDENTIFIER = "^[A-Za-z0-9._-]{1,100}$"
ETAG = {"ETag": ("Compare it with If-None-Match next time", TEXT), "Cache-Control": ("May be kept, how long", TEXT)}
RANGES = {**ETAG, "Accept-Ranges": ("bytes", TEXT), "Content-Length": ("Bytes that follow", {"type": "integer"})}
PART = {**RANGES, "Content-Range": ("bytes FIRST-LAST/TOTAL", TEXT)}
ON_STATUS: dict[str, dict[str, tuple[str, Any]]] = {
    "401": {"WWW-Authenticate": ("Bearer", TEXT)},
    "416": {"Content-Range": ("bytes */TOTAL", TEXT)},
    "426": {"Upgrade": ("The protocol to speak", TEXT)},
    "429": {"Retry-After": ("Seconds to wait", {"type": "integer", "minimum": 0})},
    "503": {"Retry-After": ("Seconds to wait", {"type": "integer", "minimum": 0})},
}
VERSION_HEADER = {
    "name": PROTOCOL_HEADER,
    "in": "header",
    "required": False,
    "description": "The protocol that the client speaks; another one is refused with both versions and the remedy.",
    "schema": {"type": "integer", "const": PROTOCOL_VERSION},
}


def describe(app: FastAPI, routers: Callable[[], Sequence[APIRouter]]) -> None:
    """Give `app` its description. It is made when it is first asked for, and not on the event loop."""
    plain = app.openapi

    @cache
    def document() -> Document:
        return _complete(plain(), _routes(routers()))

    app.state.problem_list = cache(lambda: problem_list(routers()))

    def served(_: Request) -> Response:
        return JSONResponse(document())

    def event(message: WebhookMessage) -> None:
        """What the coordinator sends to a webhook's address. Any 2xx answer within ten seconds means delivered."""

    app.webhooks.post("event", summary="An event of the federation", tags=["webhooks"])(event)
    app.openapi = document  # type: ignore[method-assign] # as FastAPI's documentation has it
    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "path", "") != app.openapi_url]
    app.add_route("/openapi.json", served, include_in_schema=False)


def problem_list(routers: Sequence[APIRouter]) -> ProblemList:
    """Every problem that any route can answer with."""
    kinds = {known.code: known for route in _routes(routers) for known in _known(route)}
    return ProblemList(
        items=tuple(
            ProblemKind(code=code, status=each.status, title=each.title, details=each.details)
            for code, each in sorted(kinds.items())
        )
    )


def _routes(routers: Iterable[APIRouter]) -> list[APIRoute]:
    return [route for router in routers for route in router.routes if isinstance(route, APIRoute)]


# ------------------------------------------------------------------------------------------------ problems, roles


def _dependants(dependant: Dependant) -> Iterator[Dependant]:
    for each in dependant.dependencies:
        yield each
        yield from _dependants(each)


def roles_of(route: APIRoute) -> set[str]:
    return {role for each in _dependants(route.dependant) if isinstance(each.call, Allow) for role in each.call.roles}


def _known(route: APIRoute) -> list[Known]:
    """What the route, its dependencies and what stands before them can refuse, by status and code."""
    functions: list[Any] = [route.endpoint]
    for each in _dependants(route.dependant):
        if not isinstance(each.call, Allow):
            functions.append(each.call)
        elif each.call.roles != ("anyone",):
            functions.append(Allow.__call__)
        elif each.call.costly:
            functions.append(Buckets.spend)
    messages: dict[Any, set[str]] = defaultdict(set)
    for function in functions:
        for raised in raised_by(function):
            messages[raised.refusal].add(raised.message)
    found = [Known(kind.status, kind.code, kind.title, tuple(sorted(said))) for kind, said in messages.items()]
    return sorted([*found, *_before(route)], key=lambda known: (known.status, known.code))


def _before(route: APIRoute) -> Iterator[Known]:
    """What the framework and the middleware refuse."""
    yield from problems.ALWAYS
    if route.path.startswith("/v1/"):
        yield problems.OTHER_PROTOCOL
        yield from problems.DOWN.values()
    if "{" in route.path:
        yield problems.NOT_FOUND
    dependants = [route.dependant, *_dependants(route.dependant)]
    if any(each.path_params or each.query_params or each.header_params or each.body_params for each in dependants):
        yield problems.MALFORMED
    if route.body_field is not None:
        yield problems.NOT_TEXT


def _responses(known: Sequence[Known]) -> Document:
    by_status: dict[int, list[Known]] = defaultdict(list)
    for each in known:
        by_status[each.status].append(each)
    return {str(status): _response(status, each) for status, each in by_status.items()}


def _response(status: int, known: Sequence[Known]) -> Document:
    narrowed = {"properties": {"code": {"enum": [each.code for each in known]}, "status": {"const": status}}}
    return {
        "description": "; ".join(f"`{each.code}`: {each.title}" for each in known),
        "content": {
            PROBLEM: {
                "schema": {"allOf": [{"$ref": "#/components/schemas/Problem"}, narrowed]},
                "examples": {each.code: {"summary": each.title, "value": _problem(each)} for each in known},
            }
        },
    }


def _problem(known: Known) -> Document:
    return {
        "type": f"urn:fedmkt:problem:{known.code}",
        "title": known.title,
        "status": known.status,
        "code": known.code,
        "detail": known.details[0] if known.details else known.title,
    }


# ------------------------------------------------------------------------------------------------ the document


def _complete(document: Document, routes: Sequence[APIRoute]) -> Document:
    document["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    document["components"]["securitySchemes"] = SCHEMES
    for route in routes:
        for method in route.methods or ():
            _complete_operation(document["paths"][route.path_format][method.lower()], route)
    _complete_webhook(document["webhooks"]["event"]["post"])
    return document


def _complete_operation(operation: Document, route: APIRoute) -> None:
    roles = roles_of(route)
    schemes = [name for name in SCHEMES if (name in roles if name == "site" else roles - {"site", "anyone"})]
    operation["security"] = [{name: []} for name in schemes]
    who = "anyone" if not schemes else ", ".join(sorted(roles))
    operation["description"] = f"{operation.get('description', '')}\n\nFor: {who}."
    operation["responses"].pop("default", None)
    operation["responses"].update(
        {status: each for status, each in _responses(_known(route)).items() if status not in operation["responses"]}
    )
    for answer in operation["responses"].values():
        if EVENT_STREAM in answer.get("content", {}):
            answer["content"][EVENT_STREAM] = {"schema": TEXT}  # FastAPI describes the items, as OpenAPI 3.2 may
    _headers(operation, route)
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and parameter["name"] in PARAMETERS:
            parameter["example"] = PARAMETERS[parameter["name"]]
            if parameter["schema"].keys() <= {"type", "title"} and parameter["schema"]["type"] == "string":
                parameter["schema"]["pattern"] = IDENTIFIER  # whatever else is sent is none that exists
    for body in (operation.get("requestBody", {}), *operation["responses"].values()):
        _examples(body.get("content", {}))


def _examples(content: Document) -> None:
    for media_type, each in content.items():
        name = each.get("schema", {}).get("$ref", "").rpartition("/")[2]
        if name in EXAMPLES:
            each["example"] = EXAMPLES[name]
        elif media_type in RAW_BODIES and not name:
            each["example"] = RAW_BODIES[media_type]


def _headers(operation: Document, route: APIRoute) -> None:
    """What goes along beside the body: conditions, ranges, versions."""
    answers = operation["responses"]
    if "artifact.range" in str(answers.get("416")):
        answers["200"].setdefault("content", {"application/octet-stream": {"schema": BINARY}})
        answers["200"]["headers"] = _as_headers(RANGES)
        answers["206"] = {**answers["200"], "description": "The range", "headers": _as_headers(PART)}
        _ask(operation, "Range", "bytes=FIRST-LAST: one range; several, or a wrong one, give the whole")
        _ask(operation, "If-Range", "The ETag under which the range is wanted, else the whole")
    elif route.methods == {"GET"} and route.response_model and signature(route.endpoint).return_annotation is Response:
        answers["200"]["headers"] = _as_headers(ETAG)
    if "headers" in answers.get("200", {}):
        _ask(operation, "If-None-Match", "ETags of what the client has; 304 if one of them still holds")
        answers["304"] = {"description": "Nothing has changed", "headers": _as_headers(ETAG)}
    if route.path.startswith("/v1/"):
        operation.setdefault("parameters", []).append(VERSION_HEADER)
    for status, answer in answers.items():
        of_status = _as_headers({**ON_STATUS.get(status, {}), PROTOCOL_HEADER: ("The coordinator's protocol", TEXT)})
        answer["headers"] = {**answer.get("headers", {}), **of_status}


def _ask(operation: Document, name: str, description: str) -> None:
    header = {"name": name, "in": "header", "required": False, "description": description, "schema": TEXT}
    operation.setdefault("parameters", []).append(header)


def _as_headers(headers: dict[str, tuple[str, Any]]) -> Document:
    return {name: {"description": text, "schema": schema} for name, (text, schema) in headers.items()}


def _complete_webhook(operation: Document) -> None:
    operation["responses"] = {"2XX": {"description": "Delivered. Anything else is tried again later"}}
    operation["security"] = []
    for name, text in (
        ("webhook-id", "The same for every attempt at one event"),
        ("webhook-timestamp", "Seconds since 1970, of this attempt"),
        ("webhook-signature", "v1, and a base64 HMAC-SHA256 of id.timestamp.body under the webhook's secret"),
    ):
        _ask(operation, name, text)
    _examples(operation["requestBody"]["content"])
