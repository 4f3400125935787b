"""Builds everything the LLM server needs, once, and runs it. Exit status: 0 stopped, 1 cannot go on."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fedmkt.client import CoordinatorClient, CoordinatorUnreachable, RetryPolicy, StaticToken
from fedmkt.logs import binding
from fedmkt.ml.following import follow
from fedmkt.ml.models import LoadedModel, load_base
from fedmkt.ml.process import prepare_process
from fedmkt.ml.team import Team
from fedmkt.protocol import DistillJob, DistillResult, JobView, MapJob, MapResult, QueueView
from fedmkt.service import locked, run_service, status_pages
from fedmkt.stopping import StopFlag
from fedmkt.work_metrics import WorkMetrics
from fedmkt_llm_server.distil import Desk, distil
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.maps import build_map
from fedmkt_llm_server.queue import lasting_name
from fedmkt_llm_server.registration import Registrar
from fedmkt_llm_server.settings import Settings
from fedmkt_llm_server.state import LlmState
from fedmkt_llm_server.status import Status, StatusView, build_app
from fedmkt_llm_server.worker import LONGEST_PAUSE_S, Report, Worker

log = logging.getLogger(__name__)

JOB_RETRY = RetryPolicy(patience_s=600.0)  # a result that took hours outlives a coordinator's restart
HEARTBEAT_RETRY = RetryPolicy(first_wait_s=0.1, max_wait_s=1.0, patience_s=4.0)
HEARTBEAT_TIMEOUT_S = 5.0


def run(settings: Settings) -> int:
    """The program until a signal; its exit status."""
    return run_service(
        "llm-server",
        lambda stop: serve(settings, stop),
        log_level=settings.log_level,
        log_style=settings.log_style,
        otel=settings.otel,
    )


def serve(settings: Settings, stop: StopFlag) -> None:
    """The LLM server until `stop` is set. Raises Refusal when waiting would not help.

    Of several processes under `accelerate launch`, the first is the server that others see. The rest lend it their
    processors: they talk to nobody else, and end when it does.
    """
    prepare_process(settings.torch_threads)
    team = Team.form(settings.device, sharded=settings.shard)
    try:
        if team.leads:
            _serve(settings, team, stop)
        else:
            with binding(rank=team.rank):
                _follow(settings, team)
    finally:
        team.end()


def _follow(settings: Settings, team: Team) -> None:
    llm = Llm(
        lambda: _load(settings, team),
        LlmState(settings.state_dir),
        gradient_checkpointing=settings.gradient_checkpointing,
    )
    follow(team, llm.shaped)


def _serve(settings: Settings, team: Team, stop: StopFlag) -> None:
    pages = _Pages()
    with ExitStack() as stack:
        stack.enter_context(locked(settings.state_dir))
        file = settings.state_dir / "status.json"
        stack.enter_context(
            status_pages(build_app(pages.view, pages.metrics), settings.status_host, settings.status_port, file)
        )
        client, heartbeats = _clients(stack, settings, stop)
        pages.metrics.traffic = lambda: client.traffic
        state = LlmState(settings.state_dir)
        llm = Llm(lambda: _load(settings, team), state, gradient_checkpointing=settings.gradient_checkpointing)
        log.info("model.loaded", extra={"model": llm.card.model_id, "device": llm.card.device})
        _handshake(client, stop)
        status = pages.status = Status(llm.card)
        stack.enter_context(_registering(Registrar(client, llm.vocabulary, llm.card, stop), settings, stop))
        desk = Desk(
            llm,
            state,
            fetch=lambda digest: client.fetch_artifact(digest, state.artifacts),
            publish=client.put_artifact,
            checkpoint_s=settings.checkpoint_s,
            stop=stop,
        )
        Worker(
            client,
            heartbeats,
            lambda: _queue(client, settings),
            lambda job, report: _measured(job, desk, report, pages.metrics),
            name=settings.worker_name or lasting_name(settings.state_dir),
            stop=stop,
            on_job=status.on_job,
        ).run()
        log.info("llm_server.stopped")


@contextmanager
def _registering(registrar: Registrar, settings: Settings, stop: StopFlag) -> Iterator[None]:
    """New federations are looked for beside the block."""
    interval_s = settings.registration_interval_s
    thread = threading.Thread(target=registrar.run, args=(interval_s,), name="registrar", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()  # however the block ended
        thread.join()


class _Pages:
    """What the status pages read: nothing until the model is loaded."""

    status: Status | None = None

    def __init__(self) -> None:
        self.metrics = WorkMetrics("llm-server")

    def view(self) -> StatusView | None:
        return None if self.status is None else self.status.view


def _clients(stack: ExitStack, settings: Settings, stop: StopFlag) -> tuple[CoordinatorClient, CoordinatorClient]:
    """One for the work, patient and stoppable; one for heartbeats and failures, quick and deaf to the stop."""
    credential = StaticToken(settings.token())
    work = CoordinatorClient(settings.coordinator_url, credential, retry=JOB_RETRY, wait=stop.wait)
    quick = CoordinatorClient(
        settings.coordinator_url, credential, retry=HEARTBEAT_RETRY, timeout_s=HEARTBEAT_TIMEOUT_S, wait=time.sleep
    )
    return stack.enter_context(work), stack.enter_context(quick)


def _load(settings: Settings, team: Team) -> LoadedModel:
    return load_base(
        settings.model,
        revision=settings.model_revision,
        device=settings.device,
        dtype=settings.dtype,
        quantize=settings.quantize,
        team=team,
    )


def _handshake(client: CoordinatorClient, stop: StopFlag) -> None:
    while True:
        try:
            client.check_version()
        except CoordinatorUnreachable as error:
            log.warning("coordinator.unreachable", extra={"reason": error.detail})
            stop.wait(LONGEST_PAUSE_S)
        else:
            return


def _queue(client: CoordinatorClient, settings: Settings) -> QueueView:
    """Stream and group as the coordinator names them; the address may be another one in another zone."""
    view = client.queue()
    if settings.redis_url is None:
        return view
    return view.model_copy(update={"redis_url": settings.redis_url.get_secret_value()})


def _measured(job: JobView, desk: Desk, report: Report, metrics: WorkMetrics) -> DistillResult | MapResult:
    def counted(step: str, done: int, total: int) -> None:
        metrics.progress(step, done)
        report(step, done, total)

    with metrics.work(job.payload.kind):
        result = _do(job, desk, counted)
    if isinstance(result, DistillResult):
        metrics.trained(result.training)
    return result


def _do(job: JobView, desk: Desk, report: Report) -> DistillResult | MapResult:
    match job.payload:
        case DistillJob() as payload:
            return distil(payload, desk, report)
        case MapJob() as payload:
            return build_map(payload, lambda digest: desk.fetch(digest).read_bytes(), desk.publish, report)
