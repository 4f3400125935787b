"""Builds everything the agent needs, once, and runs it. The exit status: 0 stopped, 1 cannot go on."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from fedmkt.client import CoordinatorClient, CoordinatorUnreachable, RetryPolicy, SiteKey
from fedmkt.ml.models import LoadedModel, load_base
from fedmkt.ml.party import Party
from fedmkt.ml.process import prepare_process
from fedmkt.private_formats import read_columns
from fedmkt.private_set import read_private_set
from fedmkt.protocol import SiteSelf
from fedmkt.public_set import PublicSet
from fedmkt.service import locked, run_service, status_pages
from fedmkt.signing import load_key
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.agent import FIRST_PAUSE_S, LONGEST_PAUSE_S, Agent
from fedmkt_client_agent.enrolment import enrol_once, introduce
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.site import Site
from fedmkt_client_agent.status import Status, build_app
from fedmkt_client_agent.store import AgentState, AgentStore

log = logging.getLogger(__name__)

# Within one request; after that the agent shows that the coordinator is away, and goes on asking.
RETRY = RetryPolicy(patience_s=30.0)

Answer = TypeVar("Answer")


def run(settings: Settings) -> int:
    """The program until a signal; its exit status."""
    return run_service(
        "agent",
        lambda stop: serve(settings, stop),
        log_level=settings.log_level,
        log_style=settings.log_style,
        otel=settings.otel,
    )


def serve(settings: Settings, stop: StopFlag) -> None:
    """The agent until `stop` is set. Raises Refusal when waiting would not help."""
    store, status = AgentStore(settings.state_dir), Status()
    with ExitStack() as stack:
        stack.enter_context(locked(store.folder))
        stack.enter_context(
            status_pages(build_app(status), settings.status_host, settings.status_port, store.status_file)
        )
        site = prepare(stack, settings, store, status, stop)
        Agent(site, settings.poll_s).run()


def prepare(stack: ExitStack, settings: Settings, store: AgentStore, status: Status, stop: StopFlag) -> Site:
    """Model, enrolment, private text, public set: what the tasks need. `stack` closes what is opened."""
    prepare_process(settings.torch_threads)
    state = store.load()
    status.progress("loading the model")
    loaded = load_base(settings.model, revision=settings.model_revision, device=settings.device, dtype=settings.dtype)
    state = _enrolled(settings, store, state, status, stop)
    status.update(site=state.site, federation_id=state.federation_id)
    assert state.site_id is not None
    key = load_key(store.key_file)
    client = stack.enter_context(
        CoordinatorClient(settings.coordinator_url, SiteKey(state.site_id, key), retry=RETRY, wait=stop.wait)
    )
    status.metrics.traffic = lambda: client.traffic
    me = patiently(client.me, status, stop)
    private = read_private_set(
        settings.private_file,
        settings.private_holdout_share,
        me.config.public_set.chat_template,
        read_columns(settings.private_columns),
    )
    log.info("private.read", extra={"train": len(private.train), "holdout": len(private.holdout)})
    party = _party(loaded, store, state, me, settings.gradient_checkpointing)
    samples = len(private.train) + len(private.holdout)
    patiently(lambda: introduce(client, party.vocabulary, party.card, samples), status, stop)
    return Site(
        client=client,
        store=store,
        state=state,
        key=key,
        party=party,
        private=private,
        config=me.config,
        public_set=_public_set(client, store, me, status, stop),
        status=status,
        stop=stop,
        checkpoint_s=settings.checkpoint_s,
    )


def _enrolled(settings: Settings, store: AgentStore, state: AgentState, status: Status, stop: StopFlag) -> AgentState:
    """The state with a site id. A token file that is named but not there yet is waited for."""
    with CoordinatorClient(settings.coordinator_url, retry=RETRY, wait=stop.wait) as client:
        patiently(client.check_version, status, stop)
        while state.site_id is None and settings.enrolment_token_file is not None and settings.token() is None:
            status.update(state="waiting", reason="the enrolment token's file is not there yet")
            stop.wait(FIRST_PAUSE_S)
        return patiently(lambda: enrol_once(client, store, state, settings.token()), status, stop)


def _party(loaded: LoadedModel, store: AgentStore, state: AgentState, me: SiteSelf, checkpointing: bool) -> Party:
    folder = store.party_folder(state)
    if folder is not None:
        return Party.load(folder, loaded, gradient_checkpointing=checkpointing)
    return Party(loaded, me.config.lora, seed=me.config.seed, gradient_checkpointing=checkpointing)


def _public_set(
    client: CoordinatorClient, store: AgentStore, me: SiteSelf, status: Status, stop: StopFlag
) -> PublicSet:
    """The federation's public set, as soon as the operator has uploaded it."""
    while me.public_set is None:
        status.update(state="waiting", reason="the federation has no public set yet")
        stop.wait(2 * FIRST_PAUSE_S)
        me = patiently(client.me, status, stop)
    digest = me.public_set
    path = patiently(lambda: client.fetch_artifact(digest, store.artifacts), status, stop)
    return PublicSet.from_jsonl(path.read_bytes())


def patiently(call: Callable[[], Answer], status: Status, stop: StopFlag) -> Answer:
    """Call until the coordinator answers, however long it is away. Refusals are raised."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            return call()
        except CoordinatorUnreachable as error:
            log.warning("coordinator.unreachable", extra={"reason": error.detail, "pause_s": pause_s})
            status.update(state="unreachable", reason=error.detail)
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
