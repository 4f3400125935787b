"""The one base model that this server holds, as the party that a job needs."""

import gc
import logging
from collections.abc import Callable

import torch

from fedmkt.ml.models import LoadedModel
from fedmkt.ml.party import Party
from fedmkt.ml.party_folder import PartyFolderRefused
from fedmkt.protocol import FederationConfig, LoraConfig
from fedmkt_llm_server.state import LlmState

log = logging.getLogger(__name__)


class Llm:
    """A party changes its model in place. From round to round of one federation it simply goes on; the base model is
    loaded again only for a federation with other LoRA settings or another seed, or to go back to an older adapter.
    """

    def __init__(self, load: Callable[[], LoadedModel], state: LlmState, *, gradient_checkpointing: bool) -> None:
        self._load = load
        self._state = state
        self._checkpointing = gradient_checkpointing
        self._base: LoadedModel | None = load()
        self.vocabulary = self._base.vocabulary
        self.card = self._base.card
        self._party: Party | None = None
        self._adapter: str | None = None  # what the party holds: a digest, or None for the bare base

    def party(self, config: FederationConfig, adapter: str | None, read: Callable[[], bytes]) -> Party:
        """The LLM with this adapter (None: the bare base) and, where this server has it, the optimizer that goes on.

        `read` fetches the adapter's bytes. What is done to the party must be told by `committed`.
        """
        party = self._party
        if party is not None and (party.lora, party.seed) == (config.lora, config.seed):
            if adapter == self._adapter:
                return party
            if adapter is None:
                party.reset()
                self._adapter = None
                return party
        party = self._with(config, adapter, read)
        self._party, self._adapter = party, adapter
        return party

    def shaped(self, lora: LoraConfig | None, seed: int) -> Party:
        """The LLM with layers of this shape, whatever is in them: a follower is given the leader's weights."""
        if self._party is None or (self._party.lora, self._party.seed) != (lora, seed):
            self._party = Party(self._take_base(), lora, seed=seed, gradient_checkpointing=self._checkpointing)
        return self._party

    def committed(self, adapter: str) -> None:
        """The party now holds this adapter; it is kept with its optimizer for the next round."""
        assert self._party is not None
        self._state.save_party(adapter, self._party)
        self._adapter = adapter

    def _with(self, config: FederationConfig, adapter: str | None, read: Callable[[], bytes]) -> Party:
        folder = None if adapter is None else self._state.party_folder(adapter)
        if folder is not None:
            try:
                return Party.load(folder, self._take_base(), gradient_checkpointing=self._checkpointing)
            except PartyFolderRefused as error:
                log.warning("optimizer.unreadable", extra={"adapter": adapter, "reason": error.detail})
        party = Party(self._take_base(), config.lora, seed=config.seed, gradient_checkpointing=self._checkpointing)
        if adapter is not None:
            party.load_adapter_bytes(read())
            log.warning("optimizer.fresh", extra={"adapter": adapter})
        return party

    def _take_base(self) -> LoadedModel:
        """A base model that no party has changed."""
        base, self._base, self._party = self._base, None, None
        if base is None:
            gc.collect()  # two LLMs may not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            log.info("model.loading_again")
            base = self._load()
        return base
