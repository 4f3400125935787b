"""Builds everything the agent needs, once, and runs it. The exit status: 0 stopped, 1 needs other settings."""

import json
import logging
from contextlib import ExitStack

from fedmkt.client import MAX_ARTIFACT_BYTES, CoordinatorClient
from fedmkt.errors import Refusal
from fedmkt.local_server import serve_in_thread
from fedmkt.logs import hide_paths
from fedmkt.ml.models import LoadedModel, load_base
from fedmkt.ml.party import Party
from fedmkt.ml.process import prepare_process
from fedmkt.outbox import Outbox
from fedmkt.private_formats import read_columns
from fedmkt.private_set import PrivateSet, read_private_set
from fedmkt.protocol import SiteSelf
from fedmkt.public_set import PublicSet
from fedmkt.service import locked, run_service
from fedmkt.stopping import StopFlag, Stopped
from fedmkt_client_agent.access import RETRY, Access
from fedmkt_client_agent.agent import Agent
from fedmkt_client_agent.consent import Consent
from fedmkt_client_agent.enrolment import enrol_once, introduce
from fedmkt_client_agent.ledger import Ledger, fetched
from fedmkt_client_agent.patience import FIRST_PAUSE_S, patiently
from fedmkt_client_agent.policy import PolicyFile
from fedmkt_client_agent.privacy import check_unbroken, open_budget
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.site import Site
from fedmkt_client_agent.states import frames_of
from fedmkt_client_agent.status import Status, build_app
from fedmkt_client_agent.store import AgentState, AgentStore

log = logging.getLogger(__name__)


def run(settings: Settings) -> int:
    """The program until a signal; its exit status."""
    hide_paths(settings.paths())
    return run_service(
        "agent",
        lambda stop: serve(settings, stop),
        log_level=settings.log_level,
        log_style=settings.log_style,
        otel=settings.otel,
    )


class Broken(Refusal):
    status = 500
    code = "agent.broken"
    title = "The agent has met an error that it does not know"
    remedy = "Report the places that the message names. Started again, the agent goes on from its state folder."


def serve(settings: Settings, stop: StopFlag) -> None:
    """The agent until `stop` is set. Raises Refusal when only other settings would help."""
    try:
        _serve(settings, stop)
    except (Refusal, Stopped):
        raise
    except Exception as error:  # noqa: BLE001 - an error of ours: it may quote private text, so only its places are told
        raise Broken(f"please report this: {', '.join(frames_of(error))}") from None


def _serve(settings: Settings, stop: StopFlag) -> None:
    store, status = AgentStore(settings.state_dir), Status()
    with ExitStack() as stack:
        port = patiently(lambda: _pages(stack, settings, status), status, stop)
        patiently(lambda: stack.enter_context(locked(store.folder)), status, stop)
        if port is not None:
            patiently(lambda: _write_address(store, settings.status_host, port), status, stop)
            stack.callback(store.status_file.unlink, missing_ok=True)
        site = prepare(stack, settings, store, status, stop)
        Agent(site, settings.poll_s).run()


def _pages(stack: ExitStack, settings: Settings, status: Status) -> int | None:
    """Before the state folder is touched: what is wrong with it is to be seen there."""
    if settings.status_port is None:
        return None
    return stack.enter_context(serve_in_thread(build_app(status), settings.status_host, settings.status_port))


def _write_address(store: AgentStore, host: str, port: int) -> None:
    address = {"host": host, "port": port}
    store.status_file.write_text(json.dumps(address))
    log.info("status.listening", extra=address)


def prepare(stack: ExitStack, settings: Settings, store: AgentStore, status: Status, stop: StopFlag) -> Site:
    """Model, enrolment, private text, public set: what the tasks need. `stack` closes what is opened."""
    prepare_process(settings.torch_threads)
    state = patiently(store.load, status, stop)
    ledger = Ledger(store.folder)
    status.progress("loading the model")
    loaded = patiently(lambda: _model(settings), status, stop)
    state = _enrolled(settings, store, state, ledger, status, stop)
    access = patiently(lambda: Access(stack, settings, store, ledger, state, stop), status, stop)
    status.metrics.traffic = lambda: access.client.traffic
    me = patiently(access.me, status, stop)
    status.update(site=access.state.site, federation_id=access.state.federation_id)
    private = patiently(lambda: _private(settings, me), status, stop)
    log.info("private.read", extra={"train": len(private.train), "holdout": len(private.holdout)})
    party = patiently(lambda: _party(loaded, store, access.state, me, settings.gradient_checkpointing), status, stop)
    check_unbroken(settings.privacy, access.state.privacy, has_adapter=access.state.party is not None)
    consent = Consent(PolicyFile(settings.policy_file), ledger, Outbox(store.folder))
    samples = len(private.train) + len(private.holdout)

    def present() -> None:
        known = samples if consent.policy.send_local_metrics else None
        introduce(access.client, store, ledger, party.vocabulary, party.card, known)

    def rejoin(site: Site) -> bool:
        if not access.join_again(site.state):
            return False
        present()
        site.came_in(access.client, access.key, access.state)
        return True

    patiently(present, status, stop)
    site = Site(
        client=access.client,
        store=store,
        state=access.state,
        key=access.key,
        party=party,
        private=private,
        config=me.config,
        public_set=_public_set(access.client, store, ledger, me, status, stop),
        status=status,
        stop=stop,
        consent=consent,
        rejoin=rejoin,
        checkpoint_s=settings.checkpoint_s,
    )
    if settings.privacy is not None:
        site.budget = open_budget(settings.privacy, party, len(private.train), site.state.privacy, site.charge)
        status.update(privacy=site.budget.view)
    return site


def _model(settings: Settings) -> LoadedModel:
    return load_base(settings.model, revision=settings.model_revision, device=settings.device, dtype=settings.dtype)


def _private(settings: Settings, me: SiteSelf) -> PrivateSet:
    return read_private_set(
        settings.private_file,
        settings.private_holdout_share,
        me.config.public_set.chat_template,
        read_columns(settings.private_columns),
    )


def _enrolled(
    settings: Settings, store: AgentStore, state: AgentState, ledger: Ledger, status: Status, stop: StopFlag
) -> AgentState:
    """The state with a site id. A token file that is named but not there yet is waited for."""
    with CoordinatorClient(settings.coordinator_url, retry=RETRY, wait=stop.wait) as client:
        patiently(client.check_version, status, stop)
        while (
            state.site_id is None
            and settings.enrolment_token_file is not None
            and patiently(settings.token, status, stop) is None
        ):
            status.show("waiting", "the enrolment token's file is not there yet")
            stop.wait(FIRST_PAUSE_S)
        return patiently(lambda: enrol_once(client, store, state, settings.token(), ledger), status, stop)


def _party(loaded: LoadedModel, store: AgentStore, state: AgentState, me: SiteSelf, checkpointing: bool) -> Party:
    folder = store.party_folder(state)
    if folder is not None:
        return Party.load(folder, loaded, gradient_checkpointing=checkpointing)
    return Party(loaded, me.config.lora, seed=me.config.seed, gradient_checkpointing=checkpointing)


def _public_set(
    client: CoordinatorClient, store: AgentStore, ledger: Ledger, me: SiteSelf, status: Status, stop: StopFlag
) -> PublicSet:
    """The federation's public set, as soon as the operator has uploaded it."""
    while me.public_set is None:
        status.show("waiting", "the federation has no public set yet")
        stop.wait(2 * FIRST_PAUSE_S)
        me = patiently(client.me, status, stop)
    digest = me.public_set

    def read() -> PublicSet:
        return PublicSet.from_jsonl(fetched(client, ledger, store, digest, MAX_ARTIFACT_BYTES).read_bytes())

    return patiently(read, status, stop)
