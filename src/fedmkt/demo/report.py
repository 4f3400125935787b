"""What a demo run found: `report.json` (DESIGN.md section 10) and the same as tables that say where FedMKT helps."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmkt import __version__
from fedmkt.demo.controls import RoundResult
from fedmkt.protocol import Evaluation, FederationConfig, ModelCard, RoundView, SelectionReport
from fedmkt.watch import taught

ALL = "all"  # the evaluations' name for every domain together
SAME_BITS = 0.002  # smaller differences in bits per byte are called equal: about what another seed changes


class Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Quality(Part):
    """Held-out public text of one domain."""

    bits_per_byte: float
    accuracy: float


Qualities = dict[str, Quality]  # by domain


class PartyRound(Part):
    round: int
    before: Qualities
    after: Qualities


class PartyReport(Part):
    """`before`: the base model at the first round's start; `after`: what the party ended with."""

    name: str
    role: Literal["llm", "site"]
    domain: str | None
    model: ModelCard | None = None
    before: Qualities
    after: Qualities
    history: tuple[PartyRound, ...]


class RoundReport(Part):
    """`seconds`: the whole round. `phase_seconds`: by state of the round, and inside it by party."""

    number: int
    state: str
    reason: str | None
    seconds: float
    phase_seconds: dict[str, dict[str, float]]
    selection: dict[str, SelectionReport]  # by receiver: the LLM and each site that learned


class Traffic(Part):
    """Body bytes between a site and the coordinator, all rounds together."""

    up: int
    down: int


class DemoReport(Part):
    version: str = __version__
    federation_id: str
    config: FederationConfig
    rounds: tuple[RoundReport, ...]
    parties: tuple[PartyReport, ...]
    controls: dict[str, tuple[PartyReport, ...]]
    traffic: dict[str, Traffic]
    seconds: dict[str, float]  # of the demo's own phases
    restarts: dict[str, int]  # services that died and were started again

    @property
    def completed(self) -> bool:
        return bool(self.rounds) and all(each.state == "completed" for each in self.rounds)


# ------------------------------------------------------------------------------------------------ from the rounds


def round_reports(rounds: Iterable[RoundView]) -> tuple[RoundReport, ...]:
    return tuple(_round_report(view) for view in rounds)


def _round_report(view: RoundView) -> RoundReport:
    selection, phases = {}, {"round": dict(view.state_seconds)}
    if view.llm_result is not None:
        selection["llm"], phases["llm"] = view.llm_result.selection, dict(view.llm_result.phase_seconds)
    for site in view.sites:
        if site.report is not None:
            selection[site.site], phases[site.site] = site.report.selection, dict(site.report.phase_seconds)
    return RoundReport(
        number=view.number,
        state=view.state,
        reason=view.reason,
        seconds=round(sum(view.state_seconds.values()), 3),
        phase_seconds=phases,
        selection=selection,
    )


def party_reports(
    rounds: Sequence[RoundView], domains: Mapping[str, str | None], models: Mapping[str, ModelCard | None]
) -> tuple[PartyReport, ...]:
    """The LLM and every site of `domains` (site -> its domain) that was measured in some round."""
    histories = {"llm": list(_llm_rounds(rounds)), **{site: list(_site_rounds(rounds, site)) for site in domains}}
    return tuple(
        _party(name, domains.get(name), models.get(name), history) for name, history in histories.items() if history
    )


def control_reports(
    histories: Mapping[str, Mapping[str, Sequence[RoundResult]]],
    numbers: Sequence[int],
    domains: Mapping[str, str | None],
) -> dict[str, tuple[PartyReport, ...]]:
    """Party -> arm -> a result a round, turned round: arm -> parties, in the form of the federation's own."""
    arms: dict[str, list[PartyReport]] = {}
    for name, by_arm in histories.items():
        for arm, results in by_arm.items():
            history = [
                PartyRound(round=number, before=qualities(result.before), after=qualities(result.after))
                for number, result in zip(numbers, results, strict=True)
            ]
            arms.setdefault(arm, []).append(_party(name, domains.get(name), None, history))
    return {arm: tuple(parties) for arm, parties in arms.items()}


def qualities(evaluations: Mapping[str, Evaluation]) -> Qualities:
    return {
        domain: Quality(bits_per_byte=each.bits_per_byte, accuracy=each.accuracy)
        for domain, each in evaluations.items()
    }


def traffic(rounds: Iterable[RoundView]) -> dict[str, Traffic]:
    sums: dict[str, Traffic] = {}
    for view in rounds:
        for site in view.sites:
            old = sums.get(site.site, Traffic(up=0, down=0))
            up, down = (site.report.bytes_up, site.report.bytes_down) if site.report else (site.upload_bytes, 0)
            sums[site.site] = Traffic(up=old.up + up, down=old.down + down)
    return sums


def _party(name: str, domain: str | None, model: ModelCard | None, history: Sequence[PartyRound]) -> PartyReport:
    return PartyReport(
        name=name,
        role="llm" if name == "llm" else "site",
        domain=domain,
        model=model,
        before=history[0].before,
        after=history[-1].after,
        history=tuple(history),
    )


def _llm_rounds(rounds: Iterable[RoundView]) -> Iterator[PartyRound]:
    """What the gate took back did not change the LLM."""
    for view in rounds:
        result = view.llm_result
        if result is not None:
            kept = result.gate is None or result.gate.decision == "kept"
            after = result.after if kept else result.before
            yield PartyRound(round=view.number, before=qualities(result.before), after=qualities(after))


def _site_rounds(rounds: Iterable[RoundView], name: str) -> Iterator[PartyRound]:
    for view in rounds:
        for site in view.sites:
            if site.site == name and site.report is not None:
                report = site.report
                yield PartyRound(round=view.number, before=qualities(report.before), after=qualities(report.after))


# ------------------------------------------------------------------------------------------------ tables


def show(report: DemoReport, console: Console) -> None:
    console.print(_quality_table(report))
    console.print(_teaching_table(report))
    for line in verdicts(report):
        console.print(line, highlight=False, soft_wrap=True)


def verdicts(report: DemoReport) -> Iterator[str]:
    """In words: how often and by how much each kind of party ended better or worse than in each control arm."""
    for arm in report.controls:
        for role in ("llm", "site"):
            differences = [
                party.after[domain].bits_per_byte - other.after[domain].bits_per_byte
                for party, other in _pairs(report, arm)
                if party.role == role
                for domain in _measured(party)
            ]
            if differences:
                yield f"{'LLM' if role == 'llm' else 'sites'}, FedMKT against {arm}: {_summary(differences)}"


def _summary(differences: Sequence[float]) -> str:
    better = sum(each < -SAME_BITS for each in differences)
    worse = sum(each > SAME_BITS for each in differences)
    mean = sum(differences) / len(differences)
    return (
        f"better in {better}, worse in {worse}, equal within {SAME_BITS} in {len(differences) - better - worse} of "
        f"{len(differences)} domains; mean difference {mean:+.4f} bits per byte"
    )


def _quality_table(report: DemoReport) -> Table:
    """Bits per byte on held-out public text. Beside each control arm's end stands how FedMKT's compares with it."""
    title = "bits per byte on held-out public text; lower is better"
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    table.add_column("party")
    table.add_column("domain")
    for heading in ("before", "after", *(f"{arm.replace('_', ' ')}: FedMKT" for arm in report.controls)):
        table.add_column(heading, justify="right")
    table.add_column("accuracy", justify="right")
    arms = [{other.name: other for _, other in _pairs(report, arm)} for arm in report.controls]
    for party in report.parties:
        domains = [*_measured(party), *([ALL] if ALL not in _measured(party) and ALL in party.after else [])]
        for domain in domains:
            before, after = party.before[domain], party.after[domain]
            table.add_row(
                party.name if domain == domains[0] else "",
                f"{domain} (own)" if domain == party.domain else domain,
                f"{before.bits_per_byte:.3f}",
                f"{after.bits_per_byte:.3f}",
                *(_compared(after, arm[party.name].after.get(domain) if party.name in arm else None) for arm in arms),
                f"{before.accuracy:.1%} -> {after.accuracy:.1%}",
                end_section=domain == domains[-1],
            )
    return table


def _compared(after: Quality, control: Quality | None) -> Text:
    """What the control arm ended with, and FedMKT's side of it: better, worse or same."""
    if control is None:
        return Text("")
    difference = after.bits_per_byte - control.bits_per_byte
    word, style = ("better", "green") if difference < -SAME_BITS else ("worse", "red")
    if abs(difference) <= SAME_BITS:
        word, style = "same", "dim"
    return Text(f"{control.bits_per_byte:.3f} ").append(f"{word:<6}", style=style)


def _teaching_table(report: DemoReport) -> Table:
    title = "who taught whom: public samples of each round"
    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    for heading in ("round", "state", "time", "LLM taught by", "taught by the LLM"):
        table.add_column(heading)
    for each in report.rounds:
        sites = {name: selection for name, selection in each.selection.items() if name != "llm"}
        learners = ", ".join(f"{name} {selection.taught.get('llm', 0)}" for name, selection in sites.items())
        llm = each.selection.get("llm")
        state = each.state if each.reason is None else f"{each.state}: {each.reason}"
        table.add_row(str(each.number), state, f"{each.seconds:.0f} s", taught(llm) if llm else "nobody", learners)
    return table


def _measured(party: PartyReport) -> list[str]:
    """Domains of a party's evaluations, its own first; all together only where there is nothing else."""
    names = [domain for domain in party.after if domain != ALL and domain in party.before]
    return sorted(names, key=lambda domain: (domain != party.domain, domain)) or [ALL]


def _pairs(report: DemoReport, arm: str) -> Iterator[tuple[PartyReport, PartyReport]]:
    """Each party with itself in a control arm."""
    others = {party.name: party for party in report.controls[arm]}
    return ((party, others[party.name]) for party in report.parties if party.name in others)
