"""eval, compare, gate: what quantization cost, and whether that is too much."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmquant.cli.options import (
    Data,
    Device,
    Dtype,
    Html,
    Json,
    Limit,
    Markdown,
    NoGenerate,
    OtherInputs,
    Strata,
    Threads,
    ThresholdsFile,
    WrongImage,
    with_thresholds,
)
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import parse_counts


def evaluate(
    model: Annotated[Path, typer.Argument(help="Directory of the quantized model.")],
    reference: Annotated[str, typer.Option("--reference", help="The model it was quantized from.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("report.json"),
    html: Html = None,
    markdown: Markdown = None,
    limit: Limit = None,
    samples: Strata = None,
    wrong_image: WrongImage = False,
    no_generate: NoGenerate = False,
    other_inputs: OtherInputs = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also put the table and the gate's verdict into the model's card, README.md.")
    ] = False,
    thresholds: ThresholdsFile = None,
    as_json: Json = False,
) -> None:
    """Measure what quantization cost: perplexity, KL, flips, BLEU-4, exact match, speed, memory."""
    from vlmquant.checkpoint.card import check_card
    from vlmquant.gate import given_gate
    from vlmquant.pipeline import put_into_card

    if card:
        check_card(model)
    report = compare(
        reference,
        [model],
        data,
        out=out,
        html=html,
        markdown=markdown,
        limit=limit,
        samples=samples,
        wrong_image=wrong_image,
        no_generate=no_generate,
        other_inputs=other_inputs,
        device=device,
        dtype=dtype,
        threads=threads,
        thresholds=thresholds,
        as_json=as_json,
    )
    if card:
        put_into_card(report, model, None if thresholds is None else given_gate(report, thresholds))
        if not as_json:
            say(f"wrote {model / 'README.md'}")


def compare(
    reference: Annotated[str, typer.Argument(help="The unquantized model.")],
    models: Annotated[list[Path], typer.Argument(help="Quantized models, one row each.")],
    data: Data,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where the report goes.")] = None,
    html: Html = None,
    markdown: Markdown = None,
    limit: Limit = None,
    samples: Strata = None,
    wrong_image: WrongImage = False,
    no_generate: NoGenerate = False,
    other_inputs: OtherInputs = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    thresholds: ThresholdsFile = None,
    as_json: Json = False,
) -> Any:
    """Several quantized models against the original, in one table."""
    from vlmquant import pipeline
    from vlmquant.evaluation.settings import Settings
    from vlmquant.gate import given_gate
    from vlmquant.recipe import load_gate
    from vlmquant.report.data import check_report_paths
    from vlmquant.report.table import compare_rows, remarks
    from vlmquant.tables.reports import comparison_table

    if thresholds is not None:
        load_gate(thresholds)  # a mistake in it is told before the work
    paths = {"--out": out, "--html": html, "--markdown": markdown}
    check_report_paths(paths, apart=[Path(reference), *models])
    settings = Settings(
        wrong_image=wrong_image,
        generate=not no_generate,
        allow_other_inputs=other_inputs,
        device=device,
        dtype=dtype,  # type: ignore[arg-type]  # Settings refuses what it does not know
        threads=threads,
    )
    report = pipeline.evaluate(
        reference,
        models,
        data,
        limit=limit,
        strata=None if samples is None else parse_counts(samples),
        settings=settings,
        command=("vlmquant", *sys.argv[1:]),
    )
    gate = None if thresholds is None else given_gate(report, thresholds)
    written = pipeline.write_report(report, data=data, out=out, html=html, markdown=markdown, gate=gate)
    if as_json:
        files, notes = [str(path) for path in written], [f"{label}: {text}" for label, text in remarks(report)]
        emit({"rows": compare_rows(report), "notes": notes, "files": files})
        return report
    show(comparison_table(report))
    for label, text in remarks(report):
        say(f"note: {label}: {text}")
    for path in written:
        say(f"wrote {path}")
    return report


@with_thresholds
def gate(
    report: Annotated[Path, typer.Argument(help="report.json of `vlmquant eval` or `compare`.")],
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", "-r", help="Recipe whose thresholds apply; else those that the report itself holds."),
    ] = None,
    thresholds: ThresholdsFile = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Also write the verdicts as JUnit XML.")] = None,
    as_json: Json = False,
    **given: str | None,
) -> None:
    """Judge a report by thresholds: exit 0 passed, 3 failed, 4 inconclusive."""
    from vlmquant import gate as judging
    from vlmquant.report.data import append_text, check_report_paths, read_json, write_text
    from vlmquant.tables.reports import verdict_table

    check_report_paths({"--junit": junit}, apart=[report])
    found = read_json(report)
    chosen = judging.choose_gate(found, where=str(report), recipe=recipe, file=thresholds, given=given)
    verdicts, source = judging.judge(found, chosen.specs), chosen.source
    if as_json:
        emit({"thresholds": chosen.to_json(found), "verdicts": [dataclasses.asdict(verdict) for verdict in verdicts]})
    else:
        show(verdict_table(verdicts, thresholds=source))
    if junit is not None:
        write_text(junit, judging.to_junit(verdicts, thresholds=source))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        append_text(Path(summary), judging.to_step_summary(verdicts, thresholds=source))
    raise typer.Exit(judging.exit_code(verdicts))
