"""data, calibrate: sets for calibration and evaluation from a user's own data."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmquant.cli.options import AllowOutside, ImagesFolder, Json, KeyMap, MaxBadFraction, RecipeOption
from vlmquant.cli.output import emit, say, show
from vlmquant.cli.words import parse_counts, parse_sources, recipe_name
from vlmquant.errors import UsageError, shown

SKIPPED_SHOWN = 5
"""Records that could not be used, of those a set names in its skipped.jsonl."""

PATH_SHOWN = 4096
"""Characters; the longest path that Linux opens."""


def data(
    source: Annotated[
        list[str],
        typer.Argument(
            help="PATH, PATH=TASK or FORMAT:PATH=TASK of your data: a file, a folder, or a data set's id on the hub; "
            "several may be given."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new set, or of one folder for each part.")],
    samples: Annotated[int | None, typer.Option(min=1, help="So many, shared among the tasks; else all.")] = None,
    strata: Annotated[str | None, typer.Option(help="So many of each task, such as caption=80,vqa=60.")] = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="Several sets that share no image, in folders of these names, such as calibration=256,evaluation=200."
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Set whose images must not be in the new one; several may be given.")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Also write a contact sheet: .html (offline, all scripts) or .png (Latin letters only)."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of samples.")] = 0,
    mapping: KeyMap = None,
    images_folder: ImagesFolder = None,
    allow_outside: AllowOutside = False,
    max_bad_fraction: MaxBadFraction = None,
    as_json: Json = False,
) -> None:
    """Make sets for calibration and evaluation from your own data, and show what was read as what.

    Both are of the same form: a folder with images/ and samples.jsonl, one sample a line,

    \b
    {"id": "7", "task": "vqa", "image": "images/7.jpg",
     "question": "How many?", "answers": ["2", "two"]}

    where "images": [...] may stand for "image", text-only samples have neither, and "system" and "history":
    [{"question", "answer"}] may be there too. Use them as `quantize --calibration` and `eval --data`.
    """
    from vlmquant.calibration.build import build_set, split_sets
    from vlmquant.calibration.sets import load_set
    from vlmquant.calibration.sheet import check_sheet
    from vlmquant.recipe import CalibrationSpec

    if sum(option is not None for option in (samples, strata, split)) > 1:
        raise UsageError("give one of --samples, --strata and --split")
    if sheet is not None:
        check_sheet(sheet)
    sources = parse_sources(source, mapping, images_folder, allow_outside)
    excluded = [sample for name in exclude or () for sample in load_set(name).samples]
    options: dict[str, Any] = {"exclude": excluded, "max_bad_fraction": max_bad_fraction}
    if split is not None:
        built = split_sets(sources, parse_counts(split, "--split"), out, seed=seed, **options)
    else:
        counts = None if strata is None else parse_counts(strata, "--strata")
        spec = None
        if samples is not None or strata is not None:
            spec = CalibrationSpec(seed=seed).model_copy(update={"samples": samples, "strata": counts})
        built = {out.name: build_set(sources, spec, out, **options)}
    if sheet is not None:
        _write_sheet(sheet, built)
    if as_json:
        emit({"sets": {name: made.to_json() for name, made in built.items()}} if split else built[out.name].to_json())
    else:
        _show_built(built.values())


def calibrate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the new set.")],
    source: Annotated[
        list[str] | None,
        typer.Option(
            "--source",
            "-s",
            help="PATH, PATH=TASK or FORMAT:PATH=TASK of your own data; several may be given. "
            "Without one, samples are drawn from the recipe's set.",
        ),
    ] = None,
    recipe: RecipeOption = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Samples instead of the recipe's number.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed instead of the recipe's.")] = None,
    mapping: KeyMap = None,
    images_folder: ImagesFolder = None,
    allow_outside: AllowOutside = False,
    max_bad_fraction: MaxBadFraction = None,
    as_json: Json = False,
) -> None:
    """Make the calibration set that a recipe asks for from your own data: the short form of `data`."""
    from vlmquant.recipe import load_recipe

    wanted = load_recipe(recipe_name(recipe))
    spec = wanted.calibration.at(wanted.effort)
    changes = {"samples": samples, "seed": seed}
    spec = spec.model_copy(update={key: value for key, value in changes.items() if value is not None})
    from vlmquant.calibration.build import build_set, draw_set

    if source:
        sources = parse_sources(source, mapping, images_folder, allow_outside)
        built = build_set(sources, spec, out, max_bad_fraction=max_bad_fraction)
    else:
        built = draw_set(spec, out)
    if as_json:
        emit(built.to_json())
    else:
        _show_built([built])


def _show_built(built: Iterable[Any]) -> None:
    """Sets that were made of the same sources: what was read as what, what is in them, what was left out."""
    from vlmquant.tables.sets import sources_table, strata_table

    sets = list(built)
    for use in sets[0].sources:
        say(f"{use.name}: {use.reading.summary()}")
    if sets[0].sources:
        show(sources_table([made.sources for made in sets]))
    skipped = sets[0].skipped
    for record in skipped[:SKIPPED_SHOWN]:
        say(f"skipped {shown(record.where)}: {shown(record.reason)}")
    if len(skipped) > SKIPPED_SHOWN:
        say(f"and {len(skipped) - SKIPPED_SHOWN} more in {shown(sets[0].skipped_file, limit=PATH_SHOWN)}")
    for made in sets:
        show(strata_table(made.strata))
        for note in made.notes:
            say(f"note: {note}")
        where = shown(made.path, limit=PATH_SHOWN)
        say(f"{where}: {len(made.sample_set.samples)} samples, sha256 {made.sample_set.sha256}")


def _write_sheet(file: Path, built: dict[str, Any]) -> None:
    from vlmquant.calibration.sheet import contact_sheet

    skipped = [(record.where, record.reason) for record in next(iter(built.values())).skipped]
    content = contact_sheet(file, {name: made.sample_set.samples for name, made in built.items()}, skipped)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
