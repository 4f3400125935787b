"""`fedmkt agent`: options over FEDMKT_ variables, then the agent until SIGTERM."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmkt.settings import read_settings
from fedmkt_client_agent.settings import Settings

app = typer.Typer(
    add_completion=False,
    help="Run the agent of one site: private text stays here, knowledge of the public set is shared.",
)


@app.callback(invoke_without_command=True)
def agent(
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
    given: dict[str, Any] = {
        "coordinator_url": coordinator,
        "enrolment_token_file": enrolment_token_file,
        "model": model,
        "model_revision": revision,
        "private_file": private,
        "private_columns": columns,
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
