"""HTTP as this project needs it: credentials, retries with a deadline, problems as exceptions, bytes counted.

`Session` knows nothing of federations; `fedmkt.client` puts the typed calls on top. Every call of the API is idempotent
(by its nature or by an Idempotency-Key), so a request whose answer was lost is simply sent again.
"""

import logging
import platform
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Literal, TypedDict, TypeVar, Unpack

import httpx
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ValidationError

from fedmkt import __version__
from fedmkt.answers import CoordinatorProblem, UnexpectedAnswer, http_date, problem_of, read_whole
from fedmkt.errors import Refusal
from fedmkt.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, AccessToken, TokenRequest
from fedmkt.signing import site_assertion
from fedmkt.tracing import HEADER, current_header

log = logging.getLogger(__name__)

USER_AGENT = f"fedmkt/{__version__} protocol/{PROTOCOL_VERSION} python/{platform.python_version()}"
RETRIED = frozenset({408, 429, 502, 503, 504})
RENEW_BEFORE_S = 30.0  # a token is renewed this long before it ends, or at half its life if that is shorter
WORTH_A_LINE_S = 1.0  # shorter pauses between attempts are not logged
ANSWER_TIMEOUTS = 5  # an answer that trickles in is given up after so many timeouts
CLOCK_WARNING_S = 30.0
CLOCK_ACCURACY_S = 2.0

Method = Literal["GET", "POST", "PUT", "DELETE"]
Answer = TypeVar("Answer")
View = TypeVar("View", bound=BaseModel)


class CoordinatorUnreachable(Refusal):
    status = 503
    code = "coordinator.unreachable"
    title = "The coordinator does not answer"


@dataclass(frozen=True, slots=True)
class StaticToken:
    """An operator's, viewer's or worker's bearer token."""

    token: str

    def __repr__(self) -> str:
        return "StaticToken(...)"


@dataclass(frozen=True, slots=True)
class SiteKey:
    """A site's own key: signs assertions that buy short-lived access tokens."""

    site_id: str
    key: Ed25519PrivateKey


Credentials = StaticToken | SiteKey | None


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter; `patience_s` bounds the time from the first attempt to the last."""

    first_wait_s: float = 0.25
    max_wait_s: float = 20.0
    patience_s: float = 120.0

    def pause_s(self, attempt: int, asked_s: float | None) -> float:
        """How long to wait after failed attempt number `attempt` (0 first); never shorter than the server asked."""
        longest = min(self.max_wait_s, self.first_wait_s * 2.0 ** min(attempt, 30))
        return max(asked_s or 0.0, random.uniform(longest / 2, longest))  # noqa: S311 - jitter, not a secret


@dataclass(frozen=True, slots=True)
class Traffic:
    """Body bytes that got through so far, as they went over the wire (before decompression), retries included."""

    up: int = 0
    down: int = 0


def utc_now() -> datetime:
    return datetime.now(UTC)


class Call(TypedDict, total=False):
    """What a request may have besides its address; `public` ones carry no credential."""

    body: BaseModel | bytes | None
    params: Mapping[str, str | int | float] | None
    headers: Mapping[str, str] | None
    timeout_s: float | None
    public: bool


class Session:
    """One coordinator, one set of credentials; safe to use from several threads."""

    def __init__(
        self,
        base_url: str,
        credentials: Credentials = None,
        *,
        retry: RetryPolicy | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        wait: Callable[[float], object] = time.sleep,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        """`wait` is called with seconds between attempts; a caller that must stop early raises from it.

        `clock` is this machine's: it counts for signed assertions alone, and `now` corrects it. Proxy and CA variables
        (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE, SSL_CERT_DIR) count unless `transport` is given.
        Redirects are never followed: a credential goes to the configured coordinator and nowhere else.
        """
        self.base_url = base_url.rstrip("/")
        self.timeout_s = timeout_s
        self._retry = retry or RetryPolicy()
        self._wait = wait
        self._clock = clock
        self._offset_s: float | None = None
        self._credentials = credentials
        self._http = httpx.Client(
            base_url=self.base_url,
            transport=transport,
            headers={"User-Agent": USER_AGENT, PROTOCOL_HEADER: str(PROTOCOL_VERSION)},
            timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
            follow_redirects=False,
        )
        self._lock = threading.Lock()
        self._traffic_lock = threading.Lock()
        self._token = ""
        self._token_ends = 0.0
        self._traffic = Traffic()

    def close(self) -> None:
        self._http.close()

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    @property
    def patience_s(self) -> float:
        return self._retry.patience_s

    def now(self) -> datetime:
        """The time at the coordinator, as far as its answers have told; deadlines are times of that clock."""
        return self._clock() + timedelta(seconds=self._offset_s or 0.0)

    # ------------------------------------------------------------------------------------------ one request

    def request(self, method: Method, path: str, **call: Unpack[Call]) -> httpx.Response:
        """Send until an answer below 300 comes.

        Raises CoordinatorProblem for a refusal, CoordinatorUnreachable when patience ends without any answer.
        """
        return self.persist(f"{method} {path}", lambda: self.once(method, path, **call))

    def once(self, method: Method, path: str, **call: Unpack[Call]) -> httpx.Response:
        """One attempt, its answer read. Raises CoordinatorProblem for a refusal, httpx.TransportError."""
        with self.stream(method, path, **call) as response:
            return read_whole(response, (call.get("timeout_s") or self.timeout_s) * ANSWER_TIMEOUTS)
        raise AssertionError("the block above returns or raises")

    def read(self, model: type[View], response: httpx.Response) -> View:
        """The answer as a wire model. Raises UnexpectedAnswer when it is none."""
        try:
            return model.model_validate_json(response.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"{response.request.method} {response.request.url.path} did not answer with a {model.__name__} "
                f"({error.error_count()} fields differ); is {self.base_url} a FedMKT coordinator of protocol "
                f"{PROTOCOL_VERSION}?"
            ) from error

    @contextmanager
    def stream(
        self,
        method: Method,
        path: str,
        *,
        body: BaseModel | bytes | None = None,
        params: Mapping[str, str | int | float] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        public: bool = False,
    ) -> Iterator[httpx.Response]:
        """One attempt whose answer is not read yet; a refused token is renewed once. Errors are not retried here."""
        content = body.model_dump_json().encode() if isinstance(body, BaseModel) else body
        timeout = httpx.Timeout(timeout_s or self.timeout_s, connect=min(10.0, self.timeout_s))
        for may_renew in (True, False):
            token = "" if public else self._bearer()
            request = self._http.build_request(
                method, path, content=content, params=params, headers=_headers(body, token, headers), timeout=timeout
            )
            asked = self._clock()
            response = self._http.send(request, stream=True)
            self.count(up=len(content or b""))
            self._compare_clocks(response, asked)
            if response.status_code == 401 and may_renew and not public and isinstance(self._credentials, SiteKey):
                response.close()
                self._forget(token)
                continue
            break
        try:
            if response.status_code >= 300:
                raise problem_of(read_whole(response, timeout_s or self.timeout_s))
            yield response
        finally:
            response.close()
            self.count(down=response.num_bytes_downloaded)

    # ------------------------------------------------------------------------------------------ persistence

    def pause(self, failures: int, asked_s: float | None = None) -> None:
        """Between attempts that `persist` does not count, after so many (0 first) that brought nothing."""
        self._wait(self._retry.pause_s(failures, asked_s))

    def persist(self, what: str, attempt: Callable[[], Answer]) -> Answer:
        """Call `attempt` until it returns, a refusal comes that time does not heal, or patience ends."""
        started = time.monotonic()
        for number in count():
            try:
                return attempt()
            except httpx.TransportError as error:
                failure: Refusal = self._unreachable(what, number + 1, error)
                pause_s = self._retry.pause_s(number, None)
            except CoordinatorProblem as problem:
                if problem.problem.status not in RETRIED:
                    raise
                failure = problem
                pause_s = self._retry.pause_s(number, problem.retry_after_s)
            if time.monotonic() - started + pause_s > self._retry.patience_s:
                raise failure
            if pause_s >= WORTH_A_LINE_S:
                log.info(
                    "coordinator.not_answering",
                    extra={"request": what, "attempt": number + 1, "reason": failure.detail, "pause_s": round(pause_s)},
                )
            self._wait(pause_s)
        raise AssertionError("count() never ends")

    def _unreachable(self, what: str, attempts: int, error: httpx.TransportError) -> CoordinatorUnreachable:
        reason = str(error) or type(error).__name__
        failure = CoordinatorUnreachable(
            f"{what} at {self.base_url} failed {attempts} times, last with: {reason}; check the address, "
            "the proxy variables and the certificate"
        )
        failure.__cause__ = error
        return failure

    # ------------------------------------------------------------------------------------------ credentials

    def _bearer(self) -> str:
        """The token to send; for a site key, a fresh one when the present one is about to end."""
        match self._credentials:
            case None:
                return ""
            case StaticToken(token):
                return token
            case SiteKey() as site:
                with self._lock:
                    if time.monotonic() >= self._token_ends:
                        self._renew(site)
                    return self._token

    def _renew(self, site: SiteKey) -> None:
        assertion = TokenRequest(assertion=site_assertion(site.key, site.site_id, self._clock()))
        asked = time.monotonic()
        answer = self.read(AccessToken, self.once("POST", "/v1/token", body=assertion, public=True))
        self._token = answer.access_token
        self._token_ends = asked + max(answer.expires_in_s - RENEW_BEFORE_S, answer.expires_in_s / 2)

    def _forget(self, token: str) -> None:
        with self._lock:
            if self._token == token:  # another thread may have renewed it meanwhile
                self._token_ends = 0.0

    # ------------------------------------------------------------------------------------------ bytes and time

    def _compare_clocks(self, response: httpx.Response, asked: datetime) -> None:
        """The Date header has whole seconds and was written between asking and now; warns once of a wrong clock."""
        at, waited = http_date(response.headers.get("date")), self._clock() - asked
        if at is None or abs(waited.total_seconds()) > CLOCK_ACCURACY_S:  # a long poll, say: written when?
            return
        halfway = asked + waited / 2
        first = self._offset_s is None
        self._offset_s = (at - halfway).total_seconds() + 0.5
        if first and abs(self._offset_s) > CLOCK_WARNING_S:
            side = "behind" if self._offset_s > 0 else "ahead of"
            reason = f"this machine's clock is {abs(self._offset_s):.0f} s {side} the coordinator's: set it (NTP)"
            log.warning("clock.differs", extra={"offset_s": round(self._offset_s, 1), "reason": reason})

    def count(self, up: int = 0, down: int = 0) -> None:
        """Body bytes that got through. Of a request that broke, its sender learns later how many those were."""
        with self._traffic_lock:  # not `_lock`: `_renew` counts while it holds that one
            self._traffic = Traffic(self._traffic.up + up, self._traffic.down + down)


def _headers(body: BaseModel | bytes | None, token: str, headers: Mapping[str, str] | None) -> dict[str, str]:
    sent = dict(headers or {})
    if (trace := current_header()) is not None:
        sent[HEADER] = trace
    if isinstance(body, BaseModel):
        sent["Content-Type"] = "application/json"
    elif body is not None:
        sent.setdefault("Content-Type", "application/octet-stream")
    if token:
        sent["Authorization"] = f"Bearer {token}"
    return sent
