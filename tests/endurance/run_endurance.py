"""`make endurance`: the demo's federation for many rounds, once left alone and once with agents killed at random.

python tests/endurance/run_endurance.py [--rounds 20] [--pause 12] [--seed 0]

Both runs are real processes over HTTP with the same seed. Asked: every round completes, no process grows, and whoever
is killed ends where it would have ended undisturbed. A table, and runs/endurance/report.json; exit status 1 if anything
asked for is missed.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # ships no annotations
from rich.console import Console
from rich.table import Table

RUNS = Path(__file__).resolve().parent.parent.parent / "runs"
FOLDER = RUNS / "endurance"
KILLED = 3  # agents among which the victims are drawn; the demo's fourth is left alone
SETTLED_S = 35.0  # a process that is killed sooner after its start counts as one that cannot start
LOOK_S = 1.0
MAX_GROWTH = 0.10  # of a process's memory, from the second quarter of the run to the last
MAX_DIFFERENCE = 0.005  # bits per byte: a fifth of what a round's gate allows
PROGRAMS = {"fedmkt_coordinator": "coordinator", "fedmkt_llm_server": "llm-server", "fedmkt_client_agent": "agent"}


@dataclass
class Run:
    """What was seen of one run: report.json of the demo, memory by process name, kills by agent."""

    seconds: float = 0.0
    exit_status: int = 0
    report: dict[str, Any] = field(default_factory=dict)
    rss_bytes: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    kills: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def completed(self) -> int:
        return sum(each["state"] == "completed" for each in self.report["rounds"])

    def growth(self) -> dict[str, float]:
        """Median memory of the last quarter over that of the second, less one; of processes that were left alone."""
        found = {}
        for name, values in sorted(self.rss_bytes.items()):
            quarter = len(values) // 4
            if quarter and name not in self.kills:
                early, late = values[quarter : 2 * quarter], values[-quarter:]
                found[name] = statistics.median(late) / statistics.median(early) - 1
        return found

    def quality(self) -> dict[str, float]:
        """Held-out bits per byte at the end, over all domains, by party."""
        return {each["name"]: each["after"]["all"]["bits_per_byte"] for each in self.report["parties"]}


def name_of(process: psutil.Process) -> str | None:
    """coordinator, llm-server or the site's name; None for what is none of them."""
    command = process.cmdline()
    program = next((PROGRAMS[word] for word in command if word in PROGRAMS), None)
    if program != "agent":
        return program
    return Path(command[command.index("--state-dir") + 1]).name


def play(name: str, rounds: int, pause_s: float, seed: int) -> Run:
    """One demo; unless `pause_s` is infinite, an agent is killed about that often (SIGKILL or SIGTERM by chance)."""
    run, order = Run(), random.Random(seed)
    out = FOLDER / name
    command = [sys.executable, "-m", "fedmkt.cli", "demo", "--rounds", str(rounds), "--no-controls", "--out", str(out)]
    began = time.monotonic()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{name}.log").open("wb") as log:
        demo = subprocess.Popen([*command, "--cache", str(RUNS / "cache")], stdout=log, stderr=subprocess.STDOUT)
    next_kill = began + order.expovariate(1 / pause_s) if math.isfinite(pause_s) else math.inf
    try:
        while demo.poll() is None:
            family = look(demo, run)
            if time.monotonic() >= next_kill and kill_one(family, run, order):
                next_kill = time.monotonic() + order.expovariate(1 / pause_s)
            time.sleep(LOOK_S)
    finally:
        demo.terminate()
        run.exit_status = demo.wait()
    run.seconds = time.monotonic() - began
    run.report = json.loads((out / "report.json").read_bytes())
    return run


def look(demo: "subprocess.Popen[bytes]", run: Run) -> dict[str, psutil.Process]:
    """The demo's services that live, by name; notes how much memory each has."""
    family = {}
    for process in psutil.Process(demo.pid).children():
        try:
            name = name_of(process)
            if name is not None:
                run.rss_bytes[name].append(process.memory_info().rss)
                family[name] = process
        except psutil.NoSuchProcess:
            continue  # it ended while it was looked at; the demo starts it again
    return family


def kill_one(family: dict[str, psutil.Process], run: Run, order: random.Random) -> bool:
    """One of the first KILLED agents that has been up for a while; False when there is none yet."""
    agents = sorted(name for name in family if name not in PROGRAMS.values())[:KILLED]
    ripe = [name for name in agents if time.time() - family[name].create_time() > SETTLED_S]
    if not ripe:
        return False
    name = order.choice(ripe)
    if order.random() < 0.5:
        family[name].kill()
    else:
        family[name].terminate()
    run.kills[name] += 1
    return True


def judge(calm: Run, disturbed: Run, rounds: int) -> list[str]:
    missed = [
        f"{name}: {run.completed} of {rounds} rounds completed"
        for name, run in (("calm", calm), ("disturbed", disturbed))
        if run.completed != rounds
    ]
    for name, run in (("calm", calm), ("disturbed", disturbed)):
        for process, growth in run.growth().items():
            if growth > MAX_GROWTH:
                missed.append(f"{name}: {process} grew by {growth:.1%}, at most {MAX_GROWTH:.0%} wanted")
    undisturbed = calm.quality()
    for party, bits in disturbed.quality().items():
        if bits - undisturbed[party] > MAX_DIFFERENCE:
            missed.append(f"{party} ended {bits - undisturbed[party]:.4f} bits per byte worse than left alone")
    if not disturbed.kills:
        missed.append("nobody was killed; run longer, or with a shorter --pause")
    return missed


def figures(run: Run) -> dict[str, Any]:
    return {
        "seconds": round(run.seconds, 1),
        "exit_status": run.exit_status,
        "completed": run.completed,
        "kills": dict(run.kills),
        "restarts": run.report["restarts"],
        "growth": {name: round(value, 4) for name, value in run.growth().items()},
        "rss_mib": {name: round(statistics.median(values) / 2**20, 1) for name, values in run.rss_bytes.items()},
        "bits_per_byte": {name: round(value, 6) for name, value in run.quality().items()},
    }


def show(calm: Run, disturbed: Run, missed: list[str]) -> None:
    table = Table("party", box=None)
    for head in ("bits per byte, left alone", "with kills", "difference", "kills"):
        table.add_column(head, justify="right")
    left_alone = calm.quality()
    for party, bits in disturbed.quality().items():
        was = left_alone[party]
        table.add_row(party, f"{was:.6f}", f"{bits:.6f}", f"{bits - was:+.6f}", str(disturbed.kills.get(party, "")))
    console = Console()
    console.print(table)
    for name, run in (("left alone", calm), ("with kills", disturbed)):
        grown = ", ".join(f"{process} {growth:+.1%}" for process, growth in run.growth().items())
        console.print(f"{name}: {run.completed} rounds in {run.seconds:.0f} s; memory {grown}", highlight=False)
    for line in missed:
        console.print(f"MISSED {line}", style="red", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--pause", type=float, default=12.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    options = parser.parse_args()
    print(f"endurance: {options.rounds} rounds left alone ...", flush=True)
    calm = play("calm", options.rounds, math.inf, options.seed)
    print(f"endurance: {calm.seconds:.0f} s; the same with kills ...", flush=True)
    disturbed = play("disturbed", options.rounds, options.pause, options.seed)
    missed = judge(calm, disturbed, options.rounds)
    report = {"calm": figures(calm), "disturbed": figures(disturbed), "seed": options.seed, "missed": missed}
    (FOLDER / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    show(calm, disturbed, missed)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
