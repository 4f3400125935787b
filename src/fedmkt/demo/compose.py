"""The demo federation for containers: one command makes the sites' text and models, one creates the federation.

    python -m fedmkt.demo.compose prepare FOLDER
    python -m fedmkt.demo.compose federation FOLDER --rounds 3

FOLDER holds `llm/`, `public/` and `sites/<domain>/`, in docker-compose.yml a volume each, so that a site sees its own
part alone. Its `sites` folder says which domains take part. Both commands finish what is missing and repeat nothing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fedmkt.client import CoordinatorClient, StaticToken
from fedmkt.demo.models import default_recipes, ensure_models
from fedmkt.demo.texts import build_corpus, private_jsonl, public_jsonl
from fedmkt.errors import Refusal
from fedmkt.protocol import FederationConfig, PublicSetConfig, Schedule

READY = "ready"  # written last, into public/
PROGRESS_LINES = 10  # for each model

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


class OtherDomains(Refusal):
    code = "demo.other_domains"
    title = "The installed packages hold text of other domains"


def demo_config(sites: tuple[str, ...], rounds: int) -> FederationConfig:
    return FederationConfig(
        name="demo",
        sites=sites,
        public_set=PublicSetConfig(slices=rounds, holdout_share=0.2),
        schedule=Schedule(quorum=len(sites), collect_timeout_s=1800, distill_timeout_s=1800, apply_timeout_s=1800),
    )


def site_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(place.name for place in (folder / "sites").iterdir()))


@app.command()
def prepare(folder: Path, workers: Annotated[int, typer.Option(help="models trained at the same time")] = 2) -> None:
    """Make the public set, the LLM, and each site's model and private text."""
    if (folder / "public" / READY).exists():
        print("everything is there already")
        return
    names = site_names(folder)
    corpus = build_corpus(domains=len(names))
    if sorted(corpus.private) != list(names):
        raise OtherDomains(
            f"the folder is for the sites {', '.join(names)}, the text found here is about "
            f"{', '.join(sorted(corpus.private))}: name the sites after these"
        )
    cache = folder / "public" / "cache"  # a start that was interrupted goes on with the models it finished
    models = ensure_models(default_recipes(tuple(corpus.private)), corpus, cache, workers=workers, on_progress=lines())
    put_folder(models["llm"], folder / "llm" / "model")
    for name in names:
        put_folder(models[name], folder / "sites" / name / "model")
        put_file(private_jsonl(corpus.private[name]), folder / "sites" / name / "private.jsonl")
    put_file(public_jsonl(corpus.public), folder / "public" / "public.jsonl")
    shutil.rmtree(cache)
    put_file(b"", folder / "public" / READY)


@app.command()
def federation(
    folder: Path,
    coordinator: Annotated[str, typer.Option(envvar="FEDMKT_COORDINATOR_URL", help="address of the coordinator")],
    token_file: Annotated[Path, typer.Option(envvar="FEDMKT_OPERATOR_TOKEN_FILE", help="the operator's token")],
    rounds: Annotated[int, typer.Option(min=1, help="rounds to have been asked for in all")] = 3,
) -> None:
    """Create the federation on a running coordinator, give each site its one-time token, and ask for rounds."""
    names = site_names(folder)
    config = demo_config(names, rounds)
    with CoordinatorClient(coordinator, StaticToken(token_file.read_text().strip())) as operator:
        operator.check_version()
        found = next((each for each in operator.federations() if each.config.name == config.name), None)
        view = found or operator.create_federation(config)
        operator.put_public_set(view.federation_id, (folder / "public" / "public.jsonl").read_bytes())
        for site in view.sites:
            if site.state == "awaited":  # a token that was handed out and lost would lock the site out for ever
                token = operator.issue_enrolment_token(view.federation_id, site.name).token
                put_file(token.encode(), folder / "sites" / site.name / "enrolment-token", mode=0o600)
        if view.rounds_requested < rounds:
            operator.request_rounds(view.federation_id, rounds - view.rounds_requested)
    print(f"federation {config.name}: {len(names)} sites, {rounds} rounds asked for")


def lines() -> Callable[[str, int, int], None]:
    """A progress callback that prints some lines for each model: container logs have no bars."""
    shown: dict[str, int] = {}

    def show(name: str, done: int, total: int) -> None:
        tenth = PROGRESS_LINES * done // total
        if tenth > shown.get(name, 0):
            shown[name] = tenth
            print(f"model {name}: step {done} of {total}", flush=True)

    return show


def put_folder(source: Path, target: Path) -> None:
    """Copy a folder to another file system; `target` is whole or absent, and left alone if it is there."""
    if target.is_dir():
        return
    draft = target.with_name(f".{target.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    draft.rename(target)


def put_file(data: bytes, target: Path, mode: int = 0o644) -> None:
    """Write a file so that it is whole or absent."""
    draft = target.with_name(f".{target.name}.draft")
    draft.write_bytes(b"")
    draft.chmod(mode)
    draft.write_bytes(data)
    draft.rename(target)


if __name__ == "__main__":
    app()
