"""Builds everything the LLM server needs, once, and runs it. Exit status: 0 stopped, 1 cannot go on."""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from fedmkt.client import CoordinatorClient, CoordinatorUnreachable, RetryPolicy, StaticToken
from fedmkt.errors import Refusal
from fedmkt.local_server import serve_in_thread
from fedmkt.logs import configure_logs
from fedmkt.ml.models import LoadedModel, load_base
from fedmkt.ml.process import prepare_process
from fedmkt.protocol import DistillJob, DistillResult, JobView, MapJob, MapResult, QueueView
from fedmkt.stopping import StopFlag, Stopped
from fedmkt_llm_server.distil import Desk, distil
from fedmkt_llm_server.llm import Llm
from fedmkt_llm_server.maps import build_map
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
    configure_logs("llm-server", level=settings.log_level, style=settings.log_style)
    stop = StopFlag()
    stop.listen()
    try:
        serve(settings, stop)
    except Stopped:
        pass
    except Refusal as error:
        log.error("llm_server.cannot_go_on", extra={"code": error.code, "reason": error.detail})
        return 1
    return 0


def serve(settings: Settings, stop: StopFlag) -> None:
    """The LLM server until `stop` is set. Raises Refusal when waiting would not help."""
    pages = _Pages()
    with ExitStack() as stack:
        stack.enter_context(_status_pages(settings, pages))
        client, heartbeats = _clients(stack, settings, stop)
        prepare_process(settings.torch_threads)
        state = LlmState(settings.state_dir)
        llm = Llm(lambda: _load(settings), state, gradient_checkpointing=settings.gradient_checkpointing)
        log.info("model.loaded", extra={"model": llm.card.model_id, "device": llm.card.device})
        _handshake(client, stop)
        status = pages.status = Status(llm.card)
        registrar = Registrar(client, llm.vocabulary, llm.card, stop)
        thread = threading.Thread(
            target=registrar.run, args=(settings.registration_interval_s,), name="registrar", daemon=True
        )
        thread.start()
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
            lambda job, report: _do(job, desk, report),
            name=settings.worker_name or f"{socket.gethostname()}-{os.getpid()}",
            stop=stop,
            on_job=status.on_job,
        ).run()
        log.info("llm_server.stopped")


class _Pages:
    """What the status pages read: nothing until the model is loaded."""

    status: Status | None = None

    def view(self) -> StatusView | None:
        return None if self.status is None else self.status.view


@contextmanager
def _status_pages(settings: Settings, pages: _Pages) -> Iterator[None]:
    """Where they listen is written to status.json in the state folder."""
    if settings.status_port is None:
        yield
        return
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    file = settings.state_dir / "status.json"
    with serve_in_thread(build_app(pages.view), settings.status_host, settings.status_port) as port:
        address = {"host": settings.status_host, "port": port}
        file.write_text(json.dumps(address))
        log.info("status.listening", extra=address)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def _clients(stack: ExitStack, settings: Settings, stop: StopFlag) -> tuple[CoordinatorClient, CoordinatorClient]:
    """One for the work, patient and stoppable; one for heartbeats and failures, quick and deaf to the stop."""
    credential = StaticToken(settings.token())
    work = CoordinatorClient(settings.coordinator_url, credential, retry=JOB_RETRY, wait=stop.wait)
    quick = CoordinatorClient(
        settings.coordinator_url, credential, retry=HEARTBEAT_RETRY, timeout_s=HEARTBEAT_TIMEOUT_S, wait=time.sleep
    )
    return stack.enter_context(work), stack.enter_context(quick)


def _load(settings: Settings) -> LoadedModel:
    return load_base(settings.model, revision=settings.model_revision, device=settings.device, dtype=settings.dtype)


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


def _do(job: JobView, desk: Desk, report: Report) -> DistillResult | MapResult:
    match job.payload:
        case DistillJob() as payload:
            return distil(payload, desk, report)
        case MapJob() as payload:
            return build_map(payload, lambda digest: desk.fetch(digest).read_bytes(), desk.publish, report)
