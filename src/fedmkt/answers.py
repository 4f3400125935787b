"""A coordinator's answers: read whole and in bounded time, and as exceptions where they are refusals."""

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx
from pydantic import ValidationError

from fedmkt.errors import Refusal
from fedmkt.protocol import Problem

MAX_DETAIL = 500
MAX_ANSWER_BYTES = 64 << 20  # of one that is no artifact
AS_SENT = frozenset({"content-encoding", "content-length", "transfer-encoding"})  # no longer true of a decoded answer


class CoordinatorProblem(Refusal):
    """The coordinator refused: `status`, `code` and `title` are those of its problem document."""

    def __init__(self, problem: Problem, retry_after_s: float | None = None) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.retry_after_s = retry_after_s
        # Refusal declares these per class; a problem that came over the wire carries its own.
        vars(self).update(status=problem.status, code=problem.code, title=problem.title)


class UnexpectedAnswer(Refusal):
    status = 502
    code = "coordinator.unexpected_answer"
    title = "The coordinator's answer is not understood"


def read_whole(response: httpx.Response, longest_s: float) -> httpx.Response:
    """The answer with its content; one that trickles in or never ends is given up, where httpx bounds single reads."""
    ends, content = time.monotonic() + longest_s, bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > MAX_ANSWER_BYTES:
            raise UnexpectedAnswer(f"{response.request.url.path} answers with more than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > ends:
            raise httpx.ReadTimeout(f"the answer did not end within {longest_s:g} s", request=response.request)
    headers = [each for each in response.headers.multi_items() if each[0] not in AS_SENT]
    return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=response.request)


def problem_of(response: httpx.Response) -> CoordinatorProblem:
    """The refusal behind an answer of 300 and above; one that is no problem document (a proxy's page) is quoted."""
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        target = response.headers.get("location")
        quote = f"redirects to {target}: configure that address" if target else response.text[:MAX_DETAIL].strip()
        problem = Problem(
            type="about:blank",
            title=response.reason_phrase,
            status=response.status_code,
            code=f"http.{response.status_code}",
            detail=f"{response.request.method} {response.request.url} answered {response.status_code}: {quote}",
        )
    return CoordinatorProblem(problem, _retry_after_s(response))


def _retry_after_s(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after")
    if value is None:
        return None
    if value.isdigit():
        return float(value)
    until, now = http_date(value), http_date(response.headers.get("date"))
    if until is None:  # not a date: the header says nothing
        return None
    # Both by the coordinator's clock, whatever this machine's says.
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


def http_date(value: str | None) -> datetime | None:
    """None for what is no date with a time zone."""
    try:
        date = parsedate_to_datetime(value or "")
    except ValueError:
        return None
    return date if date.tzinfo is not None else None
