"""`fedmkt adapter`: which version of the LLM's adapter counts, and its files."""

import json
import shutil
import tarfile
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmkt.errors import Refusal
from fedmkt.operator_commands import DEFAULT_URL, AsJson, CredentialsPath, FederationId, Token, Url, connect

if TYPE_CHECKING:  # pydantic and httpx take half of the time that --help may take
    from fedmkt.client import CoordinatorClient
    from fedmkt.protocol import AdapterView

adapter_app = typer.Typer(
    help="List, promote, roll back, download and export the LLM's adapters.", no_args_is_help=True
)

CARD = "README.md"
PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors", CARD)
WEIGHTS = "weights.safetensors"

Version = Annotated[int, typer.Argument(min=0, help="Version; `fedmkt adapter list` shows them.")]


class FolderExists(Refusal):
    status = 409
    code = "cli.folder_exists"
    title = "The folder is there already"


class StrangeAdapter(Refusal):
    code = "adapter.malformed"
    title = "The adapter cannot be read"


class NothingToDownload(Refusal):
    status = 409
    code = "adapter.no_artifact"
    title = "The version has no adapter"
    remedy = "Use the base model as it is, or name a later version: `fedmkt adapter list FEDERATION`."


@adapter_app.command("list")
def list_adapters(
    federation_id: FederationId,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """List the versions, newest first, with held-out quality; the one marked * is what the next round starts from.

    Example: fedmkt adapter list fed_0123456789abcdef
    """
    with connect(url, token, credentials) as client:
        views = _all(client, federation_id)
    if as_json:
        typer.echo(json.dumps([view.model_dump(mode="json") for view in views], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "version", "parent", "made", "held-out bits per byte", "learned from", box=None)
    for view in views:
        quality = view.evaluations.get("all")
        table.add_row(
            "*" if view.promoted else "",
            str(view.version),
            "" if view.parent is None else str(view.parent),
            f"{view.created_at:%Y-%m-%d %H:%M} UTC",
            "" if quality is None else f"{quality.bits_per_byte:.3f}",
            ", ".join(view.knowledge) if view.version else "nobody: the bare base model",
        )
    Console().print(table)


@adapter_app.command("promote")
def promote(
    federation_id: FederationId,
    version: Version,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Let the next round start from this version. Refused while a round distils: it is about to decide itself.

    Example: fedmkt adapter promote fed_0123456789abcdef 3
    """
    with connect(url, token, credentials) as client:
        _print_promoted(client.promote_adapter(federation_id, version), as_json)


@adapter_app.command("rollback")
def roll_back(
    federation_id: FederationId,
    to: Annotated[int | None, typer.Option(min=0, help="Version to go back to [its parent]; 0: bare model.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Go back from the promoted version to its parent, or to the one that is named.

    Example: fedmkt adapter rollback fed_0123456789abcdef
    """
    with connect(url, token, credentials) as client:
        (now,) = [view for view in _all(client, federation_id) if view.promoted]
        _print_promoted(client.roll_back_adapter(federation_id, now.version, to), as_json)


@adapter_app.command("download")
def download(
    federation_id: FederationId,
    version: Annotated[int | None, typer.Argument(min=1, help="Version [the promoted one].")] = None,
    out: Annotated[Path | None, typer.Option(help="New folder [NAME-adapter-VERSION].")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an adapter and its model card as a PEFT folder, for `PeftModel.from_pretrained`; broken lines are sat out.

    A federation without LoRA has no adapters: then it is the weights that differ from the base model's.

    Example: fedmkt adapter download fed_0123456789abcdef --out adapter
    """
    with connect(url, token, credentials) as client:
        name = client.federation(federation_id).config.name
        view = _chosen(client, federation_id, version)
        folder = new_folder(out or Path(f"{name}-adapter-{view.version}"))
        files = _fetch(client, view, folder)
    if as_json:
        typer.echo(json.dumps({"folder": str(folder), "version": view.version, "files": files}))
    else:
        typer.echo(f"{folder}: {', '.join(files)} of version {view.version}")


def downloaded(
    source: str, version: int | None, draft: Path, url: str, token: str | None, credentials: Path | None
) -> Path:
    """The folder `source`, or the version of the federation `source`, which is put below `draft`."""
    if Path(source).is_dir():
        return Path(source)
    with connect(url, token, credentials) as client:
        _fetch(client, _chosen(client, source, version), draft / "adapter")
    return draft / "adapter"


def new_folder(folder: Path) -> Path:
    """The folder, which must not be there; those above it are made."""
    if folder.exists():
        raise FolderExists(f"{folder} is there already; name another folder with --out")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    return folder


def _fetch(client: "CoordinatorClient", view: "AdapterView", folder: Path) -> list[str]:
    """The version's files into a new folder, which is whole or not there."""
    if view.artifact is None:
        raise NothingToDownload(f"version {view.version} is the bare base model: there is nothing to download")
    with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name}.") as draft:
        path = client.fetch_artifact(view.artifact, Path(draft))
        files = _unpack(path, Path(draft) / "folder")
        (Path(draft) / "folder").rename(folder)
    return files


def _unpack(artifact: Path, folder: Path) -> list[str]:
    """What the artifact holds, into a new folder: a PEFT folder, or the weights of full training; and its card."""
    folder.mkdir()
    if not tarfile.is_tarfile(artifact):
        return _unpack_weights(artifact, folder)
    with tarfile.open(artifact) as tar:
        members = tar.getmembers()
        for member in members:
            content = tar.extractfile(member) if member.isreg() and member.name in PEFT_FILES else None
            if content is None:
                raise StrangeAdapter(
                    f"the adapter holds {member.name[:100]!r}, which no PEFT folder has: do not use it"
                )
            with content, (folder / member.name).open("wb") as file:
                shutil.copyfileobj(content, file)
    return [member.name for member in members]


def _unpack_weights(artifact: Path, folder: Path) -> list[str]:
    """The card is in the weights' metadata: a safetensors file has room for it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(artifact, framework="numpy") as file:
            card = (file.metadata() or {}).get(CARD)
    except SafetensorError as error:
        raise StrangeAdapter(f"the adapter is neither a tar nor a safetensors file: {error}; do not use it") from error
    artifact.rename(folder / WEIGHTS)
    if card is None:
        return [WEIGHTS]
    (folder / CARD).write_text(card, encoding="utf-8")
    return [WEIGHTS, CARD]


def _chosen(client: "CoordinatorClient", federation_id: str, version: int | None) -> "AdapterView":
    if version is not None:
        return client.adapter(federation_id, version)
    (promoted,) = [view for view in _all(client, federation_id) if view.promoted]
    return promoted


def _all(client: "CoordinatorClient", federation_id: str) -> "list[AdapterView]":
    from fedmkt.calls import all_items

    return list(all_items(partial(client.adapters, federation_id)))


def _print_promoted(view: "AdapterView", as_json: bool) -> None:
    if as_json:
        typer.echo(view.model_dump_json(indent=2))
    else:
        typer.echo(f"version {view.version} is promoted: the next round starts from it")
