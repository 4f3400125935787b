"""`python -m experiments run FILE...` plays what is missing; `... report FILE...` writes tables and plots from it."""

import time
from pathlib import Path
from typing import Annotated

import typer

from experiments.setting import Setting
from experiments.texts import real_folder
from experiments.units import Folders, cores, run

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Files = Annotated[list[Path], typer.Argument(exists=True, dir_okay=False, help="experiments, as TOML files")]


@app.command("run")
def run_command(files: Files, workers: Annotated[int, typer.Option(min=1, help="processes at once")] = cores()) -> None:
    """Play every arm of every seed that has no results yet."""
    began = time.monotonic()

    def tell(name: str, done: int, total: int) -> None:
        if done == total:
            typer.echo(f"{time.monotonic() - began:7.0f} s  {name}")

    run(_playable(files), Folders(), workers=workers, tell=tell)


@app.command("report")
def report_command(files: Files, document: Path = Path("docs/experiments.md")) -> None:
    """Tables and plots of what there is, between the document's markers."""
    from experiments.report import write_report

    write_report(_playable(files), Folders(), document)


def _playable(files: list[Path]) -> list[Setting]:
    """All but those that need real texts where there are none."""
    settings = [Setting.read(path) for path in files]
    left_out = [each.name for each in settings if each.texts.source == "real" and real_folder() is None]
    if left_out:
        typer.echo(f"left out, since FEDMKT_DATA_DIR names no real texts: {', '.join(left_out)}")
    return [each for each in settings if each.name not in left_out]


if __name__ == "__main__":
    app()
