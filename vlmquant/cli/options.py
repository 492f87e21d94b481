"""Options that several commands share."""

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated

import typer

from vlmquant.threads import MAX_THREADS
from vlmquant.thresholds import THRESHOLDS, option

Model = Annotated[str, typer.Argument(help="Model directory or hub id.")]


def recipe_names() -> list[tuple[str, str]]:
    """For a shell that completes a word: shipped recipes and what they do."""
    from vlmquant.recipe import shipped_recipes

    return [(row.name, row.summary) for row in shipped_recipes().values()]


RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        "-r",
        envvar="VLMQUANT_RECIPE",
        autocompletion=recipe_names,
        help="Recipe file, or the name of a shipped recipe; else mixed.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option("--calibration", envvar="VLMQUANT_CALIBRATION", help="Calibration set instead of the recipe's."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
FamilyOption = Annotated[
    Path | None,
    typer.Option("--family", help="YAML file that says where the parts of a model are that vlmquant does not know."),
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        help="fast: less time and more loss; default; high: least loss, in several times the time; else the recipe's.",
    ),
]
ScoresFile = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        help="What layers lose by each scheme, as `vlmquant sensitivity` saves it: read if the file is there, else "
        "measured and saved.",
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences served at once, else 1.")]
Context = Annotated[int | None, typer.Option(min=1, help="Tokens of text in a sequence, prompt and answer, else 4096.")]
Images = Annotated[int | None, typer.Option(min=0, help="Images in a sequence, else 1; their tokens are added.")]
ImageSize = Annotated[str | None, typer.Option(help="Their width and height in pixels, else 1024x768.")]
TensorParallel = Annotated[int | None, typer.Option(min=1, max=1024, help="GPUs that share the model, else 1.")]
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        "-d",
        help='Evaluation set, as `vlmquant data` makes it: a folder with samples.jsonl, a line {"id", "task", "image", '
        '"question", "answers": [...]}.',
    ),
]
KeyMap = Annotated[
    list[str] | None,
    typer.Option("--map", help="Which key or column to read as what, such as image=picture,question=q,answer=label."),
]
ImagesFolder = Annotated[
    Path | None, typer.Option("--images-folder", help="Folder that image paths start from; else that of the file.")
]
AllowOutside = Annotated[
    bool, typer.Option("--allow-outside", help="Read images from outside that folder too (../, absolute, links).")
]
MaxBadFraction = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Share of a source's records that may be unusable, else 0.1; they are skipped and named."
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="At most this many samples, shared among the tasks.")]
Strata = Annotated[
    str | None, typer.Option("--samples", help="Samples per task in file order, such as caption=80,vqa=60.")
]
Html = Annotated[Path | None, typer.Option("--html", help="Also write the report as an HTML page.")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="Also write the report as Markdown.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        envvar="VLMQUANT_DEVICE",
        help="Where to compute: cpu, cuda, cuda:1; auto is the GPU if there is one.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", envvar="VLMQUANT_DTYPE", help="Compute dtype: auto (the faster here), float32 or bfloat16."
    ),
]
PassesDtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        envvar="VLMQUANT_DTYPE",
        help="Of the calibration passes: auto (bfloat16 on CPUs made for it, float32 on others), float32 or bfloat16.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        envvar="VLMQUANT_THREADS",
        min=1,
        max=MAX_THREADS,
        help="CPU threads; all cores if not given.",
    ),
]
WrongImage = Annotated[
    bool,
    typer.Option("--wrong-image", help="Also measure perplexity with another sample's image: does the model look?"),
]
NoGenerate = Annotated[bool, typer.Option("--no-generate", help="Skip generation: no BLEU, exact match or speed.")]
ThresholdsFile = Annotated[
    Path | None,
    typer.Option(
        "--thresholds", help="YAML file of thresholds, the keys of a recipe's `gate`; else each model's recipe's own."
    ),
]
OtherInputs = Annotated[
    bool,
    typer.Option("--allow-other-inputs", help="Compare models whose prompts or image inputs differ, and say so."),
]


def with_thresholds(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every threshold that a gate knows, which it gets as text by name."""
    own = signature(command)
    *kept, rest = own.parameters.values()  # the last one collects them: **given
    options = [
        Parameter(
            name,
            rest.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(option(name), metavar=row.example, help=f"{row.help}; none: not judged."),
            ],
        )
        for name, row in THRESHOLDS.items()
    ]
    command.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    command.__annotations__ |= {parameter.name: parameter.annotation for parameter in options}
    return command
