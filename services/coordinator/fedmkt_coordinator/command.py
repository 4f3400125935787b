"""`fedmkt coordinator`: run the service, or show what an operator needs to reach it."""

import asyncio
import logging
import os
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
import uvicorn
from fastapi import FastAPI

from fedmkt import fault_points
from fedmkt.logs import configure_logs
from fedmkt.tracing import configure
from fedmkt_coordinator.app import create_app
from fedmkt_coordinator.connections import with_bounded_heads
from fedmkt_coordinator.context import Context
from fedmkt_coordinator.credentials import FILE, STAFF, read_or_make
from fedmkt_coordinator.settings import Settings, read_settings
from fedmkt_coordinator.store import open_engine
from fedmkt_coordinator.store.migrate import migrate

app = typer.Typer(help="Run the coordinator: it schedules rounds and serves sites, the LLM server and dashboards.")

StateDir = Annotated[
    Path | None, typer.Option(help="database, artifacts, credentials, Redis files [FEDMKT_STATE_DIR, fedmkt-state]")
]

# Long polls and event streams end at once when the server is told to stop; what is left is short.
GRACE_S = 10


class Server(uvicorn.Server):
    """uvicorn, which on a signal first lets waiting requests answer: it would wait for them otherwise."""

    def __init__(self, config: uvicorn.Config, service: FastAPI) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        context = getattr(self._service.state, "context", None)
        if isinstance(context, Context):
            context.wakeups.stop()
        # Not the inherited handler: it raises the signal again in the end, and a service told to stop has not failed.
        self.force_exit = self.should_exit
        self.should_exit = True


@app.callback(invoke_without_command=True)
def coordinator(ctx: typer.Context) -> None:
    """Run the coordinator as the FEDMKT_ variables say; the same as `run` without options."""
    if ctx.invoked_subcommand is None:
        serve(read_settings())


@app.command()
def run(
    state_dir: StateDir = None,
    host: Annotated[str | None, typer.Option(help="address to listen on [FEDMKT_HOST, 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="port to listen on, 0: any [FEDMKT_PORT, 8700]")
    ] = None,
    log_style: Annotated[str | None, typer.Option(help="json or text [FEDMKT_LOG_STYLE, json]")] = None,
    log_level: Annotated[str | None, typer.Option(help="DEBUG, INFO, WARNING, ERROR [FEDMKT_LOG_LEVEL, INFO]")] = None,
) -> None:
    """Run the coordinator until SIGTERM; without other settings, all it needs lives in its state folder."""
    given: dict[str, Any] = {
        "state_dir": state_dir,
        "host": host,
        "port": port,
        "log_style": log_style,
        "log_level": log_level,
    }
    serve(read_settings(**{name: value for name, value in given.items() if value is not None}))


def serve(settings: Settings) -> None:
    configure_logs("coordinator", level=settings.log_level, style=settings.log_style)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    fault_points.arm(os.environ, listens_at=settings.host)
    end_tracing = configure("coordinator") if settings.otel else None
    service = create_app(settings)
    config = uvicorn.Config(
        service,
        host=settings.host,
        port=settings.port,
        http=with_bounded_heads(settings.header_timeout_s),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    try:
        Server(config, service).run()
    finally:
        if end_tracing is not None:
            end_tracing()


@app.command()
def init(state_dir: StateDir = None) -> None:
    """Make the operator's, viewer's and worker's tokens, and show them this once."""
    given = {} if state_dir is None else {"state_dir": state_dir}
    folder = read_settings(**given).state_dir
    if (folder / FILE).exists():
        typer.echo(f"{folder / FILE} holds the tokens since an earlier start; nothing was changed.")
        return
    credentials = read_or_make(folder)
    for role in STAFF:
        typer.echo(f"{role}: {getattr(credentials, role)}")
    typer.echo(f"Kept in {folder / FILE}, which only its owner can read. They are shown here this once.")


@app.command("migrate")
def migrate_database() -> None:
    """Bring the database that the FEDMKT_ variables name to the present schema, and end.

    Every start of the coordinator does the same; an upgrade of many replicas does it once, before the first of them.
    """
    settings = read_settings()
    settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    asyncio.run(_migrate(settings))
    typer.echo("the database has the present schema")


async def _migrate(settings: Settings) -> None:
    url = settings.database_url
    engine = open_engine(url.get_secret_value() if url else None, settings.state_dir)
    try:
        await migrate(engine)
    finally:
        await engine.dispose()
