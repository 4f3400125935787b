"""Which sites could take part in a round now, which vocabulary maps that needs, and what is still missing."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from fedmkt.protocol import FederationConfig, MapJob, MapMethod
from fedmkt_coordinator.ids import new_id
from fedmkt_coordinator.store import Transaction
from fedmkt_coordinator.store.records import FederationRow, MapRow, SiteRow

MAX_NAMED = 20  # sites listed in one sentence
TOLD_AGAIN = timedelta(seconds=5)  # no event of its own tells a federation that a map it shares was built


@dataclass(frozen=True, slots=True)
class SiteMaps:
    """The maps between one site's vocabulary and the LLM's."""

    to_llm: dict[MapMethod, str]
    from_llm: dict[MapMethod, str]
    pending: int
    failed: str | None  # why, if the LLM server gave one up


@dataclass(frozen=True, slots=True)
class Readiness:
    ready: tuple[SiteRow, ...]
    maps: dict[str, SiteMaps]  # by site name, of every site that has a vocabulary
    waits_for: tuple[str, ...]


def named(sites: Iterable[str]) -> str:
    listed = list(sites)
    more = len(listed) - MAX_NAMED
    return ", ".join(listed[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


async def readiness(tx: Transaction, federation: FederationRow) -> Readiness:
    active = {site.name: site for site in await tx.sites(federation.id) if site.revoked_at is None}
    maps = await _maps(tx, federation, active.values())
    ready = tuple(site for site in active.values() if site.ready and _complete(maps.get(site.name)))
    missing = (*_missing(federation, active, maps, ready), *_gathering(federation, active, maps, ready, tx.now))
    return Readiness(ready, maps, missing)


class WaitsFor:
    """What each federation's next round waits for, as its sites are told: found out once, not once a site that asks."""

    def __init__(self) -> None:
        self._told: dict[str, tuple[int, datetime, tuple[str, ...]]] = {}  # federation id: events, when, what
        self._looking = asyncio.Lock()

    async def of(self, tx: Transaction, federation: FederationRow) -> tuple[str, ...]:
        async with self._looking:  # a thousand sites that ask at once wait for one look
            events, at, told = self._told.get(federation.id, (-1, tx.now, ()))
            if events < federation.events or abs(tx.now - at) > TOLD_AGAIN:
                told = (await readiness(tx, federation)).waits_for
                self._told[federation.id] = federation.events, tx.now, told
            return told


def _complete(maps: SiteMaps | None) -> bool:
    return maps is not None and maps.pending == 0 and maps.failed is None


async def maps_of(tx: Transaction, federation: FederationRow, site: SiteRow) -> SiteMaps | None:
    """One site's maps, without a look at the others; None for a site that has no vocabulary yet."""
    return (await _maps(tx, federation, [site])).get(site.name)


async def _maps(tx: Transaction, federation: FederationRow, sites: Iterable[SiteRow]) -> dict[str, SiteMaps]:
    llm = federation.llm_vocabulary
    known = [site for site in sites if site.vocabulary is not None]
    if llm is None or not known:
        return {}
    pairs = [pair for site in known if site.vocabulary for pair in ((site.vocabulary, llm), (llm, site.vocabulary))]
    rows = {(row.teacher, row.student, row.method): row for row in await tx.maps(pairs)}
    unbuilt = [row.job_id for row in rows.values() if row.artifact is None]
    failures = {job.id: job.reason or "no reason given" for job in await tx.jobs(unbuilt) if job.state == "failed"}
    wanted = (federation.config.distillation.map_method,)
    return {site.name: _site_maps(site.vocabulary or "", llm, wanted, rows, failures) for site in known}


def _site_maps(
    vocabulary: str,
    llm: str,
    wanted: Sequence[MapMethod],
    rows: dict[tuple[str, str, MapMethod], MapRow],
    failures: dict[str, str],
) -> SiteMaps:
    to_llm: dict[MapMethod, str] = {}
    from_llm: dict[MapMethod, str] = {}
    pending, failed = 0, None
    for method in wanted:
        for built, key in ((to_llm, (vocabulary, llm, method)), (from_llm, (llm, vocabulary, method))):
            row = rows.get(key)
            if row is not None and row.artifact is not None:
                built[method] = row.artifact
            elif row is not None and row.job_id in failures:
                failed = failures[row.job_id]
            else:
                pending += 1
    return SiteMaps(to_llm, from_llm, pending, failed)


def _missing(
    federation: FederationRow, active: dict[str, SiteRow], maps: dict[str, SiteMaps], ready: tuple[SiteRow, ...]
) -> Iterable[str]:
    if federation.public_set is None:
        yield f"the public set: PUT /v1/federations/{federation.id}/public-set"
    if federation.llm_vocabulary is None:
        yield "an LLM server to register its model and vocabulary"
    pending = [name for name, each in maps.items() if each.pending and active[name].ready]
    if pending:
        yield f"vocabulary maps of {named(pending)}, which an LLM server builds"
    quorum = federation.config.schedule.quorum
    if len(ready) + len(pending) < quorum:
        yield f"sites: {len(ready)} are ready, quorum is {quorum}; {_unready(federation.config, active, maps)}"


def _gathering(
    federation: FederationRow,
    active: dict[str, SiteRow],
    maps: dict[str, SiteMaps],
    ready: tuple[SiteRow, ...],
    now: datetime,
) -> Iterable[str]:
    """A quorum is ready: the others get some time, counted from when the quorum's last site enrolled."""
    schedule = federation.config.schedule
    if len(ready) < schedule.quorum:
        return
    late = sorted(set(federation.config.sites) - {site.name for site in ready})
    began = sorted(site.enrolled_at for site in ready)[schedule.quorum - 1]
    until = began + timedelta(seconds=schedule.gather_timeout_s)
    if late and now < until:
        yield f"{_unready(federation.config, active, maps)}; the round begins without them at {until:%H:%M:%S} UTC"


def _unready(config: FederationConfig, active: dict[str, SiteRow], maps: dict[str, SiteMaps]) -> str:
    lacks: dict[str, list[str]] = {}
    for name in config.sites:
        site, built = active.get(name), maps.get(name)
        if site is None:
            lacks.setdefault("to enrol", []).append(name)
        elif site.vocabulary is None:
            lacks.setdefault("to send the vocabulary", []).append(name)
        elif site.model is None:
            lacks.setdefault("to describe the model", []).append(name)
        elif built is not None and built.failed is not None:
            lacks.setdefault(f"another try at its vocabulary map ({built.failed})", []).append(name)
    return "; ".join(f"{named(names)} still have {what}" for what, names in lacks.items()) or "none is missing"


# ------------------------------------------------------------------------------------------------ map jobs


async def order_maps(tx: Transaction, federation: FederationRow, *, again: bool = False) -> None:
    """Queue a job for every map that this federation needs and nobody has asked for.

    `again` gives maps whose job has failed another job: somebody has sent a vocabulary anew.
    """
    llm = federation.llm_vocabulary
    if llm is None:
        return
    wanted = {
        (*pair, method)
        for vocabulary in await tx.site_vocabularies(federation.id)
        for pair in ((vocabulary, llm), (llm, vocabulary))
        for method in (federation.config.distillation.map_method,)
    }
    asked = {(row.teacher, row.student, row.method): row for row in await tx.maps([key[:2] for key in wanted])}
    # In one order everywhere: federations that insert the same maps at once wait for each other, never in a circle.
    for key in sorted(wanted - asked.keys()):
        await _order_map(tx, federation, *key)
    if again:
        await _order_failed_again(tx, federation, list(asked.values()))


async def _order_map(tx: Transaction, federation: FederationRow, teacher: str, student: str, method: MapMethod) -> None:
    job_id = new_id("job")
    if await tx.add_map(MapRow(teacher, student, method, job_id, None)):
        await tx.add_job(await _map_job(tx, federation, teacher, student, method), job_id)


async def _order_failed_again(tx: Transaction, federation: FederationRow, rows: list[MapRow]) -> None:
    unbuilt = [row.job_id for row in rows if row.artifact is None]
    failed = {job.id for job in await tx.jobs(unbuilt) if job.state == "failed"}
    for row in rows:
        if row.job_id in failed:
            job = await tx.add_job(await _map_job(tx, federation, row.teacher, row.student, row.method))
            await tx.replace_map_job(row, job.id)


async def _map_job(tx: Transaction, federation: FederationRow, teacher: str, student: str, method: MapMethod) -> MapJob:
    return MapJob(
        federation_id=federation.id,
        teacher=teacher,
        student=student,
        teacher_artifact=(await tx.vocabulary(teacher)).artifact,
        student_artifact=(await tx.vocabulary(student)).artifact,
        method=method,
    )
