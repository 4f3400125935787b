"""The agent's folder on disk, and what it says about the work done so far.

    key.pem          Ed25519 key, mode 0600          artifacts/         what was fetched, by digest
    state.json       AgentState, replaced whole      party-<number>/    adapter and optimizer, as last committed
    own.safetensors  the site's wide knowledge of the round being worked on
    checkpoint.safetensors  a training that was interrupted
    vocabulary       as it was sent                  ledger.jsonl       every transfer (`ledger`)
    outbox/          what is sent in this round      approved.json      what people have approved (`fedmkt.outbox`)

`state.json` is the commit point: a party folder counts from the moment the state names it. A process killed anywhere
finds either the step before or the step after, never half of one.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmkt.durable import sync, write_atomically
from fedmkt.errors import Refusal
from fedmkt.privacy import PrivacyLedger
from fedmkt.protocol import ApplyReport, Evaluation, TrainingReport

STATE_VERSION = 1
FIRST_KEY = "key.pem"


class StateUnreadable(Refusal):
    code = "agent.state_unreadable"
    title = "The agent's state cannot be used"
    remedy = "Restore state.json from a backup; else have the site revoked, and enrol it in a new state folder."


class RoundWork(BaseModel):
    """What this site has done in one round; parts that are done are not done again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    round_id: str
    before: dict[str, Evaluation] | None = None  # held-out public part, at the round's start
    trained: bool = False
    extracted: bool = False
    uploaded: tuple[str, ...] = ()  # kinds whose receipt came
    report: ApplyReport | None = None  # the site has learned; what the coordinator is told about it
    reported: bool = False
    training: tuple[TrainingReport, ...] = ()
    phase_seconds: dict[str, float] = {}
    bytes_up: int = 0
    bytes_down: int = 0


class AgentState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = STATE_VERSION
    coordinator_url: str | None = None
    site_id: str | None = None
    federation_id: str | None = None
    site: str | None = None
    receipt_keys: tuple[str, ...] = ()
    key: str = FIRST_KEY  # file name; a site that was revoked joins again with another
    token_digest: str | None = None  # SHA-256 of the enrolment token that was used up
    party: str | None = None  # folder name; none: the bare base model
    party_number: int = 0  # how often the adapter was changed and kept
    rounds_trained: int = 0
    privacy: PrivacyLedger | None = None  # what was spent; none: trained without differential privacy, if at all
    work: RoundWork | None = None


class AgentStore:
    """The folder, which this process has to itself (`fedmkt.service.locked`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key_file = folder / FIRST_KEY
        self.artifacts = folder / "artifacts"
        self.own_knowledge = folder / "own.safetensors"
        self.checkpoint = folder / "checkpoint.safetensors"
        self.status_file = folder / "status.json"
        self.vocabulary = folder / "vocabulary"
        self._state_file = folder / "state.json"

    def load(self) -> AgentState:
        """The state as last committed; a fresh one where there is none. Leftovers of a killed step are removed."""
        if not self._state_file.exists():
            return AgentState()
        try:
            state = AgentState.model_validate_json(self._state_file.read_bytes())
        except ValidationError as error:
            raise StateUnreadable(
                f"state.json has {error.error_count()} fields that version {STATE_VERSION} does not know or expect; "
                "it was written by another version of the agent: restore it, or enrol again in a new state folder"
            ) from error
        self._sweep(state)
        return state

    def commit(self, state: AgentState) -> AgentState:
        """Make `state` the one that the next process finds."""
        write_atomically(self._state_file, state.model_dump_json(indent=1).encode())
        self._sweep(state)
        return state

    def save_party(self, state: AgentState, save: Callable[[Path], None]) -> AgentState:
        """Write the party into a folder of its own; the returned state names it, once it is committed."""
        name = f"party-{state.party_number + 1:06d}"
        folder = self.folder / name
        if folder.exists():  # of a step that was killed before its commit
            shutil.rmtree(folder)
        save(folder)
        for path in (folder, *folder.rglob("*")):
            sync(path)
        return state.model_copy(update={"party": name, "party_number": state.party_number + 1})

    def key_of(self, state: AgentState) -> Path:
        return self.folder / state.key

    def party_folder(self, state: AgentState) -> Path | None:
        return None if state.party is None else self.folder / state.party

    def _sweep(self, state: AgentState) -> None:
        for folder in self.folder.glob("party-*"):
            if folder.name != state.party:
                shutil.rmtree(folder)
