"""Which version of the LLM's adapter counts: promoted after a round by its gate, or here by the operator.

Neither is done while a round distils. Its job has started from the version that was promoted then, its gate compares
with that one, and its commit would take the operator's choice away again without a word.
"""

from fedmkt.errors import Refusal
from fedmkt_coordinator.store import Store, Transaction
from fedmkt_coordinator.store.records import AdapterRow

BARE_MODEL = 0


class AdapterBusy(Refusal):
    status = 409
    code = "adapter.round_distilling"
    title = "A round is making the next version"


class AdapterWithoutBytes(Refusal):
    status = 409
    code = "adapter.no_artifact"
    title = "The version has no adapter"


class NothingBefore(Refusal):
    status = 409
    code = "adapter.no_parent"
    title = "There is no version to go back to"
    remedy = "Nothing to do: the federation works with the bare base model."


class AdapterMovedOn(Refusal):
    status = 409
    code = "adapter.not_promoted"
    title = "Another version is promoted"
    remedy = "Look which version is promoted now (`fedmkt adapter list FEDERATION`), then decide again."


async def promote(store: Store, federation_id: str, version: int) -> AdapterRow:
    """Make this version what the next round starts from; promoted again, nothing changes."""
    async with store.write() as tx:
        await tx.federation(federation_id, lock=True)
        wanted = await tx.adapter(federation_id, version)
        if wanted.artifact is None:
            raise AdapterWithoutBytes(
                f"version {version} is the bare base model; to go back to it, roll back the promoted version to "
                f"{BARE_MODEL}: POST /v1/federations/{federation_id}/adapters/VERSION/rollback"
            )
        return await _change(tx, wanted, "adapter.promoted")


async def roll_back(store: Store, federation_id: str, version: int, to_version: int | None) -> AdapterRow:
    """From `version`, which is promoted, to its parent or `to_version`; asked again, the same answer."""
    async with store.write() as tx:
        await tx.federation(federation_id, lock=True)
        now = await tx.promoted_adapter(federation_id)
        given_up = await tx.adapter(federation_id, version)
        target = given_up.parent if to_version is None else to_version
        if target is None:
            raise NothingBefore(f"version {version} is the bare base model: nothing comes before it")
        wanted = await tx.adapter(federation_id, target)
        if now.version not in (version, target):
            raise AdapterMovedOn(
                f"version {now.version} is promoted, not {version}: roll that one back, or promote one"
            )
        return await _change(tx, wanted, "adapter.rolled_back")


async def _change(tx: Transaction, wanted: AdapterRow, kind: str) -> AdapterRow:
    before = await tx.promoted_adapter(wanted.federation_id)
    if before.version == wanted.version:
        return wanted
    active = await tx.active_round(wanted.federation_id)
    if active is not None and active.state == "distilling":
        until = f" (until {active.deadline.isoformat(timespec='seconds')} at the latest)" if active.deadline else ""
        raise AdapterBusy(
            f"round {active.number} is distilling{until} and will decide on a version made from version "
            f"{before.version}; wait for it, or cancel it first: POST /v1/rounds/{active.id}/cancel"
        )
    changed = await tx.promote_adapter(wanted)
    await tx.append(
        wanted.federation_id,
        kind,
        round_id=wanted.round_id,
        version=wanted.version,
        parent=wanted.parent,
        replaced=before.version,
        by="operator",
    )
    return changed
