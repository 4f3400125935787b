"""`fedmkt agent`: options over FEDMKT_ variables, then the agent until SIGTERM."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmkt.settings import read_settings
from fedmkt_client_agent.settings import Settings

DEFAULT_STATE_DIR = Path("fedmkt-agent")

app = typer.Typer(
    add_completion=False,
    help="Run the agent of one site: private text stays here, knowledge of the public set is shared.",
)


StateDir = Annotated[Path, typer.Option(envvar="FEDMKT_STATE_DIR", help="the agent's state folder")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, for scripts")]


@app.command()
def approve(
    state_dir: StateDir = DEFAULT_STATE_DIR,
    round_number: Annotated[
        int | None, typer.Option("--round", min=1, help="refuse to approve any other round")
    ] = None,
) -> None:
    """Let the round that waits go on, where the policy says require_approval.

    It covers the knowledge, and the adapter, exactly as they lie there now, and the report at the end of the round.

    Example: fedmkt knowledge inspect --pending && fedmkt agent approve --round 3
    """
    from fedmkt_client_agent.approval import approve_pending

    approval = approve_pending(state_dir, round_number)
    typer.echo(f"round {approval.round_number} approved: {len(approval.digests)} files, and its report")


@app.command()
def ledger(
    state_dir: StateDir = DEFAULT_STATE_DIR,
    last: Annotated[int, typer.Option(min=1, help="how many transfers to show")] = 50,
    as_json: AsJson = False,
) -> None:
    """Every transfer of this site, oldest first: what was sent and fetched, when, and the coordinator's receipt.

    Example: fedmkt agent ledger --state-dir agent --json
    """
    from fedmkt_client_agent.ledger_report import show_ledger

    show_ledger(state_dir, last, as_json=as_json)


@app.callback(invoke_without_command=True)
def agent(
    ctx: typer.Context,
    coordinator: Annotated[str | None, typer.Option(help="address of the coordinator [FEDMKT_COORDINATOR_URL]")] = None,
    enrolment_token_file: Annotated[
        Path | None,
        typer.Option(help="file with the one-time token, for the first start [FEDMKT_ENROLMENT_TOKEN_FILE]"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="folder or hub id of the site's model [FEDMKT_MODEL]")] = None,
    revision: Annotated[str | None, typer.Option(help="pinned commit of a hub id [FEDMKT_MODEL_REVISION]")] = None,
    private: Annotated[
        Path | None,
        typer.Option(help="JSONL, CSV, Parquet, a folder of text files, or datasets:NAME [FEDMKT_PRIVATE_FILE]"),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="e.g. prompt=question,completion=answer [FEDMKT_PRIVATE_COLUMNS]")
    ] = None,
    privacy_epsilon: Annotated[
        float | None, typer.Option(help="differential privacy over all rounds [FEDMKT_PRIVACY_EPSILON, off]")
    ] = None,
    privacy_rounds: Annotated[
        int | None, typer.Option(help="private trainings it has to last for [FEDMKT_PRIVACY_ROUNDS]")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML file: what this site allows [FEDMKT_POLICY_FILE, nothing is limited]")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="key, progress and adapter [FEDMKT_STATE_DIR, fedmkt-agent]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [FEDMKT_DEVICE, auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 [FEDMKT_DTYPE, auto]")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="CPU threads of torch, 0: its choice [FEDMKT_TORCH_THREADS, 1]")
    ] = None,
    holdout_share: Annotated[
        float | None, typer.Option(help="private part that the gate keeps [FEDMKT_PRIVATE_HOLDOUT_SHARE, 0.1]")
    ] = None,
    status_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="status pages, 0: any port [FEDMKT_STATUS_PORT, none]")
    ] = None,
    log_style: Annotated[str | None, typer.Option(help="json or text [FEDMKT_LOG_STYLE, json]")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING, ERROR [FEDMKT_LOG_LEVEL, INFO]")] = None,
) -> None:
    """Enrol once, then take part in every round. SIGTERM ends it between two steps; nothing done is done again."""
    if ctx.invoked_subcommand is not None:
        return
    given: dict[str, Any] = {
        "coordinator_url": coordinator,
        "enrolment_token_file": enrolment_token_file,
        "model": model,
        "model_revision": revision,
        "private_file": private,
        "private_columns": columns,
        "privacy_epsilon": privacy_epsilon,
        "privacy_rounds": privacy_rounds,
        "policy_file": policy,
        "state_dir": state_dir,
        "device": device,
        "dtype": dtype,
        "torch_threads": threads,
        "private_holdout_share": holdout_share,
        "status_port": status_port,
        "log_style": log_style,
        "log_level": log_level,
    }
    settings = read_settings(Settings, given)
    from fedmkt_client_agent.main import run  # torch and transformers: seconds that a wrong setting need not cost

    raise typer.Exit(run(settings))
