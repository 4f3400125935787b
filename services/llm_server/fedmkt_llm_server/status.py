"""Status pages of the LLM server, for the loopback interface: health, readiness, the job being done."""

from collections.abc import Callable
from datetime import UTC, datetime

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel

from fedmkt import __version__
from fedmkt.protocol import LlmProgress, ModelCard
from fedmkt.work_metrics import WorkMetrics
from fedmkt_llm_server.lease import Lease


class JobStatus(BaseModel):
    job_id: str
    kind: str
    attempt: int
    round_number: int | None
    progress: LlmProgress


class StatusView(BaseModel):
    version: str = __version__
    model: ModelCard
    started_at: datetime
    jobs_ended: int
    job: JobStatus | None


class Status:
    """Written by the worker, read by the status pages."""

    def __init__(self, model: ModelCard) -> None:
        self._model = model
        self._started_at = datetime.now(UTC)
        self._lease: Lease | None = None
        self._jobs_ended = 0

    def on_job(self, lease: Lease | None) -> None:
        """The worker holds this lease now, or none."""
        if lease is None and self._lease is not None:
            self._jobs_ended += 1
        self._lease = lease

    @property
    def view(self) -> StatusView:
        lease, job = self._lease, None
        if lease is not None:
            payload = lease.job.payload
            job = JobStatus(
                job_id=lease.job.job_id,
                kind=payload.kind,
                attempt=lease.job.attempt,
                round_number=getattr(payload, "round_number", None),
                progress=lease.progress,
            )
        return StatusView(model=self._model, started_at=self._started_at, jobs_ended=self._jobs_ended, job=job)


def build_app(read_status: Callable[[], StatusView | None], metrics: WorkMetrics) -> FastAPI:
    """GET /healthz, /readyz (503 until the model is loaded), /status, /metrics."""
    app = FastAPI(title="FedMKT LLM server", version=__version__, docs_url=None, redoc_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, str]:
        view = read_status()
        if view is None:
            response.status_code = 503
            return {"status": "loading the model"}
        return {"status": "ok", "model": view.model.model_id, "device": view.model.device}

    @app.get("/metrics", response_class=Response)
    async def scrape(request: Request) -> Response:
        page, media_type = metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": media_type})

    @app.get("/status")
    async def show() -> StatusView | None:
        return read_status()

    return app
