"""The demo federation for containers: one command makes the sites' text and models, one creates the federation.

    python -m fedmkt.demo.compose prepare FOLDER --rounds 3
    python -m fedmkt.demo.compose federation FOLDER

FOLDER holds `llm/`, `public/` and `sites/<name>/`, in docker-compose.yml a volume each, so that a site sees its own
part alone. Its `sites` folder says who takes part. Both commands finish what is missing and repeat nothing.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from fedmkt.client import CoordinatorClient, StaticToken
from fedmkt.demo import setup
from fedmkt.errors import Refusal
from fedmkt.protocol import FederationConfig

READY = "ready"  # written last, into public/
PROGRESS_LINES = 10  # for each model

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


class OtherSites(Refusal):
    code = "demo.other_sites"
    title = "The installed packages hold text for other sites"
    remedy = "`docker compose down --volumes`, then build the images anew."


@app.command()
def prepare(folder: Path, rounds: Annotated[int, typer.Option(min=1, help="slices of the public set")] = 3) -> None:
    """Make the public set, the LLM, and each site's model and private text."""
    public = folder / "public"
    if (public / READY).exists():
        print("everything is there already")
        return
    names = {place.name for place in (folder / "sites").iterdir()}
    cache = public / "cache"  # a start that was interrupted goes on with the models it finished
    with tempfile.TemporaryDirectory() as out:
        options = setup.DemoOptions(rounds=rounds, out=Path(out), cache=cache)
        made = setup.prepare(options, Lines().show)
        if {site.name for site in made.sites} != names:
            raise OtherSites(
                f"the folder is for the sites {', '.join(sorted(names))}, the text found here is for "
                f"{', '.join(site.name for site in made.sites)}: name the sites after these"
            )
        put_folder(Path(made.llm.source), folder / "llm" / "model")
        for site in made.sites:
            place = folder / "sites" / site.name
            put_folder(Path(site.model.source), place / "model")
            put_file(site.private_file.read_bytes(), place / "private.jsonl")
        put_file(made.public_file.read_bytes(), public / "public.jsonl")
        put_file(made.config.model_dump_json(indent=2).encode(), public / "federation.json")
    shutil.rmtree(cache)
    put_file(b"", public / READY)


@app.command()
def federation(
    folder: Path,
    coordinator: Annotated[str, typer.Option(envvar="FEDMKT_COORDINATOR_URL", help="address of the coordinator")],
    token_file: Annotated[Path, typer.Option(envvar="FEDMKT_OPERATOR_TOKEN_FILE", help="the operator's token")],
) -> None:
    """Create the federation on a running coordinator, give each site its one-time token, ask for a round a slice."""
    config = FederationConfig.model_validate_json((folder / "public" / "federation.json").read_bytes())
    rounds = config.public_set.slices
    with CoordinatorClient(coordinator, StaticToken(token_file.read_text().strip())) as operator:
        operator.check_version()
        found = next((each for each in operator.federations() if each.config.name == config.name), None)
        view = found or operator.create_federation(config)
        operator.put_public_set(view.federation_id, (folder / "public" / "public.jsonl").read_bytes())
        for site in view.sites:
            if site.state == "awaited":  # anew at every start: a token that was made and then lost locks nobody out
                token = operator.issue_enrolment_token(view.federation_id, site.name).token
                put_file(token.encode(), folder / "sites" / site.name / "enrolment-token", mode=0o600)
        if view.rounds_requested < rounds:
            operator.request_rounds(view.federation_id, rounds - view.rounds_requested)
    put_file(view.federation_id.encode(), folder / "public" / "federation-id")
    print(f"federation {config.name}: {len(config.sites)} sites, {rounds} rounds")


class Lines:
    """Progress as some lines for each step: container logs have no bars."""

    def __init__(self) -> None:
        self._shown: dict[str, int] = {}

    def show(self, name: str, done: int, total: int) -> None:
        tenth = PROGRESS_LINES * done // total
        if tenth > self._shown.get(name, -1):
            self._shown[name] = tenth
            print(f"{name}: {done} of {total}", flush=True)


def put_folder(source: Path, target: Path) -> None:
    """Copy a folder to another file system; `target` is whole or absent, and left alone if it is there."""
    if target.is_dir():
        return
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)


def put_file(data: bytes, target: Path, mode: int = 0o644) -> None:
    """Write a file so that it is whole or absent, and never readable by more than `mode` says."""
    draft = target.with_name(f".{target.name}.draft")
    draft.unlink(missing_ok=True)
    draft.touch(mode)
    draft.write_bytes(data)
    draft.rename(target)


if __name__ == "__main__":
    try:
        app()
    except Refusal as refusal:
        sys.exit(f"{refusal.title}: {refusal.detail}")
