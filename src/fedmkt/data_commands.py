"""`fedmkt data`: look at a site's private text on the site's own machine, before an agent trains on it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # numpy takes half of the time that --help may take
    from fedmkt.private_check import Lengths, Places, Report

data_app = typer.Typer(help="Look at a site's private text; nothing of it is sent.", no_args_is_help=True)


@data_app.callback()
def data() -> None:
    """A group, although it has one command so far."""


@data_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="JSONL, CSV, TSV, Parquet, a folder of text files, or datasets:NAME.")],
    model: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="The site's model: counts tokens, not just bytes.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=8, help="The federation's knowledge.max_tokens.")] = 512,
    public: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Public set (JSONL) to look for the same texts in.")
    ] = None,
    columns: Annotated[
        str, typer.Option(envvar="FEDMKT_PRIVATE_COLUMNS", help="For example prompt=question,completion=answer.")
    ] = "",
    holdout_share: Annotated[
        float, typer.Option(envvar="FEDMKT_PRIVATE_HOLDOUT_SHARE", min=0.001, max=0.5, help="Kept for the gate.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Count, measure and judge private text, and say what to do; exit status 1 if the agent would refuse it.

    It names lines and never shows what stands in them, and it sends nothing.

    Example: fedmkt data check notes.jsonl --model models/site --public public.jsonl
    """
    from fedmkt.private_check import check_private, usable_tokens
    from fedmkt.private_formats import format_of, read_columns
    from fedmkt.private_records import read_samples
    from fedmkt.public_set import DEFAULT_CHAT_TEMPLATE, PublicSet
    from fedmkt.vocabulary import Vocabulary

    report = check_private(
        read_samples(file, DEFAULT_CHAT_TEMPLATE, read_columns(columns)),
        format_of(file).word,
        holdout_share,
        None if model is None else Vocabulary.from_tokenizer(model),
        0 if model is None else usable_tokens(model, max_tokens),
        None if public is None else PublicSet.from_jsonl(public.read_bytes()),
    )
    typer.echo(json.dumps(asdict(report), indent=2) if as_json else "\n".join(_lines(report)))
    raise typer.Exit(0 if report.usable else 1)


def _lines(report: "Report") -> list[str]:
    unusable = sum(report.problem_counts.values())
    lines = [f"{report.samples} samples, {report.with_prompt} with a prompt; {unusable} records that cannot be used"]
    if report.train:
        lines.append(f"{report.train} to train on, {report.holdout} held out for the gate")
    for problem in report.problems:
        lines.append(f"{problem.place} {problem.reason}")
    if unusable > len(report.problems):
        lines.append(f"and {unusable - len(report.problems)} more")
    if report.bytes is not None:
        lines.append(_length_line("bytes", report.bytes))
    if report.tokens is not None:
        tokens = report.tokens
        lines.append(_length_line("tokens", tokens.lengths))
        lines.append(f"{tokens.cut_share:.1%} cut at {tokens.limit} tokens")
        lines.append(f"{tokens.with_response_rows_share:.1%} have a response to learn within them")
    lines += _place_lines("repeat an earlier sample", report.repeats)
    if report.overlap is not None:
        lines.append(f"{report.overlap.share:.1%} are among the {report.overlap.public_samples} public samples")
        lines += _place_lines("are in the public set", report.overlap.shared)
    lines += _place_lines("look garbled by a wrong encoding", report.garbled)
    lines += _place_lines("hold U+FFFD, a letter lost earlier", report.replaced)
    lines += _place_lines("hold control characters", report.control)
    return [*lines, *(f"to do: {advice}" for advice in report.advice or ("nothing",))]


def _length_line(unit: str, lengths: "Lengths") -> str:
    return (
        f"{unit} a sample: {lengths.least} to {lengths.most}, half of them up to {lengths.median}, 95 % up to "
        f"{lengths.percentile_95}; {lengths.total} in all"
    )


def _place_lines(what: str, places: "Places") -> list[str]:
    if not places.count:
        return []
    more = ", ..." if places.count > len(places.first) else ""
    return [f"{places.count} {what}: {', '.join(places.first)}{more}"]
