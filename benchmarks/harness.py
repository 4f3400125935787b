"""Results of a run: pairs of measurements, goals, growth exponents, and the two files that they are written to."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
DOCUMENT = FOLDER.parent / "docs" / "benchmarks.md"
FEWEST_SIZES = 3  # for an exponent

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must reach: `ours`, or the ratio ours / contender, on this side of a bound."""

    what: Literal["ours", "ratio"]
    sense: Literal["<=", ">="]
    bound: float

    def __str__(self) -> str:
        return f"{self.what} {self.sense} {self.bound:g}"

    def reached(self, ours: float, ratio: float | None) -> bool:
        value = ours if self.what == "ours" else ratio
        assert value is not None
        return value <= self.bound if self.sense == "<=" else value >= self.bound


def at_most(bound: float) -> Goal:
    return Goal("ours", "<=", bound)


def at_least(bound: float) -> Goal:
    return Goal("ours", ">=", bound)


def ratio_at_most(bound: float) -> Goal:
    return Goal("ratio", "<=", bound)


@dataclass(frozen=True, slots=True)
class Result:
    """One line of results.json. `ratio` is ours / contender, for times the median of pairs taken one after the other;
    None where nothing is compared. `goal` is None where nothing is demanded.
    """

    name: str
    unit: str
    ours: float
    contender: float | None
    ratio: float | None
    size: str
    goal: str | None = None
    reached: bool | None = None


@dataclass(frozen=True, slots=True)
class Growth:
    """Marks a measurement as one size of a growing family; `x` is what grows."""

    family: str
    x: float
    goal: Goal | None = None


@dataclass(frozen=True, slots=True)
class _Point:
    growth: Growth
    ours: float
    contender: float | None
    size: str


@dataclass
class Results:
    """Everything that one session measured, in the order of the measurements."""

    rows: list[Result] = field(default_factory=list)
    _points: dict[str, list[_Point]] = field(default_factory=dict)

    def add(
        self,
        name: str,
        unit: str,
        ours: float,
        contender: float | None,
        *,
        size: str,
        ratio: float | None = None,
        goal: Goal | None = None,
    ) -> Result:
        """A figure in any unit; the ratio is that of the two numbers unless a better one is given."""
        if ratio is None and contender:
            ratio = ours / contender
        found = Result(
            name,
            unit,
            _rounded(ours),
            None if contender is None else _rounded(contender),
            None if ratio is None else _rounded(ratio),
            size,
            None if goal is None else str(goal),
            None if goal is None else goal.reached(ours, ratio),
        )
        self.rows = [row for row in self.rows if row.name != name] + [found]
        return found

    def grew(self, growth: Growth, ours: float, contender: float | None, size: str) -> None:
        """One size of a family, in a unit of cost (seconds, bytes): rates are no use for exponents."""
        self._points.setdefault(growth.family, []).append(_Point(growth, ours, contender, size))

    def fit(self) -> None:
        """Add the exponent of every family that has enough sizes."""
        for family, points in self._points.items():
            points = sorted(points, key=lambda point: point.growth.x)
            if len({point.growth.x for point in points}) < FEWEST_SIZES:
                continue
            sizes = [point.growth.x for point in points]
            theirs = [point.contender for point in points if point.contender is not None]
            self.add(
                f"growth of {family}",
                "exponent",
                exponent(sizes, [point.ours for point in points]),
                exponent(sizes, theirs) if len(theirs) == len(sizes) else None,
                size=f"{points[0].size} to {points[-1].size}, {len(points)} sizes",
                goal=points[0].growth.goal,
            )

    def save(self, file: Path = RESULTS) -> list[Result]:
        """Merge into the file: a row replaces the one of the same name, others stay, so a partial run loses nothing."""
        old = [Result(**row) for row in json.loads(file.read_text())] if file.is_file() else []
        mine = {row.name: row for row in self.rows}
        merged = [mine.pop(row.name, row) for row in old] + list(mine.values())
        lines = ",\n".join("  " + json.dumps(asdict(row), ensure_ascii=False) for row in merged)
        file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return merged


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost over log size by least squares: 1 is linear, 0 constant."""
    return statistics.linear_regression(list(map(math.log, sizes)), list(map(math.log, costs))).slope


def _rounded(value: float) -> float:
    """Four significant digits: more are noise."""
    return float(f"{value:.4g}")


# ------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of both sides over the rounds; the contender's already scaled to the whole of the work."""

    ours: Sequence[float]
    contender: Sequence[float]

    @property
    def ratio(self) -> float:
        """Median of ours / contender over the pairs."""
        return statistics.median(a / b for a, b in zip(self.ours, self.contender, strict=True))


class Paired(Protocol):
    """Times ours and the contender in turn and records the medians.

    `amount` units of work a call make a rate in `unit`; without it the result is in seconds. `share`: the part of the
    work that the contender does in one call, where all of it would take too long. A contender of None stands alone.
    """

    def __call__(
        self,
        name: str,
        ours: Call,
        contender: Call | None,
        *,
        size: str,
        unit: str = "s",
        amount: float | None = None,
        share: float = 1.0,
        rounds: int = 5,
        goal: Goal | None = None,
        growth: Growth | None = None,
    ) -> Result: ...


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ the document


@contextmanager
def generated_part(name: str, document: Path = DOCUMENT) -> Iterator[list[str]]:
    """Yields a list of lines; at the end they replace what stands between the document's markers of that name."""
    lines: list[str] = []
    yield lines
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{document.name} has no markers {begin} ... {end}; put them back where the table belongs")
    document.write_text("\n".join([before + begin, "", *lines, "", end]) + after, encoding="utf-8")


def result_table(rows: Sequence[Result]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| figure | size | ours | contender | unit | ours / contender | goal | reached |",
        "|---|---|--:|--:|---|--:|---|---|",
    ]
    for row in rows:
        reached = {True: "yes", False: "**no**", None: ""}[row.reached]
        goal = "" if row.goal is None else row.goal.replace("<=", "≤").replace(">=", "≥")
        numbers = [_shown(row.ours), _shown(row.contender), row.unit, _shown(row.ratio)]
        lines.append(f"| {' | '.join([row.name, row.size, *numbers, goal, reached])} |")
    return lines


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    if value and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
