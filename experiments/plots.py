"""Plots as SVG files, the same bytes for the same figures."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paired import Difference

GOOD, BAD, OPEN = "#1b7f3b", "#b3261e", "#6b6b6b"  # better, worse, and not told apart
ROW_INCHES, PANEL_INCHES = 0.32, 0.8


def forest(panels: Mapping[str, Mapping[str, Difference]], path: Path) -> None:
    """One panel for each comparison: every arm's mean difference with its interval, and zero as a line."""
    heights = [ROW_INCHES * len(arms) + PANEL_INCHES for arms in panels.values()]
    with matplotlib.rc_context({"svg.hashsalt": "fedmkt", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(7, sum(heights)), layout="constrained")
        rows = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
        for axes, (title, arms) in zip(rows[:, 0], panels.items(), strict=True):
            _panel(axes, title, arms)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})


def _panel(axes: Axes, title: str, arms: Mapping[str, Difference]) -> None:
    axes.axvline(0, color="black", linewidth=0.8)
    for place, found in enumerate(arms.values()):
        colour = OPEN if not found.clear else GOOD if found.mean < 0 else BAD
        axes.plot([found.low, found.high], [place, place], color=colour, linewidth=2)
        axes.plot([found.mean], [place], "o", color=colour, markersize=5)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_xlabel("bits per byte, lower is better")
    axes.spines[["top", "right"]].set_visible(False)
