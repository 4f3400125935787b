"""`fedmkt agent ledger`: the ledger's lines, put together by transfer."""

import json
from collections.abc import Iterable
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from fedmkt_client_agent.ledger import FILE_NAME, Entry, read_ledger

COLUMNS = ("begun", "done", "", "what", "round", "bytes", "digest", "receipt", "approved")


def show_ledger(state_dir: Path, last: int, *, as_json: bool) -> None:
    transfers = together(read_ledger(state_dir / FILE_NAME))
    if as_json:
        shown = [
            {"begun_at": begun.at.isoformat(), "done_at": None if done is None else done.at.isoformat()}
            | (done or begun).model_dump(mode="json", exclude={"at", "event"})
            for begun, done in transfers[-last:]
        ]
        typer.echo(json.dumps(shown, indent=2))
        return
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for begun, done in transfers[-last:]:
        table.add_row(*_cells(begun, done))
    console = Console()
    console.print(table)
    sent = sum(begun.bytes or 0 for begun, _ in transfers if begun.direction == "up")
    open_ = sum(done is None for _, done in transfers)
    console.print(f"{len(transfers)} transfers, {sent} bytes begun to be sent; {open_} without an end")


def together(entries: Iterable[Entry]) -> list[tuple[Entry, Entry | None]]:
    """Each transfer's begin and its end, None where the file has none: broken off, or still going on."""
    transfers: list[tuple[Entry, Entry | None]] = []
    open_: dict[tuple[str, str | None, str], int] = {}
    for entry in entries:
        key = (entry.kind, entry.round_id, entry.digest)
        if entry.event == "begun":
            open_[key] = len(transfers)
            transfers.append((entry, None))
        elif key in open_:
            at = open_.pop(key)
            transfers[at] = (transfers[at][0], entry)
    return transfers


def _cells(begun: Entry, done: Entry | None) -> list[str]:
    known = done or begun
    return [
        f"{begun.at:%Y-%m-%d %H:%M:%S}Z",
        "" if done is None else f"{done.at:%H:%M:%S}Z",
        {"up": "->", "down": "<-"}[begun.direction],
        begun.kind,
        "" if begun.round_number is None else str(begun.round_number),
        "" if known.bytes is None else str(known.bytes),
        known.digest[:12],
        known.receipt_id or "",
        "" if begun.approved_at is None else f"{begun.approved_at:%Y-%m-%d %H:%M}Z",
    ]
