"""The site's way in: its client, and how it comes in again after a revocation."""

from contextlib import ExitStack

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedmkt.client import CoordinatorClient, CoordinatorProblem, RetryPolicy, SiteKey
from fedmkt.protocol import SiteSelf
from fedmkt.signing import load_key
from fedmkt.stopping import StopFlag
from fedmkt_client_agent.enrolment import enrol_again
from fedmkt_client_agent.ledger import Ledger
from fedmkt_client_agent.settings import Settings
from fedmkt_client_agent.store import AgentState, AgentStore

# Within one request; after that the agent shows that the coordinator is away, and goes on asking.
RETRY = RetryPolicy(patience_s=30.0)


class Access:
    """`state` names the site, `key` and `client` are its own; all three change together."""

    def __init__(
        self,
        stack: ExitStack,
        settings: Settings,
        store: AgentStore,
        ledger: Ledger,
        state: AgentState,
        stop: StopFlag,
    ) -> None:
        """`stack` closes the clients."""
        self._stack, self._settings, self._store, self._ledger, self._stop = stack, settings, store, ledger, stop
        self._use(state)

    def _use(self, state: AgentState) -> None:
        assert state.site_id is not None, "enrolled"
        self.state = state
        self.key: Ed25519PrivateKey = load_key(self._store.key_of(state))
        self.client = self._stack.enter_context(self._connected(SiteKey(state.site_id, self.key)))

    def _connected(self, credentials: SiteKey | None) -> CoordinatorClient:
        return CoordinatorClient(self._settings.coordinator_url, credentials, retry=RETRY, wait=self._stop.wait)

    def me(self) -> SiteSelf:
        """What the coordinator says of this site, after joining again if it was revoked and a new token is there."""
        try:
            return self.client.me()
        except CoordinatorProblem as problem:
            if problem.code != "site.revoked" or not self.join_again(self.state):
                raise
        return self.client.me()

    def join_again(self, state: AgentState) -> bool:
        """Whether there was a token that is not used up. `state` is the site's present one."""
        with self._connected(None) as anyone:
            joined = enrol_again(anyone, self._store, state, self._settings.token(), self._ledger)
        if joined is None:
            return False
        self._use(joined)
        return True
