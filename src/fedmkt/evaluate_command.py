"""`fedmkt evaluate`: a model, with or without an adapter, on texts that it was not trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmkt.extras import require

if TYPE_CHECKING:  # pydantic takes half of the time that --help may take
    from fedmkt.protocol import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Model: folder or hub id (ID@COMMIT).")],
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="JSONL as a public set has it, `choices` and all.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of an adapter, for example a downloaded one."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="Longer samples are cut.")] = 512,
    rouge: Annotated[int, typer.Option(min=0, help="Prompts to answer freely and score by Rouge-L.")] = 0,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Longest free answer.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Bits per byte, next-token accuracy, questions with choices and free answers, by domain.

    A line of FILE is {prompt, completion}, {text} or {messages}, with an optional domain; beside a completion,
    `choices` lists the answers of which it is one, and the model is asked which is the likeliest.

    Example: fedmkt evaluate models/site held-out.jsonl --adapter adapter-3 --rouge 50
    """
    require("evaluate", "torch", "transformers", "peft", "rouge_score", extra="ml")
    from rich.console import Console
    from rich.progress import Progress

    from fedmkt.ml.evaluation import evaluate as measure
    from fedmkt.ml.merge import load_party
    from fedmkt.protocol import EvaluationConfig
    from fedmkt.public_set import PublicSet

    samples = PublicSet.from_jsonl(file.read_bytes()).samples
    party = load_party(model, adapter, device)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(f"{file.name} on {party.device}", total=None)
        found = measure(
            party,
            samples,
            max_tokens=max_tokens,
            questions=EvaluationConfig(rouge_samples=rouge, answer_tokens=answer_tokens),
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    if as_json:
        typer.echo(json.dumps({name: each.model_dump(mode="json") for name, each in found.items()}, indent=2))
    else:
        _show(found)


def _show(found: "Mapping[str, Evaluation]") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("domain", box=None)
    for head in ("samples", "bits per byte", "next token", "choices", "by byte", "of", "Rouge-L", "of"):
        table.add_column(head, justify="right")
    for name, each in found.items():
        table.add_row(
            name,
            f"{each.samples:,}",
            f"{each.bits_per_byte:.4f}",
            f"{each.accuracy:.1%}",
            _share(each.choice_accuracy),
            _share(each.choice_accuracy_per_byte),
            f"{each.choice_samples:,}" if each.choice_samples else "",
            "" if each.rouge_l is None else f"{each.rouge_l:.3f}",
            f"{each.rouge_samples:,}" if each.rouge_samples else "",
        )
    Console().print(table)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"
