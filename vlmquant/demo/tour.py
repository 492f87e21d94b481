"""`vlmquant demo`: the whole road on the bundled model, each step announced by the command that would do it by hand."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from vlmquant.components import resolve_components
from vlmquant.demo import calibration_set_dir, model_dir, test_set_dir
from vlmquant.errors import UsageError, printable
from vlmquant.gate import exit_code, judge
from vlmquant.pipeline import evaluate, quantize, write_report
from vlmquant.planning import make_plan
from vlmquant.recipe import load_recipe
from vlmquant.streams import printing
from vlmquant.tables.layout import Table
from vlmquant.tables.models import component_table, plan_table
from vlmquant.tables.reports import comparison_table, verdict_table

RECIPES = ("mixed", "mixed-awq", "rtn-w3")
"""Quantized and compared; the gate judges the first, the last shows what careless rounding does."""
REPORT_NAME = "report"
COMPARISON_NAME = "comparison"


def run(out: Path) -> int:
    """Inspect, plan, quantize, evaluate, report and gate; returns the gate's exit code."""
    started = time.monotonic()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out}: exists and is not empty; give another folder with --out, or remove it")
    console = Console()
    console = console if console.is_terminal else Console(width=160)

    def show(what: object, **how: Any) -> None:
        with printing():
            console.print(what, **how)

    def show_table(table: Table) -> None:
        with printing():
            table.print(console)

    def tell(text: str, **how: Any) -> None:
        show(Text(printable(text)), soft_wrap=True, **how)

    model, data = model_dir(), test_set_dir()
    outputs = [out / recipe for recipe in RECIPES]
    report, comparison = out / REPORT_NAME, out / COMPARISON_NAME

    def announce(command: str) -> None:
        show("")
        tell(f"$ vlmquant {command}", style="bold")

    announce(f"inspect {model}")
    components = resolve_components(model)
    show_table(component_table(components))
    announce(f"plan {model} --recipe {RECIPES[0]}")
    show_table(plan_table(make_plan(components, load_recipe(RECIPES[0]))))
    for recipe, output in zip(RECIPES, outputs, strict=True):
        command = f"quantize {model} --recipe {recipe} --calibration {calibration_set_dir()} --out {output}"
        announce(command)
        done = quantize(model, recipe, output, calibration=calibration_set_dir())
        tell(f"{output}: {done.plan.bits_per_weight:.2f} bits per weight, {done.seconds:.1f} s")
    words = ("compare", str(model), *map(str, outputs), "--data", str(data), "--out", f"{comparison}.json")
    announce(" ".join(words))
    compared = evaluate(model, outputs, data, command=("vlmquant", *words))
    write_report(
        compared,
        data=data,
        out=comparison.with_suffix(".json"),
        html=comparison.with_suffix(".html"),
        markdown=comparison.with_suffix(".md"),
    )
    show_table(comparison_table(compared))
    # The first model's own report: the same runs, without the others'.
    judged = replace(compared, candidates=compared.candidates[:1], summaries=compared.summaries[:2])
    written = write_report(
        judged,
        data=data,
        out=report.with_suffix(".json"),
        html=report.with_suffix(".html"),
        markdown=report.with_suffix(".md"),
    )
    announce(f"gate {written[0]} --recipe {RECIPES[0]}")
    verdicts = judge(judged, load_recipe(RECIPES[0]).gate)
    show_table(verdict_table(verdicts, thresholds=f"from the recipe {RECIPES[0]}"))
    tell(
        f"Done in {time.monotonic() - started:.0f} s. Open {report.with_suffix('.html')} in a browser, "
        f"and {comparison.with_suffix('.html')} for all {len(RECIPES)} models."
    )
    return exit_code(verdicts)
