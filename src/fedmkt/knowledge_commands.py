"""`fedmkt knowledge`: what a site is about to send, before it is sent."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmkt.errors import Refusal

if TYPE_CHECKING:  # numpy takes half of the time that --help may take
    from fedmkt.knowledge_report import KnowledgeView
    from fedmkt.public_set import PublicSet
    from fedmkt.vocabulary import Vocabulary

knowledge_app = typer.Typer(help="Look at knowledge before it is sent; nothing leaves.", no_args_is_help=True)


class NothingNamed(Refusal):
    code = "knowledge.nothing_named"
    title = "No knowledge is named"
    remedy = "For example: `fedmkt knowledge inspect FILE`."


@knowledge_app.callback()
def knowledge() -> None:
    """A group, although it has one command so far."""


@knowledge_app.command("inspect")
def inspect(
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False, help="A knowledge blob.")] = None,
    pending: Annotated[
        bool, typer.Option("--pending", help="What the agent of --state-dir sends in this round.")
    ] = False,
    state_dir: Annotated[
        Path, typer.Option(envvar="FEDMKT_STATE_DIR", help="The agent's: vocabulary and public set lie there.")
    ] = Path("fedmkt-agent"),
    samples: Annotated[int, typer.Option(min=0, help="Samples to show.")] = 3,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each.")] = 5,
    entries: Annotated[int, typer.Option(min=1, help="Tokens of each row.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Show what is in knowledge and what is not: sizes, samples, rows, the most likely tokens as text.

    Example: fedmkt knowledge inspect --pending --state-dir agent
    """
    from fedmkt.knowledge import read_index
    from fedmkt.knowledge_report import view
    from fedmkt.outbox import Outbox

    shown: dict[str, object] = {}
    if pending:
        outbox = Outbox(state_dir)
        about = outbox.pending()
        shown = {"round_id": about.round_id, "round_number": about.round_number, "approved": outbox.approved(about)}
        shown["files"] = {item: each.model_dump(exclude={"made_with"}) for item, each in about.items.items()}
        if "report" in about.items:
            shown["report"] = json.loads(outbox.read("report"))
        blob = outbox.read("knowledge") if "knowledge" in about.items else None
    elif file is not None:
        blob = file.read_bytes()
    else:
        raise NothingNamed("name a file, or ask for --pending with the agent's --state-dir")
    seen = None
    if blob is not None:
        header = read_index(blob).header
        vocabulary = _vocabulary(state_dir, header.vocabulary_fingerprint)
        public_set = _public_set(state_dir, header.public_set_digest)
        seen = view(blob, vocabulary=vocabulary, public_set=public_set, samples=samples, rows=rows, entries=entries)
        shown["knowledge"] = seen.as_dict()
    typer.echo(json.dumps(shown, indent=2) if as_json else "\n".join(_pending_lines(shown) + _lines(seen)))


def _vocabulary(state_dir: Path, fingerprint: str) -> "Vocabulary | None":
    from fedmkt.vocabulary import Vocabulary

    path = state_dir / "vocabulary"
    found = Vocabulary.from_bytes(path.read_bytes()) if path.exists() else None
    return found if found is not None and found.fingerprint == fingerprint else None


def _public_set(state_dir: Path, digest: str) -> "PublicSet | None":
    from fedmkt.public_set import PublicSet

    path = state_dir / "artifacts" / digest
    return PublicSet.from_jsonl(path.read_bytes()) if path.exists() else None


def _pending_lines(shown: dict[str, object]) -> list[str]:
    if "files" not in shown:
        return []
    files = shown["files"]
    assert isinstance(files, dict)
    state = "approved" if shown["approved"] else "not approved"
    lines = [f"round {shown['round_number']} ({shown['round_id']}), {state}"]
    lines += [f"  {item}: {each['bytes']} bytes, SHA-256 {each['digest']}" for item, each in files.items()]
    if "report" in shown:
        lines.append(f"  report: {json.dumps(shown['report'])}")
    return lines


def _lines(seen: "KnowledgeView | None") -> list[str]:
    if seen is None:
        return []
    from fedmkt.knowledge_report import CAUTION

    least, mean, most = seen.entries_a_row
    head = seen.header
    lines = [
        f"knowledge of round {head.round_number}, slice {head.slice_index}, {seen.bytes} bytes, SHA-256 {seen.digest}",
        f"  {seen.samples} public samples, {seen.rows} rows, {seen.entries} tokens",
        f"  {least} to {most} tokens a row, {mean} on average",
        f"  model {head.model_id}, adapter {head.adapter_version}, top_k {head.top_k}, top_p {head.top_p:g}",
        "in it:",
        *(f"  - {each}" for each in seen.contained),
        "not in it:",
        *(f"  - {each}" for each in seen.not_contained),
        CAUTION,
    ]
    for sample in seen.shown:
        lines.append(f"public sample {sample.number} ({sample.sample_id or 'id unknown here'}), {sample.rows} rows:")
        for row in sample.shown:
            guesses = ", ".join(f"{guess.token!r} {guess.probability:.1%}" for guess in row.guesses)
            lines.append(f"  after {row.after!r}: {guesses}; the text goes on with {row.next_probability:.1%}")
    return lines
