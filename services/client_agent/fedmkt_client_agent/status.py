"""What the agent is doing now: kept in memory, logged, and shown on the local status pages."""

import logging
import threading
import time
from datetime import UTC, datetime

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from fedmkt import __version__
from fedmkt.errors import Refusal
from fedmkt.privacy import PrivacyView
from fedmkt.work_metrics import WorkMetrics
from fedmkt_client_agent.states import TO_DO, State, frames_of, reason_of, state_of

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0  # progress within one step is logged this often at most


class StatusView(BaseModel):
    """No private text, no path, no sample: only where the work stands."""

    version: str = __version__
    state: State = "starting"
    reason: str = ""
    to_do: str = ""  # what people can do about it; "" when nothing is wrong
    site: str | None = None
    federation_id: str | None = None
    round_id: str | None = None
    round_number: int | None = None
    step: str = ""
    done: int = 0
    total: int = 0
    rounds_applied: int = 0
    privacy: PrivacyView | None = None  # none: trains without differential privacy
    since: datetime


class Status:
    """Written by the agent's thread, read by the status pages."""

    def __init__(self) -> None:
        self.metrics = WorkMetrics("agent")
        self._lock = threading.Lock()
        self._view = StatusView(since=datetime.now(UTC))
        self._logged_at = 0.0

    @property
    def view(self) -> StatusView:
        return self._view

    def update(self, **changes: object) -> None:
        with self._lock:
            if "state" in changes and changes["state"] != self._view.state:
                changes = {"since": datetime.now(UTC), "reason": "", "to_do": "", **changes}
            self._view = self._view.model_copy(update=changes)

    def show(self, state: State, reason: str) -> None:
        """A state in which nothing is worked on, with what to do about it."""
        self.update(state=state, step="", done=0, total=0)
        self.update(reason=reason, to_do=TO_DO.get(state, ""))

    def trouble(self, error: Exception, pause_s: float) -> State:
        """Show and log what went wrong before the next try. What an unexpected exception says is not told."""
        state = state_of(error)
        about = {"state": state, "reason": reason_of(error), "to_do": TO_DO[state], "pause_s": pause_s}
        if isinstance(error, Refusal):
            log.warning("agent.trouble", extra=about)
        else:
            log.error("agent.trouble", extra={**about, "raised": frames_of(error)})
        self.show(state, reason_of(error))
        return state

    def progress(self, step: str, done: int = 0, total: int = 0) -> None:
        """Note how far a step is; logs its beginning and then now and again."""
        begins = step != self._view.step
        self.metrics.progress(step, done)
        self.update(step=step, done=done, total=total)
        if begins or time.monotonic() - self._logged_at > LOG_INTERVAL_S:
            self._logged_at = time.monotonic()
            log.info("step.progress", extra={"step": step, "done": done, "total": total})


def build_app(status: Status) -> FastAPI:
    """GET /healthz, /status, /metrics. For the loopback interface; says nothing secret, asks for no credential."""
    app = FastAPI(title="FedMKT agent", version=__version__, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        page, media_type = status.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": media_type})

    @app.get("/status")
    async def show() -> StatusView:
        return status.view

    return app
