"""A result: one line of JSON for each arm, seed, party, domain and measured round."""

import functools
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fedmkt.protocol import Evaluation, GateReport, SelectionReport

REPOSITORY = Path(__file__).resolve().parent.parent


class Line(BaseModel):
    """Quality on one domain of the test part ("all": all of them); all other figures are the party's, so far.

    precision: share of the samples taught by a site that its domain's own site taught; gold_transfer: of what others
    taught, mean over rounds. Null where nobody taught. bytes: knowledge and adapters on the wire; rows: of knowledge
    sent. setting: digest of the experiment's configuration. seconds: of this arm, from its start to this round's end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experiment: str
    arm: str
    seed: int
    party: str
    own_domain: str | None
    domain: str
    round: int
    bits_per_byte: float
    accuracy: float
    choice_accuracy: float | None
    rouge_l: float | None
    taught: dict[str, int]
    precision: float | None
    gold_transfer: float | None
    rolled_back: int
    bytes_up: int
    bytes_down: int
    rows: int
    private_steps: int
    public_steps: int
    seconds: float
    commit: str
    setting: str


@dataclass
class Account:
    """What a party sent and was taught so far."""

    bytes_up: int = 0
    bytes_down: int = 0
    rows: int = 0
    taught: Counter[str] = field(default_factory=Counter)
    right: int = 0
    by_sites: int = 0
    gold_transfers: list[float] = field(default_factory=list)
    rolled_back: int = 0

    def learned(self, selection: SelectionReport, gate: GateReport | None) -> None:
        self.taught.update({name: count for name, count in selection.taught.items() if count})
        if any(count for name, count in selection.taught.items() if name not in ("self", "none")):
            self.gold_transfers.append(selection.transferred_gold)
        self.rolled_back += gate is not None and gate.decision == "rolled_back"

    def selected(self, right: int, by_sites: int) -> None:
        self.right += right
        self.by_sites += by_sites


def line_of(domain: str, found: Evaluation, account: Account, about: Mapping[str, Any]) -> Line:
    transfers = account.gold_transfers
    return Line(
        domain=domain,
        bits_per_byte=round(found.bits_per_byte, 6),
        accuracy=round(found.accuracy, 6),
        choice_accuracy=found.choice_accuracy,
        rouge_l=found.rouge_l,
        taught=dict(account.taught),
        precision=round(account.right / account.by_sites, 4) if account.by_sites else None,
        gold_transfer=round(sum(transfers) / len(transfers), 4) if transfers else None,
        rolled_back=account.rolled_back,
        bytes_up=account.bytes_up,
        bytes_down=account.bytes_down,
        rows=account.rows,
        **about,
    )


@functools.cache
def commit() -> str:
    """Of the code that plays, with + where it was changed since; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)  # noqa: S603
    return found.stdout.strip()


def write_lines(path: Path, lines: Iterable[Line]) -> None:
    """All of them or none: a file that is there is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text("".join(line.model_dump_json() + "\n" for line in lines), encoding="utf-8")
    draft.replace(path)


def read_lines(path: Path) -> list[Line]:
    return [Line.model_validate_json(line) for line in path.read_text("utf-8").splitlines()]
