"""The harness itself: what it computes from measurements, on values worked by hand."""

from pathlib import Path

import pytest

from benchmarks.harness import (
    Goal,
    Growth,
    Results,
    Timed,
    at_most,
    exponent,
    generated_part,
    ratio_at_most,
    result_table,
)


@pytest.mark.parametrize(
    ("costs", "expected"), [([3, 6, 12], 1.0), ([5, 5, 5], 0.0), ([1, 4, 16], 2.0), ([2, 4, 16], 1.5)]
)
def bench_an_exponent_is_the_slope_of_the_logarithms(costs: list[float], expected: float) -> None:
    assert exponent([10, 20, 40], costs) == pytest.approx(expected)


def bench_a_ratio_is_the_median_over_pairs() -> None:
    assert Timed([1.0, 8.0, 3.0], [2.0, 8.0, 12.0]).ratio == 0.5  # not 3 / 8: each pair saw its own machine


def bench_goals_look_at_ours_or_at_the_ratio() -> None:
    results = Results()
    assert results.add("a", "s", 2.0, 4.0, size="", goal=at_most(2)).reached is True
    assert results.add("b", "s", 2.1, 4.0, size="", goal=at_most(2)).reached is False
    assert results.add("c", "s", 2.1, 4.0, size="", goal=ratio_at_most(0.5)).reached is False
    assert results.add("d", "s", 2.0, 4.0, size="", goal=Goal("ratio", ">=", 0.5)).reached is True
    assert results.add("e", "s", 2.0, None, size="").ratio is None


def bench_growth_needs_three_sizes() -> None:
    results = Results()
    for size, cost in ((1.0, 2.0), (2.0, 4.0)):
        results.grew(Growth("f", size, at_most(1.1)), cost, cost * size, "")
    results.fit()
    assert results.rows == []
    results.grew(Growth("f", 4.0, at_most(1.1)), 8.0, 32.0, "")
    results.fit()
    assert [(row.name, row.ours, row.contender, row.reached) for row in results.rows] == [("growth of f", 1, 2, True)]


def bench_a_partial_run_keeps_the_other_rows(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    first, second = Results(), Results()
    first.add("a", "s", 1.0, 2.0, size="x")
    first.add("b", "s", 3.0, None, size="y")
    first.save(file)
    second.add("a", "s", 5.0, 2.0, size="x")
    assert [(row.name, row.ours) for row in second.save(file)] == [("a", 5.0), ("b", 3.0)]


def bench_the_document_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- t: begin -->\nold\n<!-- t: end -->\nafter\n")
    results = Results()
    results.add("a", "s", 0.5, 2.0, size="x", goal=at_most(1))
    with generated_part("t", document) as lines:
        lines += result_table(results.rows)[2:]
    row = "| a | x | 0.5 | 2 | s | 0.25 | ours ≤ 1 | yes |"
    assert document.read_text() == f"before\n<!-- t: begin -->\n\n{row}\n\n<!-- t: end -->\nafter\n"
    with pytest.raises(ValueError, match="no markers"), generated_part("u", document):
        pass
