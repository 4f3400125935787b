"""`make load`: the parts of the load, one after the other, as a table and as runs/load/report.json.

python tests/load/run_load.py [polls] [ingest] [crowd] [soak]      all of them if none is named
"""

import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "coordinator")]

from rich.console import Console  # noqa: E402 - the path comes first
from rich.table import Table  # noqa: E402

from load_parts import KEPT_FILES, crowd, ingest, polls, soak  # noqa: E402
from load_world import many_files  # noqa: E402

PARTS: dict[str, Callable[[Path], Awaitable[dict[str, Any]]]] = {
    "polls": polls,
    "ingest": ingest,
    "crowd": crowd,
    "soak": soak,
}
# What must hold: (part, figure, at least or at most, bound).
BOUNDS = (
    ("polls", "share_of_bare", "at least", 0.5),
    ("ingest", "share_of_bare", "at least", 0.6),
    ("crowd", "errors", "at most", 0),
    ("crowd", "files_left", "at most", KEPT_FILES),
    ("soak", "rss_spread", "at most", 0.10),
    ("soak", "files_change", "at most", 6),
    ("soak", "tasks_change", "at most", 2),
)
REPORT = TESTS.parent / "runs" / "load" / "report.json"


def main() -> int:
    chosen = sys.argv[1:] or list(PARTS)
    unknown = sorted(set(chosen) - PARTS.keys())
    if unknown:
        print(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    many_files(9000)
    report: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "python": platform.python_version()}, "parts": {}}
    for name in chosen:
        print(f"load: {name} ...", flush=True)
        report["parts"][name] = _play(name)
    report["missed"] = _missed(report["parts"])
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(json.dumps(report, indent=2) + "\n")
    _show(report)
    return 1 if report["missed"] else 0


def _play(name: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix=f"fedmkt-load-{name}-"))  # on a disk: fsync is part of what is measured
    began = time.monotonic()
    try:
        figures = asyncio.run(PARTS[name](folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {**figures, "seconds": round(time.monotonic() - began, 1)}


def _missed(parts: dict[str, dict[str, Any]]) -> list[str]:
    missed = []
    for part, figure, side, bound in BOUNDS:
        found = parts.get(part, {}).get(figure)
        if found is not None and (found < bound if side == "at least" else found > bound):
            missed.append(f"{part}: {figure} is {found}, {side} {bound} is wanted")
    return missed


def _show(report: dict[str, Any]) -> None:
    table = Table("part", "figure", "value")
    for part, figures in report["parts"].items():
        for number, (figure, value) in enumerate(figures.items()):
            table.add_row(part if number == 0 else "", figure, f"{value:,}" if isinstance(value, int) else str(value))
    console = Console()
    console.print(table)
    for line in report["missed"]:
        console.print(f"missed: {line}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
