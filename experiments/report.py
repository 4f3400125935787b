"""Tables and a plot of each experiment, generated from its lines into the document, between markers."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

from experiments.arms import ARMS
from experiments.lines import Line
from experiments.paired import Difference, difference
from experiments.plots import forest
from experiments.setting import Setting
from experiments.units import Folders, finished_lines
from fedmkt.errors import Refusal

ALL, LLM = "all", "llm"
Values = dict[int, float]  # seed -> a figure of one arm
Wanted = Callable[[Line], bool]


class NoResults(Refusal):
    code = "experiments.no_results"
    title = "An experiment has no results yet"


class HalfMarked(Refusal):
    code = "experiments.half_marked"
    title = "The place of an experiment's tables in the document is not closed"


class Results:
    """An experiment's lines of each arm's last round, which is the fixed stopping rule."""

    def __init__(self, setting: Setting, lines: Sequence[Line]) -> None:
        if not lines:
            raise NoResults(f"experiment {setting.name!r} has 0 lines of configuration {setting.digest}; run it first")
        last: dict[tuple[str, int], int] = defaultdict(int)
        for line in lines:
            last[line.arm, line.seed] = max(last[line.arm, line.seed], line.round)
        self.setting = setting
        self.lines = [line for line in lines if line.round == last[line.arm, line.seed] and line.domain != ALL]
        self.arms = [arm for arm in setting.arms if any(line.arm == arm for line in self.lines)]
        self.domains = sorted({line.domain for line in self.lines})
        self.seeds = sorted({line.seed for line in self.lines})

    def values(self, arm: str, wanted: Wanted, figure: str = "bits_per_byte") -> Values:
        """The mean of a figure over the wanted lines of each seed that has any with this figure."""
        found: dict[int, list[float]] = defaultdict(list)
        for line in self.lines:
            value = getattr(line, figure)
            if line.arm == arm and wanted(line) and value is not None:
                found[line.seed].append(value)
        return {seed: fmean(values) for seed, values in found.items()}

    def minus(self, arm: str, other: str, wanted: Wanted) -> Difference | None:
        return None if arm == other else difference(self.values(arm, wanted), self.values(other, wanted))


def of_llm(line: Line) -> bool:
    return line.party == LLM


def own_domain(line: Line) -> bool:
    return line.own_domain == line.domain


def other_domain(line: Line) -> bool:
    return line.own_domain is not None and line.own_domain != line.domain


# ------------------------------------------------------------------------------------------------ tables


def tables(results: Results) -> Iterator[str]:
    """Markdown lines."""
    setting = results.setting
    commits = ", ".join(sorted({line.commit for line in results.lines}))
    yield f"**{setting.question}**"
    yield ""
    yield (
        f"{setting.rounds} rounds, seeds {', '.join(map(str, results.seeds))}; commit {commits}, configuration "
        f"{setting.digest}. Bits per byte on held-out text, lower is better. Differences are paired by seed, "
        "with their 95 % bootstrap interval; * where that excludes zero."
    )
    if any(map(of_llm, results.lines)):
        yield from ("", "The LLM, mean of all domains:", "", *_llm_table(results))
    if any(map(own_domain, results.lines)):
        yield from ("", "The sites, mean of all sites:", "", *_site_table(results))
    if "fedmkt" in results.arms:
        yield from ("", "FedMKT by domain:", "", *_domain_table(results))


def _llm_table(results: Results) -> Iterator[str]:
    against = [arm for arm in ("public_only", "self_distillation") if arm in results.arms]
    heads = [
        "bits per byte",
        "accuracy",
        *(f"minus {_shown(arm)}" for arm in against),
        "right expert",
        "gold transfer",
        "taken back",
    ]
    yield from _head("arm", heads)
    for arm in results.arms:
        if values := results.values(arm, of_llm):
            differences = [results.minus(arm, other, of_llm) for other in against]
            figures = [results.values(arm, of_llm, name) for name in ("precision", "gold_transfer")]
            accuracy = results.values(arm, of_llm, "accuracy")
            cells = [_mean(values), _share(accuracy), *map(_text, differences), *map(_share, figures)]
            yield _row(_shown(arm), [*cells, _taken_back(results, arm, of_llm)])


def _site_table(results: Results) -> Iterator[str]:
    against = [arm for arm in ("private_only", "private_public", "self_distillation") if arm in results.arms]
    labels = [arm for arm in against if arm == "private_public"]
    heads = ["own domain", "others", *(f"own minus {_shown(arm)}" for arm in against)]
    heads += [*(f"others minus {_shown(arm)}" for arm in labels), "kB sent a round", "bytes a row", "taken back"]
    yield from _head("arm", heads)
    for arm in results.arms:
        if values := results.values(arm, own_domain):
            cells = [_mean(values), _mean(results.values(arm, other_domain))]
            cells += [_text(results.minus(arm, other, own_domain)) for other in against]
            cells += [_text(results.minus(arm, other, other_domain)) for other in labels]
            yield _row(_shown(arm), [*cells, *_bytes(results, arm), _taken_back(results, arm, own_domain)])


def _bytes(results: Results, arm: str) -> tuple[str, str]:
    sent, rows = (fmean(results.values(arm, own_domain, name).values()) for name in ("bytes_up", "rows"))
    if not sent:
        return "", ""
    rounds = results.setting.arm_rounds(ARMS[arm])
    return f"{sent / rounds / 1000:.0f}", f"{sent / rows:.1f}" if rows else ""


def _taken_back(results: Results, arm: str, wanted: Wanted) -> str:
    """Share of the rounds that the gate undid."""
    rounds = results.setting.arm_rounds(ARMS[arm])
    return f"{fmean(results.values(arm, wanted, 'rolled_back').values()) / rounds:.0%}"


def _domain_table(results: Results) -> Iterator[str]:
    """Where a site leads and where none does; and each site in its own domain."""
    yield from _head(
        "domain", ["LLM minus public only", "LLM minus self distillation", "its site minus private only", "minus self"]
    )
    for domain in results.domains:

        def llm_here(line: Line, domain: str = domain) -> bool:
            return of_llm(line) and line.domain == domain

        def site_here(line: Line, domain: str = domain) -> bool:
            return own_domain(line) and line.domain == domain

        pairs = [("public_only", llm_here), ("self_distillation", llm_here)]
        pairs += [("private_only", site_here), ("self_distillation", site_here)]
        yield _row(domain, [_text(results.minus("fedmkt", arm, wanted)) for arm, wanted in pairs])


def _head(first: str, heads: Sequence[str]) -> Iterator[str]:
    yield _row(first, heads)
    yield "|---|" + "--:|" * len(heads)


def _row(first: str, cells: Iterable[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _shown(arm: str) -> str:
    return arm.replace("_", " ")


def _text(found: Difference | None) -> str:
    return "" if found is None else str(found)


def _mean(values: Values) -> str:
    return f"{fmean(values.values()):.4f}" if values else ""


def _share(values: Values) -> str:
    return f"{fmean(values.values()):.1%}" if values else ""


# ------------------------------------------------------------------------------------------------ the document


def write_report(settings: Sequence[Setting], folders: Folders, document: Path) -> None:
    """Every experiment's tables between its markers, its plot in a folder beside the document.

    Raises NoResults, HalfMarked.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    plots = document.with_suffix("")
    for setting in settings:
        results = Results(setting, finished_lines(setting, folders))
        plot = plots / f"{setting.name}.svg"
        forest(_differences(results), plot)
        lines = [*tables(results), "", f"![Differences with intervals: {setting.name}]({plots.name}/{plot.name})"]
        text = put_between(text, setting.name, lines)
    document.write_text(text, encoding="utf-8")


def put_between(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with new lines between the markers of that name; where there are none, both are put at its end."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text and end not in text:
        text = f"{text}\n## {name.replace('_', ' ').capitalize()}\n\n{begin}\n{end}\n".lstrip("\n")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise HalfMarked(f"one of {begin} ... {end} is missing, or they are the wrong way round; put both back")
    return "\n".join([before + begin, "", *lines, "", end]) + after


def _differences(results: Results) -> dict[str, dict[str, Difference]]:
    """For the plot: panel -> arm -> its difference to what the panel names."""
    panels: list[tuple[str, str, Wanted]] = [
        ("LLM minus public only", "public_only", of_llm),
        ("LLM minus self distillation", "self_distillation", of_llm),
        ("sites' own domain minus private only", "private_only", own_domain),
        ("sites' own domain minus private + public", "private_public", own_domain),
    ]
    found: dict[str, dict[str, Difference]] = {}
    for title, other, wanted in panels:
        for arm in results.arms:
            one = results.minus(arm, other, wanted)
            far = not ARMS[arm].plays or arm == "worst_teacher" or (wanted is own_domain and not ARMS[arm].private)
            if one is not None and not far:  # those would squeeze all others
                found.setdefault(title, {})[_shown(arm)] = one
    return found
