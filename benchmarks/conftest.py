"""The `paired` and `results` fixtures; at the end of a session the results go to results.json and the document."""

import datetime
import os
import platform
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.data import data_folder
from benchmarks.harness import (
    Call,
    Goal,
    Growth,
    Paired,
    Result,
    Results,
    Timed,
    generated_part,
    result_table,
    seconds,
)

RESULTS = pytest.StashKey[Results]()
THREADS = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = Results()
    torch.set_num_threads(THREADS)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[RESULTS]


@pytest.fixture
def paired(benchmark: BenchmarkFixture, results: Results) -> Paired:
    def measure(
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
    ) -> Result:
        timed = _alternate(benchmark, ours, contender, share, rounds)
        mine = statistics.median(timed.ours)
        theirs = statistics.median(timed.contender) if timed.contender else None
        if growth is not None:
            results.grew(growth, mine, theirs, size)
        ratio = timed.ratio if timed.contender else None
        if amount is not None:
            mine, theirs = amount / mine, None if theirs is None else amount / theirs
            ratio = None if ratio is None else 1 / ratio
        return results.add(name, unit, mine, theirs, size=size, ratio=ratio, goal=goal)

    return measure


def _alternate(benchmark: BenchmarkFixture, ours: Call, contender: Call | None, share: float, rounds: int) -> Timed:
    """The contender runs as the set-up of each round of ours, so both see the same machine. One call of each warms."""
    theirs: list[float] = []

    def before() -> None:
        if contender is not None:
            theirs.append(seconds(contender) / share)

    ours()
    before()
    theirs.clear()
    benchmark.pedantic(ours, setup=before, rounds=rounds)  # type: ignore[no-untyped-call]  # not annotated there
    assert benchmark.stats is not None
    return Timed(list(benchmark.stats.stats.data), theirs)


# ------------------------------------------------------------------------------------------------ the session's end


def pytest_sessionfinish(session: pytest.Session) -> None:
    results = session.config.stash[RESULTS]
    results.fit()
    if not results.rows:
        return
    rows = results.save()
    with generated_part("results") as lines:
        lines += [*_machine(), "", *result_table(rows)]


def _machine() -> Iterator[str]:
    """What the figures were measured on, in a sentence."""
    names = "numpy", "torch", "rapidfuzz", "tokenizers", "zstandard"
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    data = "real tokenizers and models" if data_folder() else "generated tokenizers (no data folder)"
    today = datetime.datetime.now(datetime.UTC).date()
    yield f"{today}, {os.cpu_count()} cores ({_processor()}), {THREADS} threads, Python {platform.python_version()},"
    yield f"{versions}; {data}."


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for row in config.stash[RESULTS].rows:
        against = "" if row.contender is None else f"  against {row.contender:,.4g}, ratio {row.ratio or 0:.4g}"
        reached = {True: "  reached", False: "  MISSED", None: ""}[row.reached]
        goal = "" if row.goal is None else f"  goal {row.goal}"
        terminalreporter.write_line(f"{row.name} ({row.size}): {row.ours:,.4g} {row.unit}{against}{goal}{reached}")
