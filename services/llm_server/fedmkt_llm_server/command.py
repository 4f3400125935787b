"""`fedmkt llm-server`: options over FEDMKT_ variables, then the server until SIGTERM."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmkt.settings import read_settings
from fedmkt_llm_server.settings import Settings

app = typer.Typer(
    add_completion=False,
    help="Run the LLM server: it distils the sites' knowledge into the LLM and builds vocabulary maps.",
)


@app.callback(invoke_without_command=True)
def llm_server(
    coordinator: Annotated[str | None, typer.Option(help="address of the coordinator [FEDMKT_COORDINATOR_URL]")] = None,
    model: Annotated[str | None, typer.Option(help="folder or hub id of the LLM [FEDMKT_MODEL]")] = None,
    revision: Annotated[str | None, typer.Option(help="pinned commit of a hub id [FEDMKT_MODEL_REVISION]")] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="file with the worker credential [FEDMKT_WORKER_TOKEN_FILE]")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="optimizer states and caches [FEDMKT_STATE_DIR, fedmkt-llm-server]")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="the queue; asked from the coordinator if absent [FEDMKT_REDIS_URL]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ... [FEDMKT_DEVICE, auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 [FEDMKT_DTYPE, auto]")] = None,
    threads: Annotated[
        int | None, typer.Option(min=0, help="CPU threads of torch, 0: its choice [FEDMKT_TORCH_THREADS, 0]")
    ] = None,
    status_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="status pages, 0: any port [FEDMKT_STATUS_PORT, none]")
    ] = None,
    log_style: Annotated[str | None, typer.Option(help="json or text [FEDMKT_LOG_STYLE, json]")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING, ERROR [FEDMKT_LOG_LEVEL, INFO]")] = None,
) -> None:
    """Serve every federation of the coordinator with one LLM. SIGTERM ends it between two steps of a job."""
    given: dict[str, Any] = {
        "coordinator_url": coordinator,
        "model": model,
        "model_revision": revision,
        "worker_token_file": token_file,
        "state_dir": state_dir,
        "redis_url": redis_url,
        "device": device,
        "dtype": dtype,
        "torch_threads": threads,
        "status_port": status_port,
        "log_style": log_style,
        "log_level": log_level,
    }
    settings = read_settings(Settings, given)
    from fedmkt_llm_server.main import run  # torch and transformers: seconds that a wrong setting need not cost

    raise typer.Exit(run(settings))
