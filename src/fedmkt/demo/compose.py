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

from fedmkt.demo.models import default_recipes, ensure_models
from fedmkt.demo.texts import build_corpus, private_jsonl, public_jsonl
from fedmkt.errors import Refusal

READY = "ready"  # written last, into public/
PROGRESS_LINES = 10  # for each model

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


class OtherDomains(Refusal):
    code = "demo.other_domains"
    title = "The installed packages hold text of other domains"


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
def federation(folder: Path) -> None:
    """Create."""


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


def put_file(data: bytes, target: Path) -> None:
    """Write a file so that it is whole or absent."""
    draft = target.with_name(f".{target.name}.draft")
    draft.write_bytes(data)
    draft.rename(target)


if __name__ == "__main__":
    app()
