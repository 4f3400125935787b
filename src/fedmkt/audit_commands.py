"""`fedmkt audit`: take the coordinator's audit log along, and check that nobody has tampered with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmkt.operator_commands import DEFAULT_URL, AsJson, CredentialsPath, Token, Url, connect

if TYPE_CHECKING:  # pydantic and httpx take half of the time that --help may take
    from fedmkt.client import CoordinatorClient
    from fedmkt.protocol import AuditEntry, AuditHead

audit_app = typer.Typer(help="The coordinator's audit log: take it along, check it.", no_args_is_help=True)


@audit_app.command("verify")
def verify(
    log: Annotated[
        Path | None, typer.Argument(exists=True, dir_okay=False, help="An exported log; the coordinator's if left out.")
    ] = None,
    head: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A head kept from an earlier time.")
    ] = None,
    save_head: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Keep the present head here; best on another machine.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Check every row of the audit log, and that it still holds what a kept head knew; status 1 names the broken row.

    Example: fedmkt audit verify --head audit-head.json --save-head audit-head.json
    """
    from fedmkt.audit_chain import check_chain, check_head, read_export, read_head

    kept = [read_head(head)] if head is not None else []
    if log is not None:
        if save_head is not None:
            raise typer.BadParameter("a file has no head to keep: ask the coordinator", param_hint="--save-head")
        for each in kept:
            check_head(each, [each.public_key])
        sequence, digest = check_chain(read_export(log), kept)
    else:
        with connect(url, token, credentials) as client:
            present = client.audit_head()
            for each in [*kept, present]:
                check_head(each, client.keys().public_keys)
            sequence, digest = check_chain(entries(client), [*kept, present])
        if save_head is not None:
            _write(save_head, present)
    if as_json:
        typer.echo(json.dumps({"rows": sequence, "digest": digest, "heads": [each.sequence for each in kept]}))
    else:
        held = f", and the kept head of row {kept[0].sequence} is in it" if kept else ""
        typer.echo(f"{sequence} rows, each follows the one before{held}; the last has digest {digest}")


@audit_app.command("export")
def export(
    log: Annotated[Path, typer.Argument(dir_okay=False, help="Write the log here, one JSON object a line.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
) -> None:
    """Write the whole audit log to a file that `fedmkt audit verify FILE` checks without the coordinator.

    Example: fedmkt audit export audit.jsonl
    """
    with connect(url, token, credentials) as client, log.open("w", encoding="utf-8") as file:
        rows = 0
        for rows, entry in enumerate(entries(client), start=1):  # noqa: B007 - the last one is the number of rows
            file.write(entry.model_dump_json() + "\n")
    typer.echo(f"{log} holds {rows} rows")


def entries(client: "CoordinatorClient") -> "Iterator[AuditEntry]":
    """The whole log, page by page."""
    from fedmkt.calls import all_items

    return all_items(client.audit)


def _write(path: Path, head: "AuditHead") -> None:
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(head.model_dump_json(indent=2) + "\n", encoding="utf-8")
    draft.replace(path)  # a head that is replaced by half a head is lost
