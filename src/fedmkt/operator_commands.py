"""`fedmkt federation`, `fedmkt site`, `fedmkt rounds`: what an operator does, over the coordinator's API."""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmkt.errors import Refusal

if TYPE_CHECKING:  # pydantic and httpx take half of the time that --help may take
    from fedmkt.client import CoordinatorClient
    from fedmkt.protocol import FederationView

PATIENCE_S = 10.0  # of a command that a person waits for
CREDENTIALS_FILE = "credentials.json"  # what `fedmkt coordinator init` writes

federation_app = typer.Typer(help="Create federations and look at them.", no_args_is_help=True)
site_app = typer.Typer(help="Let sites in.", no_args_is_help=True)
rounds_app = typer.Typer(help="Ask for rounds, schedule, pause and watch them.", no_args_is_help=True)

Url = Annotated[str, typer.Option("--coordinator", envvar="FEDMKT_COORDINATOR_URL", help="Address of the coordinator.")]
Token = Annotated[
    str | None,
    typer.Option(envvar="FEDMKT_OPERATOR_TOKEN", help="Operator's token; else it is read from --credentials."),
]
CredentialsPath = Annotated[
    Path | None, typer.Option("--credentials", help=f"The coordinator's {CREDENTIALS_FILE} [in FEDMKT_STATE_DIR].")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
FederationId = Annotated[str, typer.Argument(help="Federation id; `fedmkt federation show` lists them.")]
DEFAULT_URL = "http://127.0.0.1:8700"


class NoToken(Refusal):
    code = "cli.no_token"
    title = "No operator's token was given"
    remedy = "The operator's token is in credentials.json of the coordinator's state folder, or in its settings."


class BadTime(Refusal):
    code = "cli.bad_time"
    title = "An option is no length of time"


class ConfigUnreadable(Refusal):
    code = "cli.config_unreadable"
    title = "The configuration file cannot be read"


def connect(url: str, token: str | None, credentials: Path | None) -> "CoordinatorClient":
    """A client that has shaken hands."""
    from fedmkt.client import CoordinatorClient, RetryPolicy, StaticToken

    secret = StaticToken(token or _operator_token(credentials))
    client = CoordinatorClient(url, secret, retry=RetryPolicy(patience_s=PATIENCE_S))
    client.check_version()
    return client


def _operator_token(credentials: Path | None) -> str:
    path = credentials or Path(os.environ.get("FEDMKT_STATE_DIR", "fedmkt-state")) / CREDENTIALS_FILE
    try:
        return str(json.loads(path.read_bytes())["operator"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NoToken(
            f"no operator's token: set FEDMKT_OPERATOR_TOKEN, or name the coordinator's {CREDENTIALS_FILE} with "
            f"--credentials ({path}: {type(error).__name__})"
        ) from error


# ------------------------------------------------------------------------------------------------ federations


@federation_app.command("create")
def create(
    config: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Configuration, JSON or TOML.")],
    public: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Public set to upload, JSONL.")
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Create a federation from a configuration file, and upload its public set.

    Example: fedmkt federation create clinics.toml --public public.jsonl
    """
    from fedmkt.protocol import FederationConfig

    wanted = FederationConfig.model_validate(_read_config(config))
    with connect(url, token, credentials) as client:
        view = client.create_federation(wanted)
        if public is not None:
            client.put_public_set(view.federation_id, public.read_bytes())
            view = client.federation(view.federation_id)
    _print_federation(view, as_json)


@federation_app.command("show")
def show(
    federation_id: Annotated[str | None, typer.Argument(help="Federation id; all of them when left out.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Show one federation, or list all.

    Example: fedmkt federation show
    """
    with connect(url, token, credentials) as client:
        if federation_id is not None:
            _print_federation(client.federation(federation_id), as_json)
            return
        views = list(client.federations())
    if as_json:
        typer.echo(json.dumps([view.model_dump(mode="json") for view in views], indent=2))
        return
    for view in views:
        typer.echo(
            f"{view.federation_id}  {view.config.name}  {len(view.sites)} sites  "
            f"{view.rounds_finished} of {view.rounds_requested} rounds finished"
        )
    if not views:
        typer.echo("no federation yet: fedmkt federation create CONFIG --public FILE.jsonl")


def _read_config(path: Path) -> object:
    import tomllib

    try:
        return tomllib.loads(path.read_text()) if path.suffix == ".toml" else json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigUnreadable(f"{path}: {error}; write JSON, or TOML in a file that ends in .toml") from error


def _print_federation(view: "FederationView", as_json: bool) -> None:
    if as_json:
        typer.echo(view.model_dump_json(indent=2))
        return
    from rich.console import Console

    from fedmkt.watch import Sight, screen

    console = Console()
    console.print(view.federation_id, style="bold", highlight=False)
    console.print(screen(Sight(view)))


# ------------------------------------------------------------------------------------------------ sites and rounds


@site_app.command("token")
def issue_token(
    federation_id: FederationId,
    site: Annotated[str, typer.Argument(help="One of the sites that the configuration names.")],
    out: Annotated[Path | None, typer.Option(help="Write the token to this new file, for its owner alone.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Issue a one-time token with which a site enrols; hand it over on a safe way.

    Example: fedmkt site token fed_0123456789abcdef clinic --out clinic.token
    """
    with connect(url, token, credentials) as client:
        issued = client.issue_enrolment_token(federation_id, site)
    if out is not None:
        write_secret(out, issued.token + "\n")
    if as_json:
        typer.echo(issued.model_dump_json(exclude={"token"} if out is not None else None))
    elif out is None:
        typer.echo(issued.token)
    else:
        typer.echo(
            f"{out} holds the token of {issued.site}, good once and until {issued.expires_at:%Y-%m-%d %H:%M} UTC"
        )


def write_secret(path: Path, content: str) -> None:
    """A new file that only its owner can read. FileExistsError where there is one."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(content)


@rounds_app.command("start")
def start(
    federation_id: FederationId,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Rounds, one after the other [1]; with --every, when to stop [never]."),
    ] = None,
    every: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="A round now and then every so often: 90s, 15m, 12h, 1d. See below."),
    ] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Ask for rounds; they begin as soon as the LLM server and a quorum of sites are there.

    With --every a schedule takes the place of the one before: never two rounds at once; a time that passes while one
    runs, or while they are paused, is made up once. `rounds pause` holds it, `rounds cancel` ends it.

    Example: fedmkt rounds start fed_0123456789abcdef --count 3

    Every night for a month: fedmkt rounds start fed_0123456789abcdef --every 1d --count 30
    """
    every_s = None if every is None else seconds(every)
    with connect(url, token, credentials) as client:
        _print_rounds(client.request_rounds(federation_id, count, every_s), as_json)


@rounds_app.command("pause")
def pause(
    federation_id: FederationId,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Begin no more rounds until `rounds resume`; the running one ends as it would. Sites are told.

    Example: fedmkt rounds pause fed_0123456789abcdef
    """
    with connect(url, token, credentials) as client:
        _print_rounds(client.pause_rounds(federation_id), as_json)


@rounds_app.command("resume")
def resume(
    federation_id: FederationId,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Begin rounds again: those asked for, and one for all the scheduled times that passed meanwhile.

    Example: fedmkt rounds resume fed_0123456789abcdef
    """
    with connect(url, token, credentials) as client:
        _print_rounds(client.resume_rounds(federation_id), as_json)


@rounds_app.command("cancel")
def cancel(
    federation_id: FederationId,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """End the running round now, withdraw those that were to follow, and end the schedule.

    What sites have uploaded for the running round is not used; adapters stay as they are.

    Example: fedmkt rounds cancel fed_0123456789abcdef
    """
    with connect(url, token, credentials) as client:
        _print_rounds(client.cancel_rounds(federation_id), as_json)


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `12h` or `1d` in seconds."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd]?)", text.strip())
    if found is None:
        raise BadTime(f"{text!r} is no time; write a number and s, m, h or d, for example 90s, 15m, 12h or 1d")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _print_rounds(view: "FederationView", as_json: bool) -> None:
    if as_json:
        typer.echo(view.model_dump_json(indent=2))
        return
    said = [f"{view.rounds_finished} of {view.rounds_requested} rounds finished"]
    if view.current_round is not None:
        said.append(f"round {view.current_round.number} is {view.current_round.state}")
    if view.schedule is not None:
        left = "" if view.schedule.rounds_left is None else f", {view.schedule.rounds_left} left"
        next_at = view.schedule.next_round_at
        said.append(f"every {view.schedule.every_s:g} s{left}, next at {next_at:%Y-%m-%d %H:%M:%S} UTC")
    if view.paused_at is not None and not view.waits_for:
        said.append("paused once it has ended: fedmkt rounds resume")
    if view.waits_for:
        said.append(f"waits for {'; '.join(view.waits_for)}")
    typer.echo("; ".join(said))


@rounds_app.command("watch")
def watch(
    federation_id: FederationId,
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Show the rounds as they go on, until all that were asked for have ended, and the schedule if there is one.

    --json prints the present state once.

    Example: fedmkt rounds watch fed_0123456789abcdef --coordinator https://fedmkt.example.org
    """
    from rich.console import Console

    from fedmkt.watch import Watcher, follow

    with connect(url, token, credentials) as client:
        watcher = Watcher(client, federation_id)
        if as_json:
            sight = watcher.look()
            rounds = [each.model_dump(mode="json") for each in sight.rounds]
            typer.echo(json.dumps({"federation": sight.federation.model_dump(mode="json"), "rounds": rounds}, indent=2))
            return
        last = follow(
            watcher.look,
            until=lambda sight: (
                sight.federation.rounds_finished >= sight.federation.rounds_requested
                and sight.federation.schedule is None
            ),
            console=Console(),
        )
    if any(each.state != "completed" for each in last.rounds):
        raise typer.Exit(1)
